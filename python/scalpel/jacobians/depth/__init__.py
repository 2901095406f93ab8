"""Chains of layers: the singular values of their products at each depth."""
