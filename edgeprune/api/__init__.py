"""What the commands and notebooks call. A command parses its settings, calls this, and prints."""
