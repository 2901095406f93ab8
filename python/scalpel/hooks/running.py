"""Running a user's model in evaluation mode and uncompiled, and leaving it as it was.

A model belongs to its user, who may be using it in another thread. So passes are counted: the first pass that needs a
switch turns it, and the last one turns it back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .grouped import GroupByGroup, groups_in_float64
from .modules import asks_for_gradients

__all__ = ["ALONE", "eager", "evaluating", "running"]

# Held while something is changed that the whole process shares: PyTorch's forward derivatives, of which only one level
# can be open at a time, the choice of the attention backend, or a model's buffers while others stand in for them.
ALONE = threading.RLock()
_lock = threading.Lock()
# Modules that are switched to evaluation mode, and by how many passes.
_evaluated: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_eager_passes = 0
_stance: Any = None


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Enter all that a forward pass of a user's model needs, unless the user calls the model directly."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(eager())
        if asks_for_gradients(model):
            stack.enter_context(_NoRequestsForGradients())
        if groups_in_float64(model):
            stack.enter_context(GroupByGroup())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and fix batch statistics inside the context; afterwards all training flags are as before."""
    held = []
    with _lock:
        for module in model.modules():
            if module.training or module in _evaluated:
                _evaluated[module] = _evaluated.get(module, 0) + 1
                module.training = False
                held.append(module)
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _evaluated[module] -= 1
                if not _evaluated[module]:
                    del _evaluated[module]
                    module.training = True


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules uncompiled inside the context.

    A compiled graph runs no hook that it was not compiled with, and autograd does not see the values inside it.
    """
    global _eager_passes, _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import would take seconds
        yield
        return
    with _lock:
        if _eager_passes == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _eager_passes += 1
    try:
        yield
    finally:
        with _lock:
            _eager_passes -= 1
            if _eager_passes == 0:
                _stance.__exit__(None, None, None)
                _stance = None


class _NoRequestsForGradients(TorchFunctionMode):
    """A mode in which ``requires_grad_`` leaves a tensor as it is.

    Gradient checkpointing calls it on the embeddings' output; products with tangents and cotangents don't need it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            return args[0]
        return func(*args, **(kwargs or {}))
