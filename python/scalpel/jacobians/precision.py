"""Products in the dtype of what is multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["no_autocast"]


@contextmanager
def no_autocast() -> Iterator[None]:
    """Without autocast, on every device that the rules run on."""
    on_gpu = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.autocast("cpu", enabled=False), on_gpu:
        yield
