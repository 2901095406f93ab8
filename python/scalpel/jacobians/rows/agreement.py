"""Whether a model computes what the rules of its family say: its own forward pass beside ours, on part of a text.

Modules may have been replaced, switches set and code put in place of transformers' own; the logits show it, wherever
it happened. Both forward passes run on a few of the text's tokens. Beside the primal of a long text that is little;
beside that of a short one it is not, since each pass reads all of the weights.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.adapters import without_cache
from ...hooks.inputs import Inputs
from ...hooks.running import running
from ...models.decoders.decoder import Decoder
from ...models.decoders.families import marks_of
from .primal import Text
from .trace import DenseTrace

__all__ = ["difference"]

_ENDS = 7  # tokens at the beginning and at the end of the text that are compared
_BEYOND = 8  # tokens that follow the first one that a window hides
_LIBRARIES = ("torch", "transformers", "accelerate")  # their code treats all positions alike, windows apart

# transformers' RMSNorm rounds to float32 in float64 too; in bfloat16 it rounds every value, where ours keep float32.
_AGREE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}

_compared: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def difference(model: nn.Module, decoder: Decoder, inputs: Inputs) -> str | None:
    """Say where the model's own forward pass is not the family's, as after a part of it was replaced; None if it is.

    It is compared once for a model, and again after a module, a switch or the config has changed. What is compared:

    - of a text that is longer, 14 of its tokens, seven at either end at the positions that they have in the text, and
      with padding its outermost tokens, too; of a batch, the row with most padding;
    - of a text that is longer than a window of attention, as many of its last tokens as show what the window hides,
      instead of its last seven;
    - all of the batch, where something may treat one token or row unlike another: where the model's modules are not
      those that its class builds of its config, where a class, a method or a function of its code is neither PyTorch's
      nor transformers', or where an embedding changes its weights as it runs (``max_norm``).

    It can't see what changes nothing there: an edit that this text doesn't reach, such as a window longer than it; and
    code that says it is transformers' own and treats tokens in the middle of a long text in another way.
    """
    marks = marks_of(model)
    if _compared.get(model) == marks:
        return None
    if _is_as_built(model) and _runs_library_code(model):
        inputs = _part(inputs, _windows(model, decoder))
    keywords = inputs.keywords() | without_cache(model)
    try:
        with running(model):
            output = model(**keywords)
    except Exception as raised:  # whatever an edited model raises; torch.func will raise it where it is seen
        return f"its own forward pass raises {type(raised).__name__}: {raised}"
    trace = DenseTrace(decoder, Text.of(inputs), ["logits"]).run()
    assert trace.final is not None
    ours = trace.final[0].value() if decoder.headless else trace.values["logits"]
    own: Tensor = (output.last_hidden_state if decoder.headless else output.logits).to(ours.dtype)
    if inputs.mask is not None:
        real = inputs.mask.bool()
        ours, own = ours[real], own[real]
    if bool(own.isnan().any()) and bool(ours.isnan().any()):
        return None
    error = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-30)) if ours.shape == own.shape else math.inf
    if not error <= _AGREE[next(model.parameters()).dtype]:
        return f"its own forward pass is not that of its family: its output differs by {error:.1e} of the largest"
    _compared[model] = marks
    return None


def _part(inputs: Inputs, windows: list[int]) -> Inputs:
    """The tokens that are compared, of one row; the inputs as they are where that would not make them shorter."""
    text = Text.of(inputs)
    length = text.ids.shape[1]
    row, real = 0, torch.arange(length, device=text.ids.device)
    if text.real is not None:
        counts = text.real.sum(-1)
        row = int(torch.where(counts > 0, counts, length + 1).argmin())
        real = text.real[row].nonzero()[:, 0]
    crossed = [window for window in windows if window < len(real)]
    tail = max(crossed) + _BEYOND if crossed else _ENDS
    chosen = torch.cat([real[:_ENDS], real[-tail:]])
    if text.real is not None:
        padding = (~text.real[row]).nonzero()[:, 0]
        chosen = torch.cat([chosen, padding[:1], padding[-1:]])
    columns = chosen.unique()  # in order, each once
    if len(columns) >= length:
        return inputs
    positions = text.positions[row if len(text.positions) > 1 else 0, columns][None]
    # The mask says that the tokens are one text, though their positions may jump.
    mask = torch.ones_like(columns) if text.real is None else text.real[row, columns].to(columns.dtype)
    return Inputs(text.ids[row, columns][None], mask[None], positions)


def _windows(model: nn.Module, decoder: Decoder) -> list[int]:
    """Every number of tokens that a layer, a module or the config may limit attention to."""
    windows = [decoder.config.window(i) for i in range(decoder.config.layers)]
    for holder in (model.config, *model.modules()):
        numbers = ((name, value) for name, value in vars(holder).items() if type(value) is int)
        windows += [value for name, value in numbers if name.endswith(("window", "window_size"))]
    return [window for window in windows if window is not None]


def _is_as_built(model: Any) -> bool:
    """Whether the modules are those that the model's class builds of its config, and none changes its weights."""
    try:
        with torch.device("meta"):  # shapes only
            built = type(model)(model.config)
    except Exception:  # whatever an edited config leads to
        return False
    kinds = [(name, type(module)) for name, module in built.named_modules()]
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    unchanged = all(embedding.max_norm is None for embedding in embeddings)
    return unchanged and kinds == [(name, type(module)) for name, module in model.named_modules()]


def _runs_library_code(model: Any) -> bool:
    """Whether the code that the model runs comes from PyTorch, transformers or accelerate, as far as it says."""
    files = {sys.modules.get(type(module).__module__) for module in model.modules()}
    functions = [value for file in files for value in vars(file or object).values() if isinstance(value, FunctionType)]
    functions += _attention_functions(model)
    names = [name for module in model.modules() for name in _origins(module)]
    names += [name for function in functions for name in _written_in(function)]
    return all(name.partition(".")[0] in (*_LIBRARIES, *sys.stdlib_module_names) for name in names)


def _attention_functions(model: Any) -> list[Any]:
    """The function that computes attention in the model, and the one that makes its masks, where there are some."""
    kind = getattr(model.config, "_attn_implementation", None)
    places = ("modeling_utils", "ALL_ATTENTION_FUNCTIONS"), ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")
    tables: list[Any] = [getattr(sys.modules.get(f"transformers.{file}"), name, {}) for file, name in places]
    return [table[kind] for table in tables if kind in table]


def _origins(module: nn.Module) -> Iterator[str]:
    """The modules of Python in which the class of ``module`` and its forward pass were written."""
    yield type(module).__module__
    for function in (type(module).__call__, type(module).forward, *_own_methods(module)):
        yield from _written_in(function)


def _own_methods(module: nn.Module) -> list[Any]:
    """What was put in place of methods on the module itself, such as ``forward`` and ``_call_impl``."""
    return [value for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)]


def _written_in(function: Any) -> Iterator[str]:
    """The modules of Python in which a function, and whatever it wraps, was written."""
    while function is not None:
        function = getattr(function, "func", function)  # what accelerate makes a partial function of
        function = getattr(function, "__func__", function)
        yield getattr(function, "__globals__", {}).get("__name__", "unknown")
        function = getattr(function, "__wrapped__", None)
