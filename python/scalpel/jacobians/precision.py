"""The conditions under which a primal and its products are computed: no autocast and no inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["no_autocast", "plain_tensors", "without_gradients"]


@contextmanager
def no_autocast() -> Iterator[None]:
    """Without autocast, on every device that the rules run on: products keep the dtype of their factors."""
    on_gpu = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.autocast("cpu", enabled=False), on_gpu:
        yield


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Out of inference mode, whose tensors cannot be differentiated."""
    with torch.inference_mode(False):
        yield


@contextmanager
def without_gradients() -> Iterator[None]:
    """For the rules: PyTorch records nothing for differentiation, casts nothing and makes plain tensors."""
    with plain_tensors(), torch.no_grad(), no_autocast():
        yield
