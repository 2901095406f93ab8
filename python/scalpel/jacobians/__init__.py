"""Jacobians as operators: the entry, the forward passes behind it, positions, and spectra."""
