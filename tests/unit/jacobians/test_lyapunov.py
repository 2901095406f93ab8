"""scalpel.lyapunov against dense decompositions of the whole product, in float64 or with hundreds of digits."""

import math
import warnings
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import decoder_cases
import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from depth_cases import (
    at_tokens,
    dense_layers,
    dense_product,
    effective_rank,
    exponents_of,
    logs,
    network,
    operators,
    orthogonal,
    random,
)
from pairs import pairs
from scalpel import jacobian, lyapunov
from scalpel.jacobians.depth.graded import GradedProduct
from scalpel.jacobians.depth.sweeps import Sweeps, frame_growth
from scalpel.reference.jacobian import jacobian_dense

pytestmark = pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")


CASES = ["plain", "like_csp_yolo2", "topk_resid_post_mlp", "relu_residual", "positions_concatenated"]


@pytest.mark.parametrize(("case", "positions", "identity"), pairs(CASES, [None, -1, slice(1, 4)], [True, False]))
def test_a_circuitgpt_against_its_dense_product(case: str, positions, identity: bool) -> None:
    model, T = build(case), 3
    ids = tokens(model, 2, 5)
    L = lyapunov(model, ids, T, positions=positions, identity=identity)
    layers = dense_layers(model, ids, identity)
    chosen = np.atleast_1d(np.arange(5)[slice(None) if positions is None else positions]).tolist()

    def cut(matrix: Tensor) -> Tensor:
        return at_tokens(matrix, chosen, 5, model.config.d_model)

    P = cut(dense_product(layers))
    torch.testing.assert_close(L.log_singular_values, logs(P, T), rtol=0, atol=1e-10)
    assert torch.equal(L.exponents, L.log_singular_values / 2)
    assert L.depth == 2 and L.converged and bool((L.residual <= 1e-7).all())
    assert L.hooks == ("0.resid_in", "1.resid_in", "final_resid")
    assert L.identity == ("with_identity" if identity else "without_identity")
    assert L.positions == (None if positions is None else tuple(chosen))
    for depth in (1, 2):
        torch.testing.assert_close(L.layer_spectra[depth - 1].log(), logs(cut(layers[depth - 1]), T), rtol=0, atol=1e-9)
        reached = logs(cut(dense_product(layers[:depth])), T)
        torch.testing.assert_close(L.cumulative_spectra[depth - 1].log(), reached, rtol=0, atol=1e-9)
    # The right vectors belong to the product: they are orthonormal, and P v has the expected length.
    assert L.right.shape == (T, 2, len(chosen), model.config.d_model)
    V = L.right.flatten(1)
    torch.testing.assert_close(V @ V.T, torch.eye(T, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close((V @ P.T).norm(dim=1).log(), L.log_singular_values, rtol=0, atol=1e-8)


def test_every_singular_value_of_a_model() -> None:
    model = build("plain")
    ids = tokens(model, 1, 3)
    L = lyapunov(model, ids, 36)
    P = jacobian_dense(model, ids, "0.resid_in", "final_resid")
    torch.testing.assert_close(L.log_singular_values, logs(P, 36), rtol=0, atol=1e-9)
    # All triples of each layer are known, so the layers restricted to them are the layers themselves.
    torch.testing.assert_close(L.alignment.exponents, L.exponents, rtol=0, atol=1e-9)
    torch.testing.assert_close(L.alignment.overlap, torch.ones(1, dtype=torch.float64))
    assert torch.equal(L.alignment.expected, torch.ones(1, dtype=torch.float64))


def test_one_layer_and_float32() -> None:
    model = build("one_layer")
    ids = tokens(model, 1, 4)
    L = lyapunov(model, ids, 4)
    true = logs(jacobian_dense(model, ids, "0.resid_in", "final_resid"), 4)
    torch.testing.assert_close(L.exponents, true, rtol=0, atol=1e-10)
    assert L.alignment.overlap.shape == (0,) and L.depth == 1
    # With one layer there are no singular vectors to draw.
    torch.testing.assert_close(L.alignment.null_exponents, true.expand(16, 4), rtol=0, atol=1e-10)
    single = lyapunov(model.float(), ids, 4)
    assert single.exponents.dtype == torch.float64 and single.right.dtype == torch.float32
    torch.testing.assert_close(single.exponents, true, rtol=0, atol=1e-5)


def test_interventions_count() -> None:
    model = build("plain")
    ids = tokens(model, 1, 4)
    with model.ablate([f"0.mlp.post_act:{i}" for i in range(20)], kind="zero"):
        L = lyapunov(model, ids, 3)
        true = logs(jacobian_dense(model, ids, "0.resid_in", "final_resid"), 3)
    torch.testing.assert_close(L.log_singular_values, true, rtol=0, atol=1e-9)
    assert float((L.exponents - lyapunov(model, ids, 3).exponents).abs().max()) > 1e-3


# ---- products that float64 does not hold -----------------------------------------------------------


@pytest.mark.parametrize(("n", "depth", "T"), [(6, 60, 6), (12, 40, 3)])
def test_values_hundreds_of_orders_apart(n: int, depth: int, T: int) -> None:
    matrices = [random(n, n, seed=i) for i in range(depth)]
    found = Sweeps(operators(matrices), T, 0).solve(1e-7, 200, torch.zeros(n, 0, dtype=torch.float64))
    with mpmath.workdps(400):
        product = mpmath.eye(n)
        for matrix in matrices:
            product = mpmath.matrix(matrix.tolist()) * product
        true = sorted((float(mpmath.log(s)) for s in mpmath.svd_r(product, compute_uv=False)), reverse=True)
    if n == T:
        assert true[0] - true[-1] > 70  # far beyond the precision of float64, 36 nats
    assert found.converged
    torch.testing.assert_close(found.logs, torch.tensor(true[:T], dtype=torch.float64), rtol=0, atol=1e-11)


def test_a_product_beyond_the_range_of_its_dtype() -> None:
    turns = [orthogonal(5, seed=i) for i in range(9)]
    values = torch.tensor([1e50, 3e49, 1e49, 1e48, 1e47], dtype=torch.float64)
    matrices = [turns[i + 1] @ torch.diag(values) @ turns[i].T for i in range(8)]
    L = exponents_of(5, *matrices)  # up to 1e400
    torch.testing.assert_close(L.exponents, values.log(), rtol=0, atol=1e-10)
    assert math.isinf(float(L.cumulative_spectra[-1, 0])) and bool(L.cumulative.log_values.isfinite().all())
    small = exponents_of(5, *(matrix * 1e-100 for matrix in matrices))  # down to 1e-424
    torch.testing.assert_close(small.exponents, values.log() - 100 * math.log(10), rtol=0, atol=1e-10)


def test_layers_that_undo_each_other() -> None:
    steep = torch.diag(10.0 ** -torch.arange(10, dtype=torch.float64))
    back = torch.diag(10.0 ** torch.arange(-9, 1, dtype=torch.float64))
    Q = orthogonal(10)
    L = exponents_of(10, steep @ Q.T, orthogonal(10, seed=1), orthogonal(10, seed=1).T, back)
    # Each of four products and their factors is rounded, with about ten terms each, relative to layers whose ends are
    # 1e9 apart. Without the graded product it would be the square of that, which float64 cannot represent.
    rounding = 4 * 10 * 1e9 * torch.finfo(torch.float64).eps
    expected = torch.full((10,), -9 * math.log(10)).double()
    torch.testing.assert_close(L.log_singular_values, expected, rtol=0, atol=rounding)


def test_a_graded_product_keeps_relative_accuracy() -> None:
    product = GradedProduct(4)
    values = np.array([1.0, 1e-3, 1e-6, 1e-9])
    for i in range(100):
        factor = orthogonal(4, seed=i + 1).numpy() @ np.diag(values) @ orthogonal(4, seed=i).numpy().T
        product.extend(factor, 0.0)
    left, found = product.svd()
    # A stored factor is accurate to eps times its largest value, which is 1e-16 / 1e-9 of its smallest.
    np.testing.assert_allclose(found, 100 * np.log(values), rtol=0, atol=1e-5)
    np.testing.assert_allclose(left.T @ left, np.eye(4), atol=1e-13)
    rng, rising, determinant = np.random.default_rng(0), GradedProduct(6), 0.0
    for _ in range(40):  # later diagonal entries are larger: without pivoting this loses three digits
        factor = np.triu(rng.standard_normal((6, 6)))
        factor[np.diag_indices(6)] = np.exp(2 * rng.standard_normal(6)) * [0.1, 1, 1, 2, 3, 9]
        rising.extend(factor, 0.0)
        determinant += np.log(np.diagonal(factor)).sum()
    assert abs(rising.svd()[1].sum() - determinant) < 1e-10
    triangle = GradedProduct(3)
    exact = np.array([[1.0, 0.5, 0.25], [0.0, 1e-30, 1e-31], [0.0, 0.0, 1e-60]])
    triangle.extend(exact, 0.0)
    assert abs(triangle.svd()[1].sum() - np.log(1e-90)) < 1e-12


def test_zero_singular_values() -> None:
    low = random(8, 3) @ random(3, 8, seed=1)
    L = exponents_of(6, random(8, 8, seed=2), low, random(8, 8, seed=3))
    true = logs(random(8, 8, seed=3) @ low @ random(8, 8, seed=2), 3)
    torch.testing.assert_close(L.log_singular_values[:3], true, rtol=0, atol=1e-9)
    assert bool((L.log_singular_values[3:] == -math.inf).all()) and L.converged
    assert L.layers.zeros.tolist() == [0, 3, 0] and L.cumulative.zeros.tolist() == [0, 3, 3]
    assert not bool(L.exponents.isnan().any()) and bool((L.right[3:].norm(dim=1) == 0).all())
    assert not bool(L.frame_growth.isnan().any()) and bool((L.mean_frame_growth[3:] == -math.inf).all())
    # Where a zero was found no tail remains, so the interval collapses to the true value.
    s = torch.linalg.svdvals(low @ random(8, 8, seed=2))[:3]
    torch.testing.assert_close(L.cumulative.effective_rank()[1], effective_rank(s).expand(2), rtol=0, atol=1e-9)
    nothing = exponents_of(3, random(8, 8), torch.zeros(8, 8).double(), random(8, 8, seed=1))
    assert bool((nothing.exponents == -math.inf).all()) and nothing.converged
    assert nothing.cumulative.effective_rank()[-1].tolist() == [0, 0]
    assert bool((nothing.alignment.null_exponents == -math.inf).all()) and bool(nothing.alignment.overlap.isnan().all())


# ---- how the exponents are computed ----------------------------------------------------------------


def test_one_forward_sweep_is_not_the_answer() -> None:
    J = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    L = exponents_of(2, J, torch.eye(2).double())
    torch.testing.assert_close(L.exponents, torch.tensor([4.0, 1.0]).double().log() / 2, rtol=0, atol=1e-12)
    # A unit vector q other than (1, 0) is stretched to sqrt(16 q₁² + q₂²) < 4.
    q = torch.linalg.qr(random(2, 2))[0][:, 0]
    first = 0.5 * math.log(16 * float(q[0]) ** 2 + float(q[1]) ** 2)
    torch.testing.assert_close(L.frame_growth[0], torch.tensor([first, math.log(4) - first], dtype=torch.float64))
    assert float(L.exponents[0] - L.mean_frame_growth[0]) > 0.1
    # Both agree on the volume.
    torch.testing.assert_close(L.mean_frame_growth.sum(), L.exponents.sum())


def test_frame_growth_is_the_qr_sweep() -> None:
    matrices = [random(7, 7, seed=i) for i in range(5)]
    Q = torch.linalg.qr(random(7, 3, seed=4))[0]
    growth = frame_growth(operators(matrices), 3, seed=4)
    for matrix, row in zip(matrices, growth, strict=True):
        Q, R = torch.linalg.qr(matrix @ Q)
        torch.testing.assert_close(row, R.diagonal().abs().log())
    assert torch.equal(exponents_of(3, *matrices, seed=4).frame_growth, growth)


@pytest.mark.parametrize("ratio", [0.9, 0.95, 0.97])
def test_the_sweeps_converge_alone_and_the_residual_bounds_the_error(ratio: float) -> None:
    n, T = 60, 4
    values = ratio ** torch.arange(n, dtype=torch.float64)
    turns = [orthogonal(n, seed=i) for i in range(4)]
    chain = operators([turns[i + 1] @ torch.diag(values) @ turns[i].T for i in range(3)])
    true = 3 * values[:T].log()
    nowhere = torch.zeros(n, 0, dtype=torch.float64)
    one = Sweeps(chain, T, 0).solve(1e-7, 1, nowhere)
    assert not one.converged
    found = Sweeps(chain, T, 0).solve(1e-7, 200, nowhere)
    assert found.converged and 1 < found.sweeps <= 60
    torch.testing.assert_close(found.logs, true, rtol=0, atol=1e-11)
    for loose in (1e-1, 1e-2, 1e-3):
        rough = Sweeps(chain, T, 0).solve(loose, 200, nowhere)
        assert rough.converged and rough.sweeps <= found.sweeps
        assert float((true - rough.logs).max()) <= loose**2 and float((rough.logs - true).max()) <= 1e-11


def test_it_says_when_it_did_not_converge() -> None:
    model = build("plain")
    ids = tokens(model, 1, 4)
    with pytest.warns(RuntimeWarning, match="stopped after 2 sweeps from '0.resid_in' to 'final_resid'.*max_sweeps"):
        L = lyapunov(model, ids, 3, tol=0.0, max_sweeps=2, cumulative=False)
    assert not L.converged and L.sweeps == 2
    with pytest.warns(RuntimeWarning, match="to 'final_resid'"), pytest.warns(RuntimeWarning, match="to '1.resid_in'"):
        stuck = lyapunov(model, ids, 3, tol=0.0)  # the residual stays at rounding level, whatever the number of sweeps
    assert not stuck.converged and 2 < stuck.sweeps < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert lyapunov(model, ids, 3).converged


def test_the_seed_decides() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 1, 5)
    first, again, other = (lyapunov(model, ids, 4, seed=seed) for seed in (1, 1, 2))
    for name in ("exponents", "right", "frame_growth", "residual"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.alignment.null_exponents, again.alignment.null_exponents)
    assert torch.equal(first.layers.tail_energy, again.layers.tail_energy)
    torch.testing.assert_close(first.exponents, other.exponents, rtol=0, atol=1e-11)
    assert not torch.equal(first.frame_growth, other.frame_growth)
    assert not torch.equal(first.alignment.null_exponents, other.alignment.null_exponents)


def test_without_the_spectra_at_each_depth() -> None:
    model = build("plain")
    ids = tokens(model, 1, 4)
    L, short = lyapunov(model, ids, 3), lyapunov(model, ids, 3, cumulative=False, probes=0, draws=0)
    assert short.cumulative is None and short.cumulative_spectra is None
    assert torch.equal(short.exponents, L.exponents) and short.alignment.null_exponents.shape == (0, 3)
    torch.testing.assert_close(L.cumulative.log_values[-1], L.log_singular_values, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no tail was estimated: ask for probes"):
        short.layers.stable_rank(certain=False)


# ---- arguments -------------------------------------------------------------------------------------


def test_layers_of_different_widths() -> None:
    L = exponents_of(3, random(5, 8), random(9, 5, seed=1), random(4, 9, seed=2))
    P = random(4, 9, seed=2) @ random(9, 5, seed=1) @ random(5, 8)
    torch.testing.assert_close(L.log_singular_values, logs(P, 3), rtol=0, atol=1e-10)
    assert L.layers.sizes == (5, 5, 4) and L.cumulative.sizes == (5, 5, 4)
    assert L.log_norms_without_first is None
    with pytest.raises(ValueError, match="same shape at both ends; '0:in' has .1, 8. and '0' .1, 5.*identity at True"):
        exponents_of(3, random(5, 8), random(9, 5), identity=False)
    with pytest.raises(ValueError, match="positions need values .batch, tokens, width.*leave positions at None"):
        exponents_of(3, random(5, 5), positions=-1)


def test_what_is_refused() -> None:
    model = build("plain")
    ids = tokens(model, 1, 3)
    for T in (0, -2):
        with pytest.raises(ValueError, match=f"T is {T}; it must be 1 or more"):
            lyapunov(model, ids, T)
    with pytest.raises(ValueError, match="T is 37; the layer from '0.resid_in' to '1.resid_in' has 36 .* 1 <= T <= 36"):
        lyapunov(model, ids, 37)
    with pytest.raises(ValueError, match="1 <= T <= 12"):
        lyapunov(model, ids, 13, positions=-1)
    for T in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="T is .*it must be an int"):
            lyapunov(model, ids, T)
    with pytest.raises(ValueError, match="positions is a pair"):
        lyapunov(model, ids, 2, positions=(0, 1))
    with pytest.raises(ValueError, match="chosen position 3 is outside the text of 3 tokens"):
        lyapunov(model, ids, 2, positions=3)
    with pytest.raises(ValueError, match="no layer"):
        lyapunov(build("no_layer"), ids, 2)
    with pytest.raises(ValueError, match="the layers of Sequential are not known: name the hooks"):
        lyapunov(network(random(3, 3))[0], torch.zeros(1, 3), 1)
    with pytest.raises(ValueError, match="at least two hooks, each once"):
        lyapunov(model, ids, 1, hooks=["0.resid_in"])
    with pytest.raises(TypeError, match="it must be a list of hooks' names"):
        lyapunov(model, ids, 1, hooks="0.resid_in")
    with pytest.raises(ValueError, match="no path"):
        lyapunov(model, ids, 1, hooks=["final_resid", "0.resid_in"])
    with pytest.raises(ValueError, match="draws is -1; it must be 0 or more"):
        lyapunov(model, ids, 1, draws=-1)
    with pytest.raises(TypeError, match="bfloat16, whose rounding hides .*model.float"):
        lyapunov(build("plain").bfloat16(), ids, 1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        exponents_of(1, torch.full((8, 8), 1e308, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_the_layers_of_a_decoder_are_known(name: str) -> None:
    pytest.importorskip("transformers")
    model, ids = decoder_cases.model_of(name), decoder_cases.ids_of(1, 5)
    names = ["0.resid_in", "1.resid_in", "2.resid_in", "final_resid"]
    L = lyapunov(model, ids, 3)
    assert L.hooks == tuple(names)
    assert torch.equal(L.exponents, lyapunov(model, ids, 3, hooks=names).exponents)
    layers = [jacobian(model, ids, a, b).to_dense() for a, b in pairwise(names)]
    torch.testing.assert_close(L.log_singular_values, logs(dense_product(layers), 3), rtol=0, atol=1e-8)


def test_it_is_public() -> None:
    assert "lyapunov" in scalpel.__all__ and scalpel.lyapunov is lyapunov


@pytest.mark.parametrize("kind", ["circuitgpt", "decoder"])
def test_the_layers_share_one_forward_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of layer passes grows linearly with the depth; restarting for each layer would make it quadratic."""
    from scalpel.jacobians.entry import jacobians_between
    from scalpel.jacobians.rows import trace as dense_trace
    from scalpel.models.circuitgpt.layers import Block, LayerInputs

    runs: list[int] = []
    if kind == "circuitgpt":
        model, depth = build("plain"), 2
        inner = Block.forward

        def counted(self: Block, x: torch.Tensor, layer: LayerInputs) -> torch.Tensor:
            runs.append(int(layer.name))
            return inner(self, x, layer)

        monkeypatch.setattr(Block, "forward", counted)
    else:
        pytest.importorskip("transformers")
        model, depth = decoder_cases.model_of("llama"), 3
        jacobian(model, torch.zeros(1, 3, dtype=torch.int64))  # the first call compares the model with its rules
        through = dense_trace.through_layer
        monkeypatch.setattr(dense_trace, "through_layer", lambda d, i, *rest: (runs.append(i), through(d, i, *rest))[1])
    ids = torch.randint(0, 11, (1, 5))
    names = [*(f"{i}.resid_in" for i in range(depth)), "final_resid"]
    made = jacobians_between(model, ids, names)
    assert runs == list(range(depth))
    for J, source, target in zip(made, names, names[1:], strict=False):
        alone = jacobian(model, ids, source, target)
        V = torch.randn(2, *J.source_shape, dtype=J.dtype)
        assert torch.equal(J.primal, alone.primal)
        torch.testing.assert_close(J.jvp(V), alone.jvp(V), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(J.vjp(V), alone.vjp(V), rtol=1e-12, atol=1e-12)
