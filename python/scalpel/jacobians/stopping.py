"""How a forward pass ends at the hook where nothing more is needed."""

from typing import Any

__all__ = ["Reached"]


class Reached(Exception):
    """Raised at the hook where a pass ends; ``value`` is what was found there."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.value = value
