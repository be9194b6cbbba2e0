"""The actor kit: actors, the loops that drive them, links, mailboxes, clocks, processes."""
