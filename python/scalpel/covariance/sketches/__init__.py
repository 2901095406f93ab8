"""Sketches: states of a few directions, a file a kind."""
