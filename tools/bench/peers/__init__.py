"""Other engines on the same weights, each behind the same few calls."""
