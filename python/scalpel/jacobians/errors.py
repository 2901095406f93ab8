"""Errors of derivatives, said in terms of the hooks and the operation that caused them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..hooks.grouped import experts_of
from .passes import Pass

__all__ = ["explained"]


@contextmanager
def explained(run: Pass) -> Iterator[None]:
    """Errors of PyTorch's derivative machinery, with the hooks and the operation that caused them named."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        ends = f"between {run.source!r} and {run.target!r}"
        experts = experts_of(run.model)
        if experts is not None:
            raise NotImplementedError(
                f"the forward pass {ends} can't be differentiated, and {experts!r} computes the model's experts, which "
                "may be the reason: choose an implementation of plain PyTorch, such as "
                f"model.set_experts_implementation('batched_mm') ({type(error).__name__}: {error})"
            ) from error
        named = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if named:
            raise NotImplementedError(
                f"the forward pass {ends} uses {named.group(1)}, which PyTorch cannot differentiate forward: "
                "choose hooks that don't enclose it, or replace the operation"
            ) from error
        if "saved tensor hooks" in str(error) or "custom autograd.Function" in str(error):
            raise NotImplementedError(
                f"the forward pass {ends} holds a function with a backward pass of its own, as activation "
                "checkpointing is, and torch.func can't go through it: switch checkpointing off, or choose hooks that "
                f"don't enclose it ({error})"
            ) from error
        if "forward mode AD" in str(error) or "functorch" in str(error) or "vmap" in str(error):
            raise NotImplementedError(
                f"the forward pass {ends} cannot be differentiated for many tangents at once: {error}"
            ) from error
        raise
