"""What crosses a process boundary: messages, their codec, requests, errors, OpenAI's JSON."""
