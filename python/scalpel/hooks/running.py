"""How a user's model is run: in evaluation mode, as it was written, and left as it was.

A model belongs to its user, who may be using it in another thread. So what has to be switched for a pass is counted:
the first pass that needs it switches, the last one switches back.
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

from .modules import asks_for_gradients

__all__ = ["ALONE", "eager", "evaluating", "running"]

# Held by what is the whole process's and not a thread's: PyTorch's forward derivatives, of which one level can be open
# at a time, the choice of the attention backend, and a model's buffers while others stand in for them.
ALONE = threading.RLock()
_lock = threading.Lock()
_evaluated: WeakKeyDictionary[nn.Module, int] = (
    WeakKeyDictionary()
)  # modules switched to evaluation, by how many passes
_eager_passes = 0
_stance: Any = None


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Around every forward pass of a user's model that is not a plain call of theirs."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(eager())
        if asks_for_gradients(model):
            stack.enter_context(_NoRequestsForGradients())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off and batch statistics are fixed; afterwards every module's training flag is as before."""
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
    """Inside, compiled modules run as they were written. A compiled graph runs no hook that it was not compiled with,
    and its values are not the ones that gradients are asked of."""
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
    """Inside, ``requires_grad_`` leaves a tensor as it is. Gradient checkpointing asks for it at the embeddings, where
    a tangent or a cotangent that passes needs nothing of the kind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            return args[0]
        return func(*args, **(kwargs or {}))
