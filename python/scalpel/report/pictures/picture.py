"""One picture of an analysis's page."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Picture"]


@dataclass(frozen=True)
class Picture:
    """``figure``: curves as report/figures.py draws them; ``part``: where on the page it stands."""

    name: str
    part: str
    figure: dict[str, Any]
