"""Text of a model to what it means: reasoning, content, calls of tools; one format a file."""
