"""Streaming covariance: exact states and sketches, their spectra, and measures computed from several of them."""

from .intervals import Interval, leave_one_out
from .similarity import DebiasedCKA
from .streaming import Eigen, StreamingCovariance

__all__ = ["DebiasedCKA", "Eigen", "Interval", "StreamingCovariance", "leave_one_out"]
