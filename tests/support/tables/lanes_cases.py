"""Cases of the rules on lanes, checked against the slow twins on torch's default device."""

from typing import Any

import torch
from torch import Tensor, nn

from scalpel.lanes import LANES, Attention, Lanes, Norm, SparseWeight
from scalpel.reference import lanes as reference_lanes

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


DTYPES = list(TOLERANCE)


def close(found: Tensor, expected: Tensor) -> None:
    """Check that the result is within the dtype's tolerance, relative to the twin's largest entry."""
    assert found.shape == expected.shape
    bound = TOLERANCE[found.dtype] * max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    assert not found.numel() or float((found - expected).abs().max()) <= bound


def index_of(tokens: int, channels: int, entries: int) -> Tensor:
    """Draw some channels of each token, in ascending order."""
    return torch.rand(tokens, channels).argsort(-1)[:, :entries].sort(-1).values.contiguous()


def random_lanes(tokens: int, channels: int, entries: int | None, dtype: torch.dtype) -> Lanes:
    index = None if entries is None else index_of(tokens, channels, entries)
    return Lanes(torch.randn(tokens, channels if entries is None else entries, LANES, dtype=dtype), index, channels)


SOME = (0, 5, LANES - 1)  # the lanes that are compared when a twin is slow


def tangents(lanes: Lanes) -> list[Tensor]:
    return reference_lanes.tangents_of(lanes.values, lanes.index, lanes.channels)


def some(lanes: Lanes) -> list[Tensor]:
    return reference_lanes.tangents_of(lanes.values[..., SOME], lanes.index, lanes.channels)


def sparse_matrix(rows: int, cols: int, density: float, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, cols, dtype=dtype) * (torch.rand(rows, cols) < density)


LINEAR = [  # tokens, rows, cols, density, entries in, entries out
    (5, 30, 20, 0.2, 7, 11),
    (3, 8, 40, 0.5, None, None),
    (4, 16, 16, 0.0, 4, 4),
    (2, 9, 33, 1.0, 33, None),
    (1, 1, 1, 1.0, 1, 1),
    (6, 12, 10, 0.3, 0, 5),
    (6, 12, 10, 0.3, 5, 0),
    (0, 5, 5, 0.5, 2, 2),
    (70, 64, 100, 0.1, 25, 16),
]


def check_linear(shape: tuple[Any, ...], dtype: torch.dtype) -> int:
    """Compare with the twin, and return the number of entries of the product."""
    tokens, rows, cols, density, inside, outside = shape
    weight = sparse_matrix(rows, cols, density, dtype)
    x = random_lanes(tokens, cols, inside, dtype)
    index = None if outside is None else index_of(tokens, rows, outside)
    found = SparseWeight.from_dense(weight).apply(x, index)
    expected = reference_lanes.lanes_of([reference_lanes.linear(weight)(t) for t in tangents(x)], index)
    close(found.values, expected)
    scale = torch.randn(expected.shape[:2], dtype=dtype)
    close(SparseWeight.from_dense(weight).apply(x, index, scale).values, expected * scale[..., None])
    return expected.numel()


def check_layer(tokens: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    weight, bias = sparse_matrix(rows, cols, 0.1, dtype), torch.randn(rows, dtype=dtype)
    x = torch.randn(tokens, cols, dtype=dtype)
    expected = reference_lanes.linear(weight)(x)
    close(SparseWeight.from_dense(weight).forward(x), expected)
    close(SparseWeight.from_dense(weight).forward(x.T.contiguous().T, bias), expected + bias)


def check_rows_and_lanes(count: int, dtype: torch.dtype) -> None:
    for tokens, channels in ((0, 3), (3, 0), (1, 1), (5, 16), (70, 33)):
        rows = torch.randn(count, tokens, channels, dtype=dtype)
        lanes = Lanes.from_rows(rows)
        expected = torch.zeros(tokens, channels, LANES, dtype=dtype)
        expected[..., :count] = rows.permute(1, 2, 0)
        assert torch.equal(lanes.values, expected)
        assert torch.equal(lanes.rows(count), rows)
        assert torch.equal(Lanes.from_rows(rows.transpose(1, 2).contiguous().transpose(1, 2)).values, expected)


NORM = [(1, None), (1, 0), (1, 1), (16, None), (16, 0), (16, 9), (37, None), (37, 1), (37, 9)]  # width, entries


def check_norm(width: int, entries: int | None, centered: bool, dtype: torch.dtype) -> None:
    module: nn.Module = nn.LayerNorm(width) if centered else nn.RMSNorm(width)
    module.to(dtype)
    nn.init.normal_(module.weight)
    x = torch.randn(5, width, dtype=dtype) + 0.5
    norm = Norm.of(module, x)
    eps = torch.finfo(dtype).eps if module.eps is None else module.eps
    twin = reference_lanes.norm(module.weight.detach(), eps, centered)
    moved = random_lanes(5, width, None, dtype)
    index = None if entries is None else index_of(5, width, entries)
    expected = [reference_lanes.jvp(twin, (x,), (t,)) for t in some(moved)]
    close(norm.jvp(moved, index).values[..., SOME], reference_lanes.lanes_of(expected, index))
    u = random_lanes(5, width, entries, dtype)
    out = Lanes(torch.ones(5, width, LANES, dtype=dtype), None, width)
    norm.add_vjp(u, out)
    expected = [reference_lanes.vjp(twin, (x,), t)[0] + 1 for t in some(u)]
    close(out.values[..., SOME], reference_lanes.lanes_of(expected, None))


def check_channels_behind_a_norm_take_no_part() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = Norm.of(nn.LayerNorm(8).double(), x)
    moved = random_lanes(3, 11, None, torch.float64)
    found = norm.padded(11).jvp(moved, None)
    close(found.values[:, :8], norm.jvp(moved.resized(8), None).values)
    assert not found.values[:, 8:].any()
    out = Lanes.zeros(x, 11)
    norm.padded(11).add_vjp(moved, out)
    assert not out.values[:, 8:].any()


def check_gather_and_scatter(dtype: torch.dtype) -> None:
    full = random_lanes(6, 20, None, dtype)
    index = index_of(6, 20, 7)
    expected = reference_lanes.lanes_of(tangents(full), index)
    part = full.at(index)
    assert torch.equal(part.values, expected)
    total = Lanes(full.values.clone(), None, 20)
    total.add(part)
    twice = [a + b for a, b in zip(tangents(full), tangents(part), strict=True)]
    assert torch.equal(total.values, torch.stack(twice, -1))
    rows = torch.stack(tangents(part))
    assert torch.equal(part.rows(LANES), rows)
    assert torch.equal(part.rows(3, torch.tensor([4, 1])), rows[:3, [4, 1]])
    assert torch.equal(Lanes.from_rows(rows).values, part.full().values)


ATTENTION = [  # batch, length, heads, kv_heads, d, sink, density of k and v, entries of q, k, v
    (2, 19, 4, 4, 6, True, 0.5, 9, 7, None),
    (1, 33, 4, 2, 5, False, 1.0, None, None, None),
    (2, 8, 3, 3, 4, True, 0.3, 4, 3, 5),
    (1, 1, 2, 1, 3, False, 1.0, 2, 1, 1),
    (1, 16, 1, 1, 1, True, 1.0, 1, 1, 1),
    (3, 17, 2, 2, 7, False, 0.0, 5, 5, 5),
    (1, 9, 2, 2, 4, True, 0.5, 0, 3, 3),
]


def check_attention(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    batch, length, heads, kv_heads, d, has_sink, density, *entries = shape
    widths = (heads * d, kv_heads * d, kv_heads * d)
    q, k, v = (torch.randn(batch, length, width, dtype=dtype) for width in widths)
    k, v = (part * (torch.rand(part.shape) < density) for part in (k, v))
    sink = torch.randn(heads, dtype=dtype) if has_sink else None
    allowed = torch.ones(batch, length, length, dtype=torch.bool).tril()
    if batch > 1:
        allowed[-1, 1:, 0] = False  # a padding token
    twin = reference_lanes.attend(heads, kv_heads, allowed, sink, 0.7)
    at = Attention(q, k, v, twin(q, k, v).contiguous(), allowed, sink, heads, kv_heads, 0.7)
    tokens = batch * length
    moved = [random_lanes(tokens, w, n, dtype) for w, n in zip(widths, entries, strict=True)]

    def shaped(tangent: Tensor) -> Tensor:
        return tangent.view(batch, length, -1)

    for missing in (None, 0, 1, 2):
        parts = [None if i == missing else part for i, part in enumerate(moved)]
        found = at.jvp(*parts).values[..., SOME]
        rows = [
            [torch.zeros(tokens, w, dtype=dtype)] * len(SOME) if part is None else some(part)
            for part, w in zip(parts, widths, strict=True)
        ]
        for t, inputs in enumerate(zip(*rows, strict=True)):
            expected = reference_lanes.jvp(twin, (q, k, v), tuple(shaped(tangent) for tangent in inputs))
            close(shaped(found[..., t].contiguous()), expected)
    u = random_lanes(tokens, widths[0], None, dtype)
    cotangents = at.vjp(u, *(part.index for part in moved))
    back = [reference_lanes.vjp(twin, (q, k, v), shaped(t)) for t in some(u)]
    for i, (found_part, width) in enumerate(zip(cotangents, widths, strict=True)):
        flat = [cotangent[i].reshape(tokens, width) for cotangent in back]
        close(found_part.values[..., SOME], reference_lanes.lanes_of(flat, found_part.index))


def check_many_keys_and_large_scores() -> None:
    # Scores of ±200, with which an unshifted softmax would overflow, over more keys than a tile and a vector hold.
    q, k, v = (torch.randn(1, 200, 4, dtype=torch.float64) * 10 for _ in range(3))
    allowed = torch.ones(1, 200, 200, dtype=torch.bool).tril()
    twin = reference_lanes.attend(1, 1, allowed, None, 1.0)
    at = Attention(q, k, v, twin(q, k, v), allowed, None, 1, 1, 1.0)
    moved = [random_lanes(200, 4, None, torch.float64) for _ in range(3)]
    found = at.jvp(*moved).values
    expected = reference_lanes.jvp(twin, (q, k, v), tuple(tangents(part)[5][None] for part in moved))
    close(found[None, ..., 5], expected)


def arguments() -> dict[str, Any]:
    weight = SparseWeight.from_dense(torch.eye(4))
    x, out = torch.randn(3, 4, LANES), torch.empty(3, 4, LANES)
    tensors = {"starts": weight.starts, "columns": weight.columns, "weights": weight.weights, "x": x, "out": out}
    return {**tensors, "cols": 4, "x_index": None, "scale": None, "out_index": None}


REFUSED = {
    "dtype": ({"x": torch.zeros(3, 4, LANES).double()}, TypeError, "in is float64; it must be float32"),
    "lanes": ({"x": torch.zeros(3, 4, 8)}, ValueError, r"in has shape \(3, 4, 8\); it must be \(3, 4, 16\)"),
    "tokens": ({"x": torch.zeros(2, 4, LANES)}, ValueError, "in has 2 tokens; it must have 3"),
    "channel": ({"x_index": torch.full((3, 4), 4)}, ValueError, "the index of in holds 4; channels run from 0 to 3"),
    "negative": ({"out_index": torch.full((3, 4), -1)}, ValueError, "the index of out holds -1"),
    "index dtype": ({"x_index": torch.zeros(3, 4)}, TypeError, "the index of in is float32; it must be int64"),
    "strided": ({"x": torch.zeros(3, LANES, 4).mT}, ValueError, "in must be contiguous"),
    "scale": ({"scale": torch.zeros(3, 3)}, ValueError, r"scale has shape \(3, 3\); it must be \(3, 4\)"),
    "starts": ({"starts": torch.tensor([0, 2, 1, 3, 4])}, ValueError, "starts must ascend from 0"),
    "half": ({"out": torch.zeros(3, 4, LANES).half()}, TypeError, "out is float16; allowed: float32, float64"),
    "column": ({"columns": torch.tensor([0, 1, 2, 4]).int()}, ValueError, "column 4; columns run from 0 to 3"),
}
