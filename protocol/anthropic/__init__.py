"""Anthropic's Messages API: JSON to a conversation, and an answer's pieces back to JSON."""
