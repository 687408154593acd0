"""What is done with learned gates: circuits, and how good they are."""
