"""Thin actors, where a decision meets a socket."""
