"""The progress of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

__all__ = ["Bar"]


class Bar:
    """A bar that counts the prompts read, with the largest error beside it; or a function that is called.

    Args:
        progress: Whether there is a bar on a terminal, or the function, which is given the number of prompts read.
        prompts: What the prompts are read from, whose length is the bar's where it has one.
    """

    def __init__(self, progress: bool | Callable[[int], None], prompts: Any) -> None:
        total = len(prompts) if hasattr(prompts, "__len__") and not isinstance(prompts, str) else None
        self._report = progress if callable(progress) else None
        # With disable=None, tqdm shows no bar unless stderr is a terminal.
        self._bar: Any = tqdm(total=total, unit="prompt", disable=None if progress is True else True)
        self._done = 0

    def step(self) -> None:
        """Count a prompt that was read."""
        self._done += 1
        self._bar.update()
        if self._report is not None:
            self._report(self._done)

    def errors(self, errors: dict[Any, float]) -> None:
        """Show the largest of the layers' errors."""
        layer, worst = max(errors.items(), key=lambda item: item[1])
        self._bar.set_postfix_str("" if math.isnan(worst) else f"largest error {worst:.1%} (layer {layer})")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
