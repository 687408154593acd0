"""Learning the gates: objective, trainer, checkpoints."""
