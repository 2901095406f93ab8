"""Products of layers at chosen depths, searched with one basis, against dense decompositions in float64."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from circuitgpt_cases import one_thread  # noqa: F401
from depth_cases import dense_product, exponents_of, logs, network, operators, orthogonal, random
from scalpel import lyapunov
from scalpel.jacobians.depth.products import depths_of, layer_triples, measure_products
from scalpel.jacobians.operator import Jacobian

pytestmark = pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")

N = 300  # dimensions from which on a search is used instead of a dense decomposition


def layer(seed: int, n: int = N) -> Tensor:
    """A matrix near the identity with some strong directions, as a layer with a residual path."""
    strong = random(n, 6, seed=1000 + seed) @ torch.diag(torch.linspace(3, 1, 6).double()) @ random(6, n, seed=seed)
    return torch.eye(n, dtype=torch.float64) + (random(n, n, seed=2000 + seed) / 3 + strong / 20) / n**0.5


class Counted:
    """The tangents and cotangents that go through operators, as long as the test lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vectors = 0
        for name in ("jvp", "vjp"):
            real = getattr(Jacobian, name)
            monkeypatch.setattr(Jacobian, name, lambda J, V, real=real: (self._count(V), real(J, V))[1])

    def _count(self, V: Tensor) -> None:
        self.vectors += len(V)


@pytest.mark.parametrize("positions", [None, slice(2, 6)])
def test_spectra_at_chosen_depths_are_those_of_dense_products(positions, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [layer(i) for i in range(6)]
    monkeypatch.setattr("scalpel.jacobians.depth.products.is_small", lambda shape, k: False)
    if positions is None:
        L = exponents_of(5, *matrices, cumulative=[1, 4])
        chosen = torch.ones(N, dtype=torch.bool)
    else:  # the same matrices on 10 tokens of width 30
        layers = [
            Jacobian(
                lambda V, J=J: J.jvp(V.reshape(-1, 1, N)).reshape(-1, 1, 10, 30),
                lambda U, J=J: J.vjp(U.reshape(-1, 1, N)).reshape(-1, 1, 10, 30),
                *(_end(f"{i + k}", (1, 10, 30)) for k in range(2)),
            )
            for i, J in enumerate(operators(matrices))
        ]
        found = measure_products(layers, (2, 3, 4, 5), True, 5, [1, 4, 6], seed=0, goal=1e-7, most=200)
        chosen = torch.zeros(10, 30, dtype=torch.bool)
        chosen[positions] = True
        chosen = chosen.flatten()
    for i, depth in enumerate((1, 4, 6)):
        P = dense_product(matrices[:depth])[chosen][:, chosen]
        values = L.cumulative.log_values[i] if positions is None else found[i].logs
        torch.testing.assert_close(values, logs(P, 5), rtol=0, atol=1e-10)
    if positions is not None:
        return
    assert L.depths == (1, 4, 6) and L.converged and bool((L.cumulative_residual <= 1e-7).all())
    torch.testing.assert_close(L.log_singular_values, L.cumulative.log_values[-1], rtol=0, atol=0)
    V = L.right.flatten(1)
    torch.testing.assert_close(V @ V.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close((V @ dense_product(matrices).T).norm(dim=1).log(), L.log_singular_values)
    for i, matrix in enumerate(matrices):
        torch.testing.assert_close(L.layers.log_values[i], logs(matrix, 5), rtol=0, atol=1e-10)
        s = torch.linalg.svdvals(dense_product(matrices[: i + 1]))
        if i + 1 in L.depths:
            mean, error = L.cumulative.tail_energy[L.depths.index(i + 1)]
            assert abs((s[5:] ** 2).sum() / s[0] ** 2 - mean) < 4 * error and error < mean


def _end(hook: str, shape: tuple[int, ...]):
    from scalpel.jacobians.ends import End

    return End(None, hook, None, None, torch.zeros(shape, dtype=torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("tol", [3e-2, 1e-3])
def test_the_residual_bounds_the_error(tol: float) -> None:
    matrices = [layer(i) for i in range(5)]
    found = measure_products(operators(matrices), None, True, 6, [2, 5], seed=1, goal=tol, most=200)
    for product in found:
        P = dense_product(matrices[: product.depth])
        true = torch.linalg.svdvals(P)
        assert product.converged and float(product.residual[-1]) <= tol
        assert product.left is not None
        V = product.right.flatten(1)
        residual = P.T @ product.left - V.T * product.logs.exp()
        expected = (residual.norm(dim=0) / product.logs.exp()).square().cumsum(0).sqrt()
        # what the search says is what products with the dense matrix give, or a little more
        torch.testing.assert_close(product.residual, expected, rtol=0.2, atol=tol / 4)
        assert bool((product.residual >= expected * (1 - 1e-9)).all())
        nearest = (true[None] - product.logs.exp()[:, None]).abs().min(dim=1).values
        assert bool((nearest <= product.residual * product.logs.exp()).all())
        assert float((product.logs - true[:6].log()).abs().max()) <= tol**2


def test_the_work_grows_as_the_depths_and_not_as_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    matrices = [layer(i) for i in range(12)]
    counts = {}
    for depths in (3, 12):
        counted.vectors = 0
        exponents_of(4, *matrices, cumulative=depths, tol=1e-2, probes=0)
        counts[depths] = counted.vectors
    # Nine more products, of 54 layers together, cost at most what their own few directions need. One that began again
    # at the first layer would push its basis of a hundred directions through all of its layers.
    assert counts[12] - counts[3] <= 40 * (sum(range(1, 13)) - (4 + 8 + 12))
    alone = operators(matrices)
    counted.vectors = 0
    for depth in (2, 5, 9):
        measure_products(alone, None, True, 4, [depth], seed=0, goal=1e-2, most=200)
    from_scratch = counted.vectors
    counted.vectors = 0
    measure_products(alone, None, True, 4, [2, 5, 9], seed=0, goal=1e-2, most=200)
    assert counted.vectors < 0.9 * from_scratch


def test_equal_singular_values_are_all_found() -> None:
    turns = [orthogonal(N, seed=i) for i in range(2)]
    values = torch.cat([torch.full((14,), 4.0), torch.linspace(2, 0.5, N - 14)]).double()
    (J,) = operators([turns[1] @ torch.diag(values) @ turns[0].T])
    found = layer_triples(J, 16, 0, 1e-7)
    torch.testing.assert_close(found.S, values[:16], rtol=1e-10, atol=0)
    assert found.converged and found.U.shape == (N, 16) and found.Vh.shape == (16, N)


def test_values_too_far_apart_are_left_to_the_sweeps() -> None:
    turns = [orthogonal(N, seed=i) for i in range(4)]
    values = torch.cat([10.0 ** -torch.arange(6), torch.full((N - 6,), 1e-7)]).double()
    matrices = [turns[i + 1] @ torch.diag(values) @ turns[i].T for i in range(3)]  # down to 1e-15
    L = exponents_of(6, *matrices)
    torch.testing.assert_close(L.log_singular_values, 3 * values[:6].log(), rtol=0, atol=1e-6)
    assert L.converged
    huge = exponents_of(3, *(matrix * 1e120 for matrix in matrices))  # beyond the range of float64
    torch.testing.assert_close(huge.exponents, values[:3].log() + 120 * math.log(10), rtol=0, atol=1e-9)


def test_what_did_not_converge_is_said() -> None:
    matrices = [layer(i) for i in range(3)]
    with pytest.warns(RuntimeWarning, match="stopped after 2 sweeps from '0:in' to '2'"):
        L = exponents_of(5, *matrices, cumulative=False, max_sweeps=2)
    assert not L.converged and float(L.residual[-1]) > 1e-7 and L.depths == () and L.cumulative_residual is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert exponents_of(5, *matrices).converged


def test_which_depths() -> None:
    assert depths_of(True, 30) == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30]
    assert depths_of(True, 3) == [1, 2, 3] and depths_of(2, 5) == [2, 5] and depths_of(99, 4) == [1, 2, 3, 4]
    assert depths_of(False, 5) == [] and depths_of([4, 1, 4], 6) == [1, 4, 6]
    with pytest.raises(ValueError, match="cumulative is 0; give how many depths, 1 or more, or False"):
        depths_of(0, 5)
    with pytest.raises(ValueError, match=r"cumulative is \[7\]; the model has 6 layers: give depths from 1 to 6"):
        depths_of([7], 6)
    model, x, hooks = network(random(3, 3), random(3, 3))
    assert lyapunov(model, x, 2, hooks=hooks, cumulative=1).depths == (2,)
