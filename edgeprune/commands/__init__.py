"""The commands: each calls the API with its settings and prints the result."""
