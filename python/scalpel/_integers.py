"""Integers that a user passes: Python's and NumPy's, and neither booleans nor arrays of one."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

__all__ = ["integer"]


def integer(value: Any, name: str = "k") -> int:
    """Return value as an int if it is an integer of any kind.

    Args:
        value: What the user passed.
        name: What the error calls it.

    Raises:
        TypeError: It is not an integer.
    """
    if not isinstance(value, (bool, np.bool_, np.ndarray, torch.Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be an integer")
