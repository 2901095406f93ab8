"""The figures beside the exponents: growth of the residual, ranks and their intervals, alignment, bounds by TopK."""

import math

import numpy as np
import pytest
import torch

from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from depth_cases import at_tokens, dense_layers, effective_rank, exponents_of, logs, orthogonal, random, stream
from scalpel import lyapunov
from scalpel.jacobians.depth.spectra import Spectra, haar_block, measure_alignment
from scalpel.reference.jacobian import jacobian_dense

pytestmark = pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")


def test_growth_of_the_residual() -> None:
    model = build("plain")
    ids = tokens(model, 2, 5)
    with torch.no_grad():
        _, acts = model.run_with_cache(ids)
    values = [acts[name] for name in stream(model)]
    L = lyapunov(model, ids, 2)
    torch.testing.assert_close(L.log_norms, torch.stack([value.norm().log() for value in values]))
    torch.testing.assert_close(L.log_norms_without_first, torch.stack([value[:, 1:].norm().log() for value in values]))
    growth = math.log(float(values[-1].norm() / values[0].norm())) / 2
    assert abs(L.log_norm_growth - growth) < 1e-12
    torch.testing.assert_close(L.exponents_less_growth, L.exponents - growth)
    rest = math.log(float(values[-1][:, 1:].norm() / values[0][:, 1:].norm())) / 2
    torch.testing.assert_close(L.exponents_less_growth_without_first, L.exponents - rest)
    last = lyapunov(model, ids, 2, positions=-1)
    torch.testing.assert_close(last.log_norms, torch.stack([value[:, -1].norm().log() for value in values]))
    assert torch.equal(last.log_norms, last.log_norms_without_first)
    first = lyapunov(model, ids, 2, positions=0)
    assert first.log_norms_without_first is None and first.exponents_less_growth_without_first is None


@pytest.mark.parametrize("power", [1, 2])
def test_no_tail_leaves_the_certain_interval(power: int) -> None:
    T, size = 4, 20
    of = "singular" if power == 1 else "eigen"
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        head = torch.rand(T, generator=generator, dtype=torch.float64).sort(descending=True)[0] * 7
        spectra = Spectra(head.log()[None], (size,))
        (low, high), (stable_low, stable_high) = spectra.effective_rank(of)[0], spectra.stable_rank()[0]
        for sharp in (0.1, 1, 10):
            tail = head[-1] * torch.rand(size - T, generator=generator, dtype=torch.float64) ** sharp
            s = torch.cat([head, tail])
            assert low <= effective_rank(s, power) <= high
            assert stable_low <= (s**2).sum() / s[0] ** 2 <= stable_high
            # The same with an exactly known energy.
            energy = torch.stack([(tail**2).sum() / s[0] ** 2, torch.tensor(0.0)])[None]
            known = Spectra(head.log()[None], (size,), energy)
            narrow = known.effective_rank(of, certain=False)[0]
            assert low <= narrow[0] <= effective_rank(s, power) <= narrow[1] + 1e-12 and narrow[1] <= high + 1e-12
            assert narrow[1] < high - 0.1 or sharp < 10
            torch.testing.assert_close(known.stable_rank(certain=False)[0], ((s**2).sum() / s[0] ** 2).expand(2))
        # Both bounds are attained.
        torch.testing.assert_close(low, effective_rank(head, power))
        torch.testing.assert_close(high, effective_rank(torch.cat([head, head[-1].expand(size - T)]), power))
    with pytest.raises(ValueError, match="of is 'energy'; allowed: 'singular', 'eigen'"):
        spectra.effective_rank("energy")


@pytest.mark.parametrize("case", ["plain", "topk_resid_post_mlp"])
def test_the_intervals_hold_the_models_ranks(case: str) -> None:
    model = build(case)
    ids = tokens(model, 1, 5)
    L = lyapunov(model, ids, 5, probes=40)
    layers = dense_layers(model, ids, True)
    for spectra, matrices in ((L.layers, layers), (L.cumulative, [layers[0], layers[1] @ layers[0]])):
        for i, matrix in enumerate(matrices):
            s = torch.linalg.svdvals(matrix)
            for certain in (True, False):
                low, high = spectra.effective_rank(certain=certain)[i]
                assert low < effective_rank(s) < high
                low, high = spectra.stable_rank(certain=certain)[i]
                assert low < (s**2).sum() / s[0] ** 2 < high
            assert spectra.stable_rank(certain=False)[i].diff() < spectra.stable_rank()[i].diff()
            true, (mean, error) = (s[5:] ** 2).sum() / s[0] ** 2, spectra.tail_energy[i]
            assert abs(true - mean) < 4 * error and error < mean


def test_alignment_of_known_subspaces() -> None:
    Q = orthogonal(9)
    strong = torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    symmetric = Q @ torch.diag(strong) @ Q.T
    turned = Q @ torch.diag(strong.flip(0)) @ Q.T
    same = exponents_of(3, symmetric, symmetric, turned).alignment
    torch.testing.assert_close(same.overlap, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(same.cosines, torch.tensor([[1.0] * 3, [0.0] * 3]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(same.expected, torch.full((2,), 1 / 3).double())
    # The product of the first two has squared values. The third layer, restricted to its own span, maps them to zero.
    pair = exponents_of(3, symmetric, symmetric)
    torch.testing.assert_close(pair.alignment.exponents, strong[:3].log(), rtol=0, atol=1e-12)
    assert bool((same.exponents == -math.inf).all())
    # Aligned layers stretch more than the same layers with random vectors, and a random product matches the null.
    assert bool((pair.alignment.null_exponents[:, 0] < pair.alignment.exponents[0]).all())


def test_the_null_is_the_product_with_random_singular_vectors() -> None:
    n, depth = 6, 3
    values = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.2], dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    drawn = measure_alignment([(eye, values, eye)] * depth, 1e-14, 400, 0).null_exponents
    direct = []
    for i in range(400):
        turns = [orthogonal(n, seed=1000 + 10 * i + j) for j in range(2)]
        signs = [torch.sign(random(n, seed=5000 + 10 * i + j)) for j in range(2)]
        S = torch.diag(values)
        direct.append(logs(S @ (turns[0] * signs[0]) @ S @ (turns[1] * signs[1]) @ S, n) / depth)
    other = torch.stack(direct)
    error = (drawn.var(dim=0) / 400 + other.var(dim=0) / 400).sqrt()
    assert bool(((drawn.mean(dim=0) - other.mean(dim=0)).abs() < 4 * error).all())
    torch.testing.assert_close(drawn.sum(dim=1), values.log().sum().expand(400), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns", "n"), [(3, 4, 50), (4, 3, 6), (5, 5, 5), (2, 5, 6)])
def test_the_corner_of_a_random_orthogonal_matrix(rows: int, columns: int, n: int) -> None:
    rng = np.random.default_rng(0)
    blocks = np.stack([haar_block(rows, columns, n, rng) for _ in range(4000)])
    assert np.linalg.norm(blocks, 2, axis=(1, 2)).max() <= 1 + 1e-12
    # The moments of the Haar measure are E q² = 1/n, E q⁴ = 3/(n(n + 2)), E q = 0.
    np.testing.assert_allclose((blocks**2).mean(axis=0), 1 / n, atol=0.15 / n)
    np.testing.assert_allclose((blocks**4).mean(), 3 / (n * (n + 2)), rtol=0.1)
    np.testing.assert_allclose(blocks.mean(axis=0), 0, atol=5 / math.sqrt(4000 * n))
    if (rows, columns) == (n, n):
        np.testing.assert_allclose(blocks[0] @ blocks[0].T, np.eye(n), atol=1e-12)


@pytest.mark.parametrize("positions", [None, -1])
def test_rank_bounds_of_topk(positions) -> None:
    # The TopK keeps 4 of 12 channels of the residual stream after each MLP.
    count = 5 if positions is None else 1
    model = build("topk_resid_post_mlp")
    ids = tokens(model, 1, 5)
    L = lyapunov(model, ids, 4, positions=positions)
    assert L.rank_bounds == (4 * count,) * 2 and L.lost == (8 * count,) * 2
    chosen = list(range(5)) if positions is None else [4]
    for layer in dense_layers(model, ids, True):
        assert torch.linalg.matrix_rank(at_tokens(layer, chosen, 5, 12)) <= 4 * count
    assert L.layers.sizes == (4 * count,) * 2
    # For the branches alone, a TopK on the stream gives no bound, but one inside the branches does.
    assert lyapunov(model, ids, 4, positions=positions, identity=False).rank_bounds == (None, None)
    model = build("like_csp_yolo2")  # keeps 3 of 12 channels at attn_in, attn_out, mlp_in and mlp_out
    assert lyapunov(model, ids, 4, positions=positions).rank_bounds == (None, None)
    L = lyapunov(model, ids, 4, positions=positions, identity=False)
    assert L.rank_bounds == (6 * count,) * 2 and L.lost == (6 * count,) * 2
    for layer in dense_layers(model, ids, False):
        assert torch.linalg.matrix_rank(at_tokens(layer, chosen, 5, 12)) <= 6 * count
    assert lyapunov(build("plain"), ids, 2, identity=False).lost == (None, None)


def test_no_bound_is_claimed_where_it_could_be_wrong() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 1, 4)
    with model.ablate(["0.mlp.post_act:0"], kind="zero"):
        assert lyapunov(model, ids, 2, identity=False).rank_bounds == (None, None)
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    assert lyapunov(model, ids, 2, identity=False).rank_bounds == (None, None)
    handle.remove()
    inner = lyapunov(model, ids, 2, hooks=["0.resid_in", "0.resid_mid", "1.resid_mid"])
    assert inner.rank_bounds == (None, None) and inner.hooks == ("0.resid_in", "0.resid_mid", "1.resid_mid")
    P = jacobian_dense(model, ids, "0.resid_in", "1.resid_mid")
    torch.testing.assert_close(inner.log_singular_values, logs(P, 2), rtol=0, atol=1e-10)
    # For the whole stream in one step, the bound is the smallest number that any of its layers keeps.
    topk = build("topk_resid_post_attn")
    assert lyapunov(topk, ids, 2, hooks=["0.resid_in", "final_resid"]).rank_bounds == (16,)
