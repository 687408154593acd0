"""Methods that score the edges of a graph. One file per method; `method.py` has the protocol."""
