"""The understudy command, and what people run."""
