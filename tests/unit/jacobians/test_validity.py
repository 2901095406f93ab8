"""The distance along a tangent up to which no mask flips, compared with an oracle over every pair of every row."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scalpel
from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from validity_cases import CLOSE, check, flips_of_masks, tangents

jacobian = scalpel.jacobian
MASKED = [
    name
    for name, case in CASES.items()
    if "relu" in case.values() or (case.get("afrac_loctypes") and 0 < (case["afrac"] or 0) < 1)
]


@pytest.mark.parametrize("case", MASKED)
def test_against_every_pair_of_every_row(case: str) -> None:
    model = build(case)
    ids = tokens(model, 2, 4)
    J = jacobian(model, ids, "0.resid_in", "logits")
    V = tangents(J, 2)
    found = [flips_of_masks(model, ids, "0.resid_in", v) for v in V]
    assert all(math.isfinite(min(each)[0]) for each in found)  # confirms that masks flip in this case
    check(J, V, found)


@pytest.mark.parametrize(
    "source", ["0.attn.q", "0.attn.v", "0.resid_mid", "0.mlp.post_act", "1.resid_in", "1.mlp.act_in"]
)
def test_masks_before_the_source_do_not_count(source: str) -> None:
    model = build("topk_everywhere_relu_residual")
    ids = tokens(model, 2, 4)
    J = jacobian(model, ids, source, "logits")
    V = tangents(J, 2)
    check(J, V, [flips_of_masks(model, ids, source, v) for v in V])


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("0.attn.act_in", ["0.attn.act_in"]),
        ("0.attn.q", ["0.attn.act_in", "0.attn.q"]),  # the mask of k comes earlier and is not read
        ("0.attn.k", ["0.attn.act_in", "0.attn.k"]),
        ("0.attn.y", ["0.attn.act_in", "0.attn.q", "0.attn.k", "0.attn.v"]),
        (
            "0.mlp.act_in",
            [*(f"0.attn.{n}" for n in ("act_in", "q", "k", "v", "resid_delta")), "0.resid_post_attn", "0.mlp.act_in"],
        ),
        (("0.attn.q", lambda value: value.sum()), ["0.attn.act_in", "0.attn.q"]),
    ],
)
def test_masks_that_the_target_reads(target: Any, names: list[str]) -> None:
    model = build("topk_everywhere_relu_residual")
    ids = tokens(model, 2, 4)
    J = jacobian(model, ids, "0.resid_in", target)
    V = tangents(J, 6)
    check(J, V, [[each for each in flips_of_masks(model, ids, "0.resid_in", v) if each[1] in names] for v in V])


@pytest.mark.parametrize("ends", [([1], [2]), ([1, 3], [3]), (2, 2), ([3, 0], [1, 2])])
def test_positions(ends: tuple[Any, Any]) -> None:
    """With one layer, only the target's own tokens and attention's keys matter."""
    model = build("topk_everywhere")
    ids = tokens(model, 2, 5)
    J = jacobian(model, ids, "0.resid_in", "1.resid_in", ends)
    V = tangents(J, 4)
    chosen = [ends[1]] if isinstance(ends[1], int) else ends[1]

    def taken(name: str, x: Tensor) -> Tensor:
        rows = torch.zeros(x.shape[:-1], dtype=torch.bool)
        if name in ("0.attn.act_in", "0.attn.k", "0.attn.v"):
            rows[:, : max(chosen) + 1] = True
        elif name.startswith("0."):
            rows[:, chosen] = True
        return rows

    check(J, V, [flips_of_masks(model, ids, "0.resid_in", v, ends[0], taken) for v in V])
    everything = [min(flips_of_masks(model, ids, "0.resid_in", v, ends[0]))[0] for v in V]
    assert not torch.allclose(J.validity_radius(V).radius, torch.tensor(everything, dtype=torch.float64))


def test_a_batch_is_as_valid_as_its_least_valid_row() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 2, 5)
    J = jacobian(model, ids, "0.resid_in", "final_resid")
    V = tangents(J, 6)
    alone = [
        jacobian(model, ids[b : b + 1], "0.resid_in", "final_resid").validity_radius(V[:, b : b + 1]) for b in (0, 1)
    ]
    together = J.validity_radius(V).radius
    torch.testing.assert_close(together, torch.minimum(alone[0].radius, alone[1].radius), **CLOSE)
    assert bool((alone[0].radius != alone[1].radius).all())


def test_padding_and_its_masks() -> None:
    model = build("topk_everywhere")
    ids = tokens(model, 2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    J = jacobian(model, ids, "0.resid_in", "logits", attention_mask=mask)
    V = tangents(J, 2)
    check(J, V, [flips_of_masks(model, ids, "0.resid_in", v, attention_mask=mask) for v in V])


def test_a_token_that_does_not_read_itself() -> None:
    """Token 2 reads only token 0, but it has its own query and its own stream."""
    model = build("topk_everywhere")
    ids = tokens(model, 2, 4)
    mask = torch.ones(2, 4, 4).tril()
    mask[:, 2] = torch.tensor([1, 0, 0, 0])
    J = jacobian(model, ids, "0.resid_in", "1.resid_mid", (None, [2]), attention_mask=mask)
    V = tangents(J, 12)
    read = {"1.attn.q": [2], "1.attn.k": [0], "1.attn.v": [0], "1.attn.resid_delta": [2], "1.resid_post_attn": [2]}
    read |= {"0.attn.k": [0], "0.attn.v": [0]}

    def taken(name: str, x: Tensor) -> Tensor:
        rows = torch.zeros(x.shape[:-1], dtype=torch.bool)
        if name.startswith("0.") or name in read or name == "1.attn.act_in":
            rows[:, read.get(name, [0, 2])] = True
        return rows

    check(J, V, [flips_of_masks(model, ids, "0.resid_in", v, None, taken, attention_mask=mask) for v in V])


def test_ablations_of_the_call_count() -> None:
    model = build("topk_everywhere")
    ids = tokens(model, 1, 4)
    plain = jacobian(model, ids, "0.resid_in", "logits")
    V = tangents(plain, 4)
    with model.ablate(["0.attn.y", "0.mlp.post_act:3"], "zero"):
        J = jacobian(model, ids, "0.resid_in", "logits")
        found = [flips_of_masks(model, ids, "0.resid_in", v) for v in V]
    check(J, V, found)
    assert not torch.allclose(J.validity_radius(V).radius, plain.validity_radius(V).radius)


def test_through_torch_func_as_through_the_rules() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 2, 4)
    J = jacobian(model, ids, "0.resid_in", "logits")
    V = tangents(J)
    with torch_func(model):
        got = jacobian(model, ids, "0.resid_in", "logits").validity_radius(V)
    torch.testing.assert_close(got.radius, J.validity_radius(V).radius, **CLOSE)


def test_the_radius_is_a_length_along_the_tangent() -> None:
    model = build("like_csp_yolo2")
    J = jacobian(model, tokens(model, 1, 5), "0.resid_in", "logits")
    V = tangents(J)
    one, other = J.validity_radius(V), J.validity_radius(-8 * V)
    torch.testing.assert_close(J.validity_radius(8 * V).radius, one.radius / 8, **CLOSE)
    assert bool((other.radius * 8 != one.radius).any())  # the opposite direction has another radius
    assert (one.radius.dtype, one.radius.shape) == (torch.float64, (3,))
    assert (one.verified.dtype, one.flips.dtype) == (torch.bool, torch.bool)


@pytest.mark.parametrize("case", ["plain", "afrac_0", "afrac_1", "afrac_none", "afrac_without_locations"])
def test_no_mask_that_can_flip(case: str) -> None:
    model = build(case)
    J = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits")
    result = J.validity_radius(tangents(J))
    assert result.radius.isinf().all() and result.first == [None] * 3
    assert result.verified.all() and not result.flips.any()


def test_a_zero_tangent_and_none() -> None:
    model = build("topk_everywhere")
    J = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits")
    V = tangents(J)
    V[1] = 0
    result = J.validity_radius(V)
    assert result.radius.isinf().tolist() == [False, True, False]
    assert result.first[1] is None and bool(result.verified[1]) and not bool(result.flips[1])
    none = J.validity_radius(V[:0])
    assert (none.radius.shape, none.first, none.verified.shape, none.flips.shape) == ((0,), [], (0,), (0,))
    same = jacobian(model, tokens(model, 1, 4), "0.resid_in", "0.resid_in")
    assert same.validity_radius(V).radius.isinf().all()
