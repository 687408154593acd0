"""What each command does, given its settings: one file a command, one function of that name."""
