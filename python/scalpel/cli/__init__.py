"""The command line: ``scalpel run``, ``scalpel analyze`` and the others."""

from .commands import app, main

__all__ = ["app", "main"]
