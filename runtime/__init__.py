"""The machinery that the actors are made of. Knows no HTTP and starts no process."""
