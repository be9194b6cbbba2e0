"""Pure decisions of the supervisor. Time is an argument; nothing here does I/O."""
