"""How far a tangent flips no mask: against every pair of every row, and against the model run again."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import scalpel
from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from decoder_cases import MODELS
from scalpel.jacobians.operator import Jacobian
from scalpel.jacobians.positions import add_at, select
from scalpel.jacobians.validity import relu_flip, topk_flip
from scalpel.models.mask_watch import watch_masks

jacobian = scalpel.jacobian
CLOSE = {"rtol": 1e-9, "atol": 0.0}
MASKED = [
    name
    for name, case in CASES.items()
    if "relu" in case.values() or (case.get("afrac_loctypes") and 0 < (case["afrac"] or 0) < 1)
]
Taken = Callable[[str, Tensor], Tensor | None]  # rows of a mask that count, of (B, L); None for all


def tangents(J: Jacobian, count: int = 3, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *J.source_shape, generator=generator, dtype=torch.float64).to(J.dtype)


def flip_of_row(x: Tensor, t: Tensor, k: int | None) -> float:
    """Masks between all the steps at which any two entries, or an entry and zero, have one magnitude.

    As there, a step at which all that is not kept goes through zero with something that is kept is a flip too.
    """
    pairs = [-x / t]
    if k is not None:
        for sign in (1, -1):
            pairs.append(((sign * x[:, None] - x) / (t - sign * t[:, None])).flatten())
    steps = torch.cat(pairs)
    steps = torch.cat([steps.new_zeros(1), steps[steps.isfinite() & (steps > 0)]]).sort().values
    steps = steps[torch.cat([torch.tensor([True]), steps.diff() > 1e-12 * steps[1:]])]  # one root, found twice
    between = torch.cat([(steps[1:] + steps[:-1]) / 2, steps[-1:] * 2 + 1])

    def masks(at: Tensor) -> Tensor:
        return at > 0 if k is None else scalpel.topk_mask(at.abs(), k)

    kept = masks(x)
    changed = (masks(x + between[:, None] * t) != kept).any(-1)
    if k is not None and bool(t[~kept].any()):
        there = (x + steps[:, None] * t).abs()
        meet = torch.maximum(there[:, ~kept].amax(-1), there[:, kept].amin(-1)) < 1e-12
        changed |= meet & (steps > 0)
    changed = changed.nonzero()
    return float(steps[changed[0, 0]]) if len(changed) else math.inf


def flips_of_masks(
    model: scalpel.CircuitGPT, ids: Tensor, source: str, v: Tensor, at: Any = None, taken: Any = None, **inputs: Any
) -> list[tuple[float, str]]:
    """(step, name) of each mask after ``source``. Tangents by two passes back, not one forward."""
    chosen = select(at, ids.shape[1], "source")
    seen: list[tuple[str, Tensor, int | None]] = []

    def inputs_of_masks(delta: Tensor) -> tuple[Tensor, ...]:
        seen.clear()

        def tap(name: str, value: Tensor) -> Tensor:
            return add_at(value, delta, chosen) if name == source else value

        with watch_masks(lambda name, x, k: seen.append((name, x, k))):
            model(ids, tap=tap, **inputs)
        return tuple(x + 0 * delta.sum() for _, x, _ in seen)

    moved = torch.autograd.functional.jvp(inputs_of_masks, torch.zeros_like(v), v)[1]
    found = []
    for (name, x, k), t in zip(seen, moved, strict=True):
        rows = None if taken is None else taken(name, x)
        pick = torch.ones(x.shape[:-1], dtype=torch.bool) if rows is None else rows
        steps = [flip_of_row(a, b, k) for a, b in zip(x.detach()[pick], t.detach()[pick], strict=True)]
        found.append((min(steps, default=math.inf), name))
    return found


def check(J: Jacobian, V: Tensor, found: list[list[tuple[float, str]]]) -> None:
    result = J.validity_radius(V)
    least = [min(each, key=lambda pair: pair[0], default=(math.inf, "")) for each in found]
    want = torch.tensor([step for step, _ in least], dtype=torch.float64)
    torch.testing.assert_close(result.radius, want, **CLOSE)
    assert result.first == [None if math.isinf(step) else name for step, name in least]


@pytest.mark.parametrize("case", MASKED)
def test_against_every_pair_of_every_row(case: str) -> None:
    model = build(case)
    ids = tokens(model, 2, 4)
    J = jacobian(model, ids, "0.resid_in", "logits")
    V = tangents(J, 2)
    found = [flips_of_masks(model, ids, "0.resid_in", v) for v in V]
    assert all(math.isfinite(min(each)[0]) for each in found)  # the case has masks that flip
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
        ("0.attn.q", ["0.attn.act_in", "0.attn.q"]),  # k's comes before it and is not read
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
    """One layer, so that beyond attention's keys only the target's own tokens count."""
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
    """Token 2 reads token 0 alone, but is its own query and has its own stream."""
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
    assert bool((other.radius * 8 != one.radius).any())  # the other way is another way
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


@pytest.mark.parametrize("case", ["relu", "topk_everywhere"])
def test_on_a_linear_way_the_model_itself_flips_there(case: str) -> None:
    """To ``attn.v`` from its input nothing is nonlinear but the mask, nor to a ReLU's neurons."""
    model = build(case)
    ids = tokens(model, 2, 4)
    ends = ("0.attn.act_in", "0.attn.v") if case == "topk_everywhere" else ("0.mlp.act_in", "0.mlp.post_act")
    J = jacobian(model, ids, *ends)
    V = tangents(J, 20)
    result = J.validity_radius(V)
    assert result.verified.all() and result.flips.all()

    def support(v: Tensor, step: float) -> Tensor:
        def tap(name: str, value: Tensor) -> Tensor:
            if name == ends[1]:
                kept.append(value != 0)
            return value + step * v if name == ends[0] else value

        kept: list[Tensor] = []
        model(ids, tap=tap)
        return kept[0]

    for v, radius in zip(V, result.radius.tolist(), strict=True):
        primal = support(v, 0.0)
        assert torch.equal(support(v, radius * (1 - 1e-9)), primal)
        assert not torch.equal(support(v, radius * (1 + 1e-9)), primal)


@pytest.mark.parametrize("case", ["relu", "topk_everywhere", "like_csp_yolo2"])
def test_mostly_the_model_run_again_agrees(case: str) -> None:
    model = build(case)
    J = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits")
    V = tangents(J, 20)
    result = J.validity_radius(V)
    assert result.verified.float().mean() >= 0.7 and result.flips.float().mean() >= 0.6

    # what is reported is what the model does: supports beside the radius, by its own hooks
    def masks(step: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        with (
            watch_masks(lambda _, x, k: found.append(x > 0 if k is None else scalpel.topk_mask(x, k))),
            torch.no_grad(),
        ):
            model(tokens(model, 1, 4), tap=lambda name, x: x + step if name == "0.resid_in" else x)
        return found

    primal = masks(torch.zeros_like(V[0]))
    for i, v in enumerate(V):
        for factor, agrees in ((0.99, bool(result.verified[i])), (1.01, not bool(result.flips[i]))):
            again = masks(factor * float(result.radius[i]) * v)
            assert all(map(torch.equal, primal, again)) == agrees


def small_relu(units: list[list[float]], bias: list[float]) -> Jacobian:
    """From a stream (1, 0) through its RMS norm to neurons w·y/√2 + b: straight on, y/√2 is (1, s); in truth it is
    (1, s) / √(1 + s²)."""
    config = {"block_size": 2, "vocab_size": 2, "n_layer": 1, "n_head": 1, "d_model": 2, "d_mlp": len(units)}
    config |= {"rms_norm": True, "activation_type": "relu", "tied_unembed": False}
    model = scalpel.CircuitGPT(scalpel.CircuitGPTConfig.from_dict(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        block = model.transformer.h[0]
        block.ln_2.weight.fill_(1)
        block.mlp.c_fc.weight.copy_(torch.tensor(units, dtype=torch.float64) / math.sqrt(2))
        block.mlp.c_fc.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return jacobian(model, torch.zeros(1, 1, dtype=torch.int64), "0.resid_mid", "0.mlp.post_act")


@pytest.mark.parametrize(
    ("units", "bias", "radius", "verified", "flips"),
    [
        ([[0.0, -1.0]], [0.5], 0.5, True, False),  # s against s/√(1 + s²): the model is slower, flips at 0.58
        ([[1.0, 0.0]], [-0.9], math.inf, False, False),  # a constant against 1/√(1 + s²): flips at 0.48 after all
        ([[1.0, 0.0], [0.0, -1.0]], [-0.9, 0.9], 0.9, False, True),  # both: another mask flips before
        ([[1.0, -2.0]], [0.0], 0.5, True, True),  # without a bias no norm matters
        ([[0.0, 1.0]], [0.0], 0.0, True, False),  # at 0 exactly, and going up
        ([[0.0, -1.0]], [0.0], math.inf, True, False),  # at 0 exactly, and going down
    ],
)
def test_where_straight_on_is_wrong(
    units: list[list[float]], bias: list[float], radius: float, verified: bool, flips: bool
) -> None:
    result = small_relu(units, bias).validity_radius(torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64))
    assert float(result.radius[0]) == pytest.approx(radius, rel=1e-12)
    assert (bool(result.verified[0]), bool(result.flips[0])) == (verified, flips)
    assert result.first == [None if math.isinf(radius) else "0.mlp.post_act"]


@pytest.mark.parametrize(
    ("x", "t", "k", "step"),
    [
        ([3.0, 1.0], [-1.0, 0.0], 1, 2.0),
        ([3.0, 1.0], [0.0, -1.0], 1, 4.0),  # through zero and on
        ([-3.0, 1.0], [1.0, 0.0], 1, 2.0),
        ([3.0, 1.0], [1.0, 1.0], 1, math.inf),
        ([3.0, 1.0], [0.0, 0.0], 1, math.inf),
        ([1.0, 1.0], [0.0, 1.0], 1, 0.0),  # a tie that breaks
        ([1.0, 1.0], [1.0, 0.0], 1, math.inf),  # a tie that opens
        ([1.0, 1.0], [1.0, 1.0], 1, math.inf),  # a tie that stays
        ([1.0, 1.0, 0.5], [-1.0, 1.0, 0.0], 2, 0.5),  # a tie of two that are kept
        ([0.0, 0.0], [0.0, 0.0], 1, math.inf),
        ([0.0, 0.0], [0.0, 1.0], 1, 0.0),
        ([0.0, 0.0], [-2.0, 1.0], 1, math.inf),
        ([0.0, 0.0], [-1.0, 2.0], 1, 0.0),
        ([5.0, 0.0, 0.0], [-1.0, 0.0, 0.0], 2, math.inf),  # through zero, among zeros
        ([0.0, 5.0, 0.0], [0.0, -1.0, 0.0], 1, math.inf),
        ([5.0, 2.0, 1.0, 0.0], [0.0, -1.0, 0.0, 8.0], 2, 2 / 9),  # the nearest in size is not the first
    ],
)
def test_rows(x: list[float], t: list[float], k: int, step: float) -> None:
    X, T = torch.tensor([x], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    assert topk_flip(X, T, k, math.inf) == pytest.approx(step, rel=1e-12)
    assert topk_flip(X, T, k, step / 2) == step / 2 if step < math.inf else True


@pytest.mark.parametrize("values", ["real", "integer", "sparse"])
def test_many_rows(values: str) -> None:
    generator = torch.Generator().manual_seed(1)
    finite = 0
    for trial in range(400):
        n = 2 + trial % 9
        k = 1 + trial % (n - 1)
        x, t = torch.randn(2, 1 + trial % 3, n, generator=generator, dtype=torch.float64)
        if values != "real":
            x, t = (2 * x).round(), (2 * t).round()
        if values == "sparse":
            x, t = x * (x.abs() > 2), t * (t.abs() > 2)
        want = min(flip_of_row(a, b, k) for a, b in zip(x, t, strict=True))
        got = topk_flip(x, t, k, math.inf)
        assert got == pytest.approx(want, rel=1e-9), (x, t, k)
        assert topk_flip(x, t, k, 0.75 * want) == 0.75 * want
        assert relu_flip(x, t, math.inf) == pytest.approx(min(map(flip_of_row, x, t, [None] * len(x))), rel=1e-9)
        finite += math.isfinite(want)
    assert finite > 50


def test_float32_and_inference_mode() -> None:
    model, wide = build("like_csp_yolo2", torch.float32), build("like_csp_yolo2")
    ids = tokens(model, 1, 5)
    J = jacobian(model, ids, "0.resid_in", "logits")
    V = tangents(J, 6)
    for context in (nullcontext(), torch.inference_mode()):
        with context:
            narrow = J.validity_radius(V)
        want = jacobian(wide, ids, "0.resid_in", "logits").validity_radius(V.double()).radius
        torch.testing.assert_close(narrow.radius, want, rtol=1e-2, atol=1e-6)


def test_the_users_own_watch_sees_nothing_of_it() -> None:
    model = build("topk_everywhere")
    J = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits")
    seen: list[str] = []
    with watch_masks(lambda name, x, k: seen.append(name)):
        J.validity_radius(tangents(J))
    assert not seen


def test_compiled_blocks_show_their_masks_too() -> None:
    model = build("topk_everywhere")
    J = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits")
    V = tangents(J)
    want = J.validity_radius(V)
    for block in model.transformer.h:
        block.compile(backend="eager")
    got = jacobian(model, tokens(model, 1, 4), "0.resid_in", "logits").validity_radius(V)
    assert got.radius.isfinite().all() and got.first == want.first
    torch.testing.assert_close(got.radius, want.radius, **CLOSE)


def test_errors() -> None:
    model = build("topk_everywhere")
    ids = tokens(model, 1, 4)
    J = jacobian(model, ids, "0.resid_in", "1.resid_in")
    V = tangents(J)
    J2 = jacobian(model, ids, "1.resid_in", "logits")
    with pytest.raises(ValueError, match=r"of a transpose .* take J itself"):
        J.T.validity_radius(V)
    for composed in (J2 @ J, J @ J.T @ J, (J2 @ J).T.T, (J.T @ J2.T).T):
        with pytest.raises(ValueError, match=r"of a composition .* one scalpel.jacobian"):
            composed.validity_radius(V)
    with pytest.raises(ValueError, match=r"of a composition"):
        (J2 @ J).T.validity_radius(torch.zeros(1, *J2.target_shape, dtype=torch.float64))
    torch.testing.assert_close(J.T.T.validity_radius(V).radius, J.validity_radius(V).radius)
    with pytest.raises(ValueError, match=r"V has shape .*; J.validity_radius takes \(T, 1, 4, 12\)"):
        J.validity_radius(V[0])
    with pytest.raises(TypeError, match="torch.float32; this Jacobian takes torch.float64"):
        J.validity_radius(V.float())
    with pytest.raises(ValueError, match="V holds 1 values that are not finite"):
        J.validity_radius(
            V.index_fill(0, torch.tensor([0]), 0).index_put((torch.tensor([0]),) * 4, torch.tensor(math.nan).double())
        )
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="weights changed"):
        J.validity_radius(V)


@pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")
def test_other_models() -> None:
    ids = torch.arange(4)[None]
    smooth = MODELS["gpt2"]().double().eval()
    J = jacobian(smooth, ids, "0.resid_in", "logits")
    result = J.validity_radius(tangents(J))
    assert result.radius.isinf().all() and result.first == [None] * 3
    assert result.verified.all() and not result.flips.any()
    relu = jacobian(MODELS["gpt2, scores by depth, relu"]().double().eval(), ids, "0.resid_in", "logits")
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel has the activation 'relu'"):
        relu.validity_radius(tangents(relu))
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).double()
    J = jacobian(layers, torch.randn(1, 3, dtype=torch.float64), ":in", "")
    with pytest.raises(NotImplementedError, match="the masks of Sequential cannot be seen"):
        J.validity_radius(tangents(J))
