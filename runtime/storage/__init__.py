"""What outlives a process: the journal of every admitted request and every token it got."""
