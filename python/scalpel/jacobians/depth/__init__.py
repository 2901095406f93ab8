"""Chains of layers: the singular values of their products at each depth."""

from .spectra import Alignment, Spectra, rank_bound

__all__ = ["Alignment", "Spectra", "rank_bound"]
