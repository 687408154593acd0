"""The engine: runs a frozen model as a circuit and differentiates it with respect to the gates."""
