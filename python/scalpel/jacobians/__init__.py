"""Jacobians as operators: the entry, the passes and traces behind it, the rules of sublayers, and spectra."""
