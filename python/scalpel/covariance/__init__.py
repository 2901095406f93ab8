"""Streaming covariance: exact states and sketches, their spectra, and what is computed from several of them."""

from .streaming import Eigen, StreamingCovariance

__all__ = ["Eigen", "StreamingCovariance"]
