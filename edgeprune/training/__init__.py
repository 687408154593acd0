"""The training loop, its checkpoints, and where its numbers are shown."""
