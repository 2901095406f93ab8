"""Sixteen tangents at a time: their values side by side in vector lanes, and the rules of sublayers on them.

A :class:`Lanes` holds the tangents of a value (N tokens, channels). ``values`` has shape (N, entries, 16). Where only
some channels of a token can move or are wanted, ``index`` (N, entries) names them in ascending order. The rules call
the native core, whose contract is csrc/jvp/jvp.h; `scalpel.reference.jacobian` has their slow twins.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._native import Memory, core_of, cpu_core, empty, memory_of
from ._watching import untraced

__all__ = ["LANES", "Attention", "Lanes", "Linear", "Norm", "SparseWeight", "apply_linear"]

LANES: int = cpu_core.tangent_lanes()

# Below which fraction of products it is faster to visit the non-zeros one by one than to multiply dense matrices,
# measured on two cores of a Zen 4 against its GEMM (2048 x 2048 to 8192 x 2048). For tangents the fraction is that of
# non-zeros times that of wanted outputs: the times are equal at 0.38 for all outputs, and visiting takes 0.6 of the
# dense time at 0.25 when a quarter of the outputs is wanted.
SPARSE_BELOW = 0.35
# On a GPU, where dense products are much faster. This one is a guess that was not measured.
SPARSE_BELOW_CUDA = 0.03
# For the layer itself the fraction is its density: the times are equal at 0.2 to 0.35. With fewer tokens than lanes,
# most lanes are idle.
FORWARD_BELOW, FORWARD_BELOW_FEW = 0.3, 0.15


@dataclass
class Lanes:
    """Sixteen tangents of a value, of all its channels or of some.

    Attributes:
        values: A tensor of shape (N, entries, 16).
        index: The channel of each entry, (N, entries), ascending; None for all channels.
        channels: The number of channels of the value.
    """

    values: Tensor
    index: Tensor | None
    channels: int

    @classmethod
    def from_rows(cls, rows: Tensor) -> Lanes:
        """Put tangents (T <= 16, N, channels) into lanes, of all channels; the lanes beyond T are zero."""
        rows = rows.resolve_neg().contiguous()
        values = empty((*rows.shape[1:], LANES), rows.dtype, rows.device)
        core, place = core_of(rows)
        core.rows_to_lanes(memory_of(rows, "tangents", rows.device), memory_of(values, "lanes", rows.device), place)
        return cls(values, None, rows.shape[2])

    @classmethod
    def empty(cls, like: Tensor, index: Tensor | None, channels: int) -> Lanes:
        """Allocate lanes whose values are not set; ``like`` (N, ...) gives the number of tokens and the dtype."""
        entries = channels if index is None else index.shape[1]
        return cls(empty((like.shape[0], entries, LANES), like.dtype, like.device), index, channels)

    @classmethod
    def zeros(cls, like: Tensor, channels: int) -> Lanes:
        """Make lanes of all channels that are zero; ``like`` (N, ...) gives the number of tokens and the dtype."""
        return cls(empty((like.shape[0], channels, LANES), like.dtype, like.device).zero_(), None, channels)

    def rows(self, count: int, tokens: Tensor | None = None) -> Tensor:
        """Return the first ``count`` tangents as (count, N, channels), for all tokens or only for ``tokens``."""
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
        """Keep the channels in ``index``; these lanes must have all channels."""
        assert self.index is None
        out = Lanes.empty(self.values, index, self.channels)
        core, place = core_of(index, self.values)
        lanes, gathered = self._memory(index.device)[0], out._memory(index.device)[0]
        core.gather_lanes(lanes, gathered, memory_of(index, "an index", index.device), place)
        return out

    def add(self, part: Lanes) -> None:
        """Add other lanes in place; these lanes must have all channels."""
        assert self.index is None
        if part.index is None and part.channels < self.channels:
            self.values[:, : part.channels] += part.values
            return
        core, place = core_of(self.values, part.values, part.index)
        on = self.values.device
        core.scatter_lanes(*part._memory(on), self._memory(on)[0], place)

    def restricted(self, index: Tensor | None) -> Lanes:
        """Keep the channels in ``index`` (None: all); these lanes must have exactly those channels or all of them."""
        return self if index is None or self.index is not None else self.at(index)

    def resized(self, channels: int) -> Lanes:
        """Cut off the last channels, or append channels that are zero; these lanes must have all channels."""
        if channels == self.channels:
            return self
        if channels < self.channels:
            return Lanes(self.values[:, :channels].contiguous(), None, channels)
        return Lanes(F.pad(self.values, (0, 0, 0, channels - self.channels)), None, channels)

    def full(self) -> Lanes:
        """Return lanes of all channels, zero where these lanes have no entry."""
        return Lanes(spread(self.values, self.index, self.channels), None, self.channels)

    def _memory(self, on: torch.device) -> tuple[Memory, Memory | None]:
        """Describe values and index for an op on a device."""
        return memory_of(self.values, "lanes", on), _maybe(self.index, "an index", on)


def spread(values: Tensor, index: Tensor | None, channels: int) -> Tensor:
    """Spread values (N, entries, T) at ``index`` over all channels: (N, channels, T), zero elsewhere."""
    if index is None:
        return values
    full = values.new_zeros(values.shape[0], channels, values.shape[2])
    return full.scatter_(1, index[..., None].expand_as(values), values)


# ---- linear layers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseWeight:
    """A matrix (rows, cols), or some of its rows, in compressed sparse row format."""

    starts: Tensor  # (rows + 1,) int64
    columns: Tensor  # (non-zeros,) int32
    weights: Tensor  # (non-zeros,)
    cols: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> SparseWeight:
        """Keep every entry that is not zero, including NaN."""
        rows, cols = weight.shape
        where = weight.detach().nonzero()
        counts = torch.bincount(where[:, 0], minlength=rows)
        starts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(counts, 0, out=starts[1:])
        return cls(starts, where[:, 1].to(torch.int32), weight.detach()[where[:, 0], where[:, 1]].contiguous(), cols)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.starts.shape[0] - 1

    @property
    def density(self) -> float:
        """The fraction of entries that are stored."""
        return self.weights.shape[0] / max(1, self.rows * self.cols)

    def apply(self, x: Lanes, index: Tensor | None, scale: Tensor | None = None) -> Lanes:
        """Multiply lanes by the matrix, for all rows or those in ``index``, times ``scale`` (both (N, entries))."""
        out = Lanes.empty(x.values, index, self.rows)
        core, place = core_of(out.values, self.weights, x.values, x.index, scale, index)
        on = out.values.device
        core.linear_lanes(*self._matrix(on), *x._memory(on), _maybe(scale, "a scale", on), *out._memory(on), place)
        return out

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x (N, cols) by the transposed matrix and add bias (rows,), sixteen tokens at a time: (N, rows)."""
        x, out = x.contiguous(), empty((x.shape[0], self.rows), x.dtype, x.device)
        core, place = core_of(x, self.weights, bias)
        on = x.device
        rows, added, product = memory_of(x, "x", on), _maybe(bias, "the bias", on), memory_of(out, "the product", on)
        core.linear_rows(*self._matrix(on), rows, added, product, place)
        return out

    def _matrix(self, on: torch.device) -> tuple[Memory, Memory, Memory, int]:
        starts, columns = memory_of(self.starts, "starts", on), memory_of(self.columns, "columns", on)
        return starts, columns, memory_of(self.weights, "weights", on), self.cols


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute ``layer(x)``, through the layer's non-zeros if they are few and nothing is differentiated."""
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
    """A linear layer's weight as lanes meet it, sparse or dense: all of it, some rows, or the transpose of these.

    The sparse copy is made once, and again when the weight has changed. PyTorch does not count changes made through
    ``.data``, so such a change of only a few entries is not noticed: write under ``torch.no_grad()`` instead.
    """

    def __init__(self, layer: nn.Linear, rows: slice | None = None, transposed: bool = False) -> None:
        self.layer = layer
        self.rows = rows
        self.transposed = transposed

    def apply(self, x: Lanes, index: Tensor | None, scale: Tensor | None = None) -> Lanes:
        """Multiply lanes by the weight, for all outputs or those at ``index`` (N, entries), times ``scale``."""
        outputs, _ = self.shape
        wanted = 1.0 if index is None else index.shape[1] / outputs
        if self.density() * wanted < (SPARSE_BELOW_CUDA if x.values.is_cuda else SPARSE_BELOW):
            return self.sparse().apply(x, index, scale)
        dense = self.dense() @ x.full().values.permute(1, 0, 2).reshape(x.channels, -1)
        values = dense.view(outputs, -1, LANES).permute(1, 0, 2).contiguous()
        product = Lanes(values, None, outputs)
        product = product if index is None else product.at(index)
        if scale is not None:
            product.values *= scale[..., None]
        return product

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        rows, cols = self.dense().shape
        return rows, cols

    def dense(self) -> Tensor:
        """Return the dense matrix, which shares the layer's memory."""
        weight = self.layer.weight.detach()
        weight = weight if self.rows is None else weight[self.rows]
        return weight.T if self.transposed else weight

    def density(self) -> float:
        """Return the fraction of entries that are not zero."""
        return self._kept("density", lambda: float(self.dense().count_nonzero()) / max(1, self.dense().numel()))

    def sparse(self) -> SparseWeight:
        """Return the sparse copy, which is made again after the weight has changed."""
        return self._kept("sparse", lambda: SparseWeight.from_dense(self.dense()))

    def _kept(self, what: str, make: Any) -> Any:
        weight = self.layer.weight.detach()
        version = 0 if weight.is_inference() else weight._version
        mark = (version, weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape))
        # A change through .data leaves no trace but the numbers themselves, so some of them are compared. On a GPU that
        # would mean waiting for it. There the weight itself is kept, so that its address is not reused, and nothing is
        # kept for a weight whose changes are not counted.
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
            if weight.is_cuda:  # made on this stream, but any other stream may read it
                torch.cuda.current_stream(weight.device).synchronize()
        return kept[key]


# ---- norms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """The primal of RMSNorm or LayerNorm at values of shape (N, width); see csrc/jvp/jvp.h."""

    normed: Tensor
    rate: Tensor
    gain: Tensor
    centered: bool
    over: int  # how many channels the mean is taken over

    @classmethod
    def of(cls, module: nn.Module, x: Tensor) -> Norm:
        """Compute the primal of a norm at x (N, width).

        Raises:
            TypeError: If the module is not a norm that has a rule.
        """
        if isinstance(module, nn.LayerNorm):
            centered, eps = True, module.eps
            moved = x - x.mean(-1, keepdim=True)
        elif isinstance(module, nn.RMSNorm):
            centered, eps = False, torch.finfo(x.dtype).eps if module.eps is None else module.eps
            moved = x
        else:
            raise TypeError(f"{type(module).__name__} is not a norm that has a rule; allowed: LayerNorm, RMSNorm")
        rate = (moved.square().mean(-1) + eps).rsqrt()
        gain = module.weight.detach() if module.weight is not None else x.new_ones(x.shape[-1])
        return cls((moved * rate[:, None]).contiguous(), rate.contiguous(), gain.contiguous(), centered, x.shape[-1])

    def padded(self, width: int) -> Norm:
        """Extend the norm to values with further channels, which it neither reads nor writes."""
        more = (0, width - self.gain.shape[0])
        return Norm(F.pad(self.normed, more), self.rate, F.pad(self.gain, more), self.centered, self.gain.shape[0])

    def jvp(self, x: Lanes, index: Tensor | None) -> Lanes:
        """Push tangents through the norm, at all channels or at those in ``index``."""
        out = Lanes.empty(x.values, index, self.gain.shape[0])
        core, place = core_of(out.values, self.normed, x.values, index)
        on = out.values.device
        core.norm_jvp(*self._primal(on), x._memory(on)[0], *out._memory(on), place)
        return out

    def add_vjp(self, u: Lanes, out: Lanes) -> None:
        """Pull cotangents back through the norm and add the result to ``out``."""
        core, place = core_of(out.values, self.normed, u.values, u.index)
        on = out.values.device
        core.norm_vjp(*self._primal(on), *u._memory(on), out._memory(on)[0], place)

    def _primal(self, on: torch.device) -> tuple[Memory, Memory, Memory, bool, int]:
        normed, rate = memory_of(self.normed, "the normed value", on), memory_of(self.rate, "the norm's rate", on)
        return normed, rate, memory_of(self.gain, "the norm's gain", on), self.centered, self.over


# ---- attention ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The primal of causal attention: q, k, v and y are (B, L, width), allowed is bool (1 or B, L, L)."""

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
        """Push tangents of q, k and v through attention to all channels of y; None stands for zero."""
        width = self.q.shape[-1]
        out = Lanes.empty(self.q.reshape(-1, width), None, width)
        self._call("attention_jvp", q, k, v, out)
        return out

    def vjp(self, u: Lanes, q_index: Tensor | None, k_index: Tensor | None, v_index: Tensor | None) -> list[Lanes]:
        """Pull cotangents of y back to q, k and v at their indices; ``u`` must have all channels."""
        tokens = self.q.reshape(-1, self.q.shape[-1])
        cotangents = [
            Lanes.empty(tokens, index, primal.shape[-1])
            for primal, index in ((self.q, q_index), (self.k, k_index), (self.v, v_index))
        ]
        self._call("attention_vjp", cotangents[0], cotangents[1], cotangents[2], u)
        return cotangents

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
