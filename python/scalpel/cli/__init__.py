"""The command line: ``scalpel run``, ``scalpel analyze`` and the others."""

from .commands import main

__all__ = ["main"]
