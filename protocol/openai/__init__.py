"""OpenAI's JSON to and from requests, as pure functions."""
