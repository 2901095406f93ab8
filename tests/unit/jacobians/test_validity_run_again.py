"""The distance up to which no mask flips, compared with running the model again, row by row; and what is refused."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import scalpel
from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from decoder_cases import MODELS
from scalpel.hooks.masks import watch_masks
from scalpel.jacobians.operator import Jacobian
from scalpel.jacobians.validity import relu_flip, topk_flip
from validity_cases import CLOSE, flip_of_row, tangents

jacobian = scalpel.jacobian


@pytest.mark.parametrize("case", ["relu", "topk_everywhere"])
def test_on_a_linear_way_the_model_itself_flips_there(case: str) -> None:
    """From its input to ``attn.v``, and to the neurons of a ReLU, nothing is nonlinear except the mask."""
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

    # The report matches the model: its own hooks show the supports on both sides of the radius.
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
    """A Jacobian from a stream (1, 0) through its RMS norm to neurons w·y/√2 + b.

    Along the straight line y/√2 is (1, s), but in the model it is (1, s) / √(1 + s²).
    """
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
        ([[0.0, -1.0]], [0.5], 0.5, True, False),  # s versus s/√(1 + s²): the model flips later, at 0.58
        ([[1.0, 0.0]], [-0.9], math.inf, False, False),  # a constant versus 1/√(1 + s²): the model flips at 0.48
        ([[1.0, 0.0], [0.0, -1.0]], [-0.9, 0.9], 0.9, False, True),  # both: another mask flips earlier
        ([[1.0, -2.0]], [0.0], 0.5, True, True),  # without a bias the norm does not matter
        ([[0.0, 1.0]], [0.0], 0.0, True, False),  # exactly 0, and rising
        ([[0.0, -1.0]], [0.0], math.inf, True, False),  # exactly 0, and falling
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
        ([3.0, 1.0], [0.0, -1.0], 1, 4.0),  # through zero and beyond
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
        # The entry nearest in size is not the first to be overtaken.
        ([5.0, 2.0, 1.0, 0.0], [0.0, -1.0, 0.0, 8.0], 2, 2 / 9),
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
