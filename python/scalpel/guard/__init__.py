"""A safeguard beside a model: how far a prompt is from where a law predicts that the answer fails."""

from .hole_guard import Distance, FailureLaw, HoleGuard, HoleReached, open_lists

__all__ = ["Distance", "FailureLaw", "HoleGuard", "HoleReached", "open_lists"]
