"""The algebra: counters and what they decide."""

from .threshold import ThresholdCounter

__all__ = ["ThresholdCounter"]
