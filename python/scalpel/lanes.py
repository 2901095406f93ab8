"""Tangents sixteen at a time: one value's tangents side by side, and the sublayers' rules on them.

A :class:`Lanes` holds the tangents of a value (N tokens, channels): ``values`` (N, entries, 16) and, where only
some channels of a token can move or are wanted, their ``index`` (N, entries), ascending. The rules call the
native core, whose contract is csrc/jvp/jvp.h; `scalpel.reference.jacobian` has their slow twins.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._native import Memory, core_of, cpu_core, empty, memory_of
from .topk import untraced

__all__ = ["LANES", "Attention", "Lanes", "Linear", "Norm", "SparseWeight", "apply_linear"]

LANES: int = cpu_core.tangent_lanes()

# Where visiting the non-zeros one by one is faster than a dense product, measured on two cores of a Zen 4 against
# its GEMM (2048 x 2048 to 8192 x 2048). Tangents: non-zeros times wanted outputs, as a fraction of all products;
# even at 0.38 for all outputs, and 0.6 of the dense time at 0.25 when a quarter of the outputs is wanted.
SPARSE_BELOW = 0.35
# On a GPU, whose dense products are so much faster. No GPU has been asked: this one is a guess.
SPARSE_BELOW_CUDA = 0.03
# The layer itself: density; even at 0.2 to 0.35. With fewer tokens than lanes, most lanes are idle.
FORWARD_BELOW, FORWARD_BELOW_FEW = 0.3, 0.15


@dataclass
class Lanes:
    """Sixteen tangents of a value: (N, entries, 16), of all ``channels`` or of those in ``index``."""

    values: Tensor
    index: Tensor | None
    channels: int

    @classmethod
    def from_rows(cls, rows: Tensor) -> Lanes:
        """(T <= 16, N, channels) → all channels; the lanes beyond T are zero."""
        rows = rows.resolve_neg().contiguous()
        values = empty((*rows.shape[1:], LANES), rows.dtype, rows.device)
        core, place = core_of(rows)
        core.rows_to_lanes(memory_of(rows, "tangents", rows.device), memory_of(values, "lanes", rows.device), place)
        return cls(values, None, rows.shape[2])

    @classmethod
    def empty(cls, like: Tensor, index: Tensor | None, channels: int) -> Lanes:
        """Not yet written; ``like`` (N, ...) gives tokens and dtype."""
        entries = channels if index is None else index.shape[1]
        return cls(empty((like.shape[0], entries, LANES), like.dtype, like.device), index, channels)

    @classmethod
    def zeros(cls, like: Tensor, channels: int) -> Lanes:
        return cls(empty((like.shape[0], channels, LANES), like.dtype, like.device).zero_(), None, channels)

    def rows(self, count: int, tokens: Tensor | None = None) -> Tensor:
        """The first ``count`` tangents as (count, N, channels), at ``tokens`` only if given."""
        values, index = self.values, self.index
        if tokens is not None:
            values = values[tokens]
            index = None if index is None else index[tokens]
        values = values.contiguous() if index is None else spread(values, index, self.channels)
        rows = empty((count, values.shape[0], self.channels), values.dtype, values.device)
        core, place = core_of(rows)
        core.lanes_to_rows(memory_of(values, "lanes", rows.device), memory_of(rows, "tangents", rows.device), place)
        return rows

    def at(self, index: Tensor) -> Lanes:
        """Those of the channels in ``index``; all channels are there."""
        assert self.index is None
        out = Lanes.empty(self.values, index, self.channels)
        core, place = core_of(index, self.values)
        lanes, to = self._memory(index.device)[0], out._memory(index.device)[0]
        core.gather_lanes(lanes, to, memory_of(index, "an index", index.device), place)
        return out

    def add(self, part: Lanes) -> None:
        """In place; all channels are here."""
        assert self.index is None
        if part.index is None and part.channels < self.channels:
            self.values[:, : part.channels] += part.values
            return
        core, place = core_of(self.values, part.values, part.index)
        on = self.values.device
        core.scatter_lanes(*part._memory(on), self._memory(on)[0], place)

    def restricted(self, index: Tensor | None) -> Lanes:
        """Only the channels in ``index``; these or all are there."""
        return self if index is None or self.index is not None else self.at(index)

    def resized(self, channels: int) -> Lanes:
        """With the last channels cut off, or with more of them, which are zero; all channels are there."""
        if channels == self.channels:
            return self
        if channels < self.channels:
            return Lanes(self.values[:, :channels].contiguous(), None, channels)
        return Lanes(F.pad(self.values, (0, 0, 0, channels - self.channels)), None, channels)

    def full(self) -> Lanes:
        """With all channels."""
        return Lanes(spread(self.values, self.index, self.channels), None, self.channels)

    def _memory(self, on: torch.device) -> tuple[Memory, Memory | None]:
        """Values and index for an op of the device ``on``."""
        return memory_of(self.values, "lanes", on), _maybe(self.index, "an index", on)


def spread(values: Tensor, index: Tensor | None, channels: int) -> Tensor:
    """(N, entries, T) at ``index`` → (N, channels, T), zero elsewhere."""
    if index is None:
        return values
    full = values.new_zeros(values.shape[0], channels, values.shape[2])
    return full.scatter_(1, index[..., None].expand_as(values), values)


# ---- linear layers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseWeight:
    """A matrix (rows, cols) in compressed rows, or some of its rows."""

    starts: Tensor  # (rows + 1,) int64
    columns: Tensor  # (non-zeros,) int32
    weights: Tensor  # (non-zeros,)
    cols: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> SparseWeight:
        """Every entry that isn't zero, NaN included."""
        rows, cols = weight.shape
        where = weight.detach().nonzero()
        counts = torch.bincount(where[:, 0], minlength=rows)
        starts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(counts, 0, out=starts[1:])
        return cls(starts, where[:, 1].to(torch.int32), weight.detach()[where[:, 0], where[:, 1]].contiguous(), cols)

    @property
    def rows(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def density(self) -> float:
        return self.weights.shape[0] / max(1, self.rows * self.cols)

    def apply(self, x: Lanes, index: Tensor | None, scale: Tensor | None = None) -> Lanes:
        """The product, at ``index`` (N, entries) of its rows or at all, times ``scale`` (N, entries)."""
        out = Lanes.empty(x.values, index, self.rows)
        core, place = core_of(out.values, self.weights, x.values, x.index, scale, index)
        on = out.values.device
        core.linear_lanes(*self._matrix(on), *x._memory(on), _maybe(scale, "a scale", on), *out._memory(on), place)
        return out

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, cols) times the transposed matrix, plus bias (rows,): (N, rows), with sixteen tokens in the lanes."""
        x, out = x.contiguous(), empty((x.shape[0], self.rows), x.dtype, x.device)
        core, place = core_of(x, self.weights, bias)
        on = x.device
        given, added, to = memory_of(x, "x", on), _maybe(bias, "the bias", on), memory_of(out, "the product", on)
        core.linear_rows(*self._matrix(on), given, added, to, place)
        return out

    def _matrix(self, on: torch.device) -> tuple[Memory, Memory, Memory, int]:
        starts, columns = memory_of(self.starts, "starts", on), memory_of(self.columns, "columns", on)
        return starts, columns, memory_of(self.weights, "weights", on), self.cols


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``; where nothing is differentiated, by the layer's non-zeros if these are few."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
    plain = plain and x.numel() > 0 and "forward" not in vars(layer) and x.device.type == "cpu"
    if not plain or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64) or not untraced(x):
        return layer(x)
    linear = Linear(layer)
    below = FORWARD_BELOW if x.numel() >= LANES * x.shape[-1] else FORWARD_BELOW_FEW
    if layer.weight.dtype != x.dtype or linear.density() >= below:
        return layer(x)
    return linear.sparse().forward(x.reshape(-1, x.shape[-1]), layer.bias).view(*x.shape[:-1], -1)


_copies: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


class Linear:
    """A layer's weight, or some rows of it, or the transpose of these, as lanes meet it: sparse or dense.

    The sparse copy is made once, and again when the weight has changed. A change of a few entries through
    ``.data``, of which PyTorch keeps no count, is not noticed: write under ``torch.no_grad()`` instead.
    """

    def __init__(self, layer: nn.Linear, rows: slice | None = None, transposed: bool = False) -> None:
        self.layer = layer
        self.rows = rows
        self.transposed = transposed

    def apply(self, x: Lanes, index: Tensor | None, scale: Tensor | None = None) -> Lanes:
        """The product with x at ``index`` (N, entries) of its outputs or at all, times ``scale``."""
        outputs, _ = self.shape
        wanted = 1.0 if index is None else index.shape[1] / outputs
        if self.density() * wanted < (SPARSE_BELOW_CUDA if x.values.is_cuda else SPARSE_BELOW):
            return self.sparse().apply(x, index, scale)
        dense = self.dense() @ x.full().values.permute(1, 0, 2).reshape(x.channels, -1)
        values = dense.view(outputs, -1, LANES).permute(1, 0, 2).contiguous()
        found = Lanes(values, None, outputs)
        found = found if index is None else found.at(index)
        if scale is not None:
            found.values *= scale[..., None]
        return found

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.dense().shape
        return rows, cols

    def dense(self) -> Tensor:
        weight = self.layer.weight.detach()
        weight = weight if self.rows is None else weight[self.rows]
        return weight.T if self.transposed else weight

    def density(self) -> float:
        return self._kept("density", lambda: float(self.dense().count_nonzero()) / max(1, self.dense().numel()))

    def sparse(self) -> SparseWeight:
        """The sparse copy; made once, and again after the weight changed."""
        return self._kept("sparse", lambda: SparseWeight.from_dense(self.dense()))

    def _kept(self, what: str, make: Any) -> Any:
        weight = self.layer.weight.detach()
        version = 0 if weight.is_inference() else weight._version
        mark = (version, weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape))
        # A change through .data leaves no trace but the numbers themselves; some of them are looked at.
        # On a GPU that would be waiting for it; there the weight is held, so that its address stays its own, and what
        # has no count of changes is never kept.
        sample = weight.flatten()[:: max(1, weight.numel() // 256)][: 0 if weight.is_cuda else None]
        kept = _copies.get(self.layer)
        uncounted = weight.is_cuda and weight.is_inference()
        if kept is None or kept["mark"] != mark or uncounted or not torch.equal(kept["sample"], sample):
            kept = {"mark": mark, "sample": sample.clone(), "weight": weight if weight.is_cuda else None}
            _copies[self.layer] = kept
        rows = None if self.rows is None else (self.rows.start, self.rows.stop)
        key = (what, rows, self.transposed)
        if key not in kept:
            kept[key] = make()
            if weight.is_cuda:  # made on this stream, to be read on any
                torch.cuda.current_stream(weight.device).synchronize()
        return kept[key]


# ---- norms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """The primal of RMSNorm or LayerNorm at (N, width): see csrc/jvp/jvp.h."""

    normed: Tensor
    rate: Tensor
    gain: Tensor
    centered: bool
    over: int  # channels that the mean is over

    @classmethod
    def of(cls, module: nn.Module, x: Tensor) -> Norm:
        """At x (N, width)."""
        if isinstance(module, nn.LayerNorm):
            centered, eps = True, module.eps
            moved = x - x.mean(-1, keepdim=True)
        elif isinstance(module, nn.RMSNorm):
            centered, eps = False, torch.finfo(x.dtype).eps if module.eps is None else module.eps
            moved = x
        else:
            raise TypeError(f"{type(module).__name__} is no norm that has a rule; allowed: LayerNorm, RMSNorm")
        rate = (moved.square().mean(-1) + eps).rsqrt()
        gain = module.weight.detach() if module.weight is not None else x.new_ones(x.shape[-1])
        return cls((moved * rate[:, None]).contiguous(), rate.contiguous(), gain.contiguous(), centered, x.shape[-1])

    def padded(self, width: int) -> Norm:
        """For values with channels behind those of the norm, which neither enter nor leave it."""
        more = (0, width - self.gain.shape[0])
        return Norm(F.pad(self.normed, more), self.rate, F.pad(self.gain, more), self.centered, self.gain.shape[0])

    def jvp(self, x: Lanes, index: Tensor | None) -> Lanes:
        out = Lanes.empty(x.values, index, self.gain.shape[0])
        core, place = core_of(out.values, self.normed, x.values, index)
        on = out.values.device
        core.norm_jvp(*self._primal(on), x._memory(on)[0], *out._memory(on), place)
        return out

    def add_vjp(self, u: Lanes, out: Lanes) -> None:
        """The cotangent of the norm's input, added to ``out``."""
        core, place = core_of(out.values, self.normed, u.values, u.index)
        on = out.values.device
        core.norm_vjp(*self._primal(on), *u._memory(on), out._memory(on)[0], place)

    def _primal(self, on: torch.device) -> tuple[Memory, Memory, Memory, bool, int]:
        normed, rate = memory_of(self.normed, "the normed value", on), memory_of(self.rate, "the norm's rate", on)
        return normed, rate, memory_of(self.gain, "the norm's gain", on), self.centered, self.over


# ---- attention ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The primal of causal attention: q, k, v and y (B, L, width), allowed bool (1 or B, L, L)."""

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    allowed: Tensor
    sink: Tensor | None
    heads: int
    kv_heads: int
    scale: float

    def jvp(self, q: Lanes | None, k: Lanes | None, v: Lanes | None) -> Lanes:
        """Tangents of y at all channels; None is zero."""
        width = self.q.shape[-1]
        out = Lanes.empty(self.q.reshape(-1, width), None, width)
        self._call("attention_jvp", q, k, v, out)
        return out

    def vjp(self, u: Lanes, q_index: Tensor | None, k_index: Tensor | None, v_index: Tensor | None) -> list[Lanes]:
        """Cotangents of q, k and v at their indices; u has all channels."""
        tokens = self.q.reshape(-1, self.q.shape[-1])
        found = [
            Lanes.empty(tokens, index, primal.shape[-1])
            for primal, index in ((self.q, q_index), (self.k, k_index), (self.v, v_index))
        ]
        self._call("attention_vjp", found[0], found[1], found[2], u)
        return found

    def _call(self, op: str, q: Lanes | None, k: Lanes | None, v: Lanes | None, y: Lanes) -> None:
        indices = [part.index for part in (q, k, v) if part is not None]
        core, place = core_of(y.values, self.q, self.k, self.v, self.allowed, self.sink, *indices)
        on = y.values.device
        lanes: list[Memory | None] = []
        for part in (q, k, v):
            lanes += (None, None) if part is None else part._memory(on)
        names = ("q", "k", "v", "y", "allowed")
        primal = [memory_of(getattr(self, name), f"attention's {name}", on) for name in names]
        shape = (self.heads, self.kv_heads, self.scale)
        getattr(core, op)(*primal, _maybe(self.sink, "the sink", on), *shape, *lanes, y._memory(on)[0], place)


def _maybe(x: Tensor | None, name: str, on: torch.device) -> Memory | None:
    return None if x is None else memory_of(x, name, on)
