"""Singular triples of an operator against the dense decomposition, on spectra that are hard to resolve."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from circuitgpt_cases import BASE, one_thread, tokens  # noqa: F401
from decoder_cases import exact_norms, ids_of, model_of
from scalpel import CircuitGPT, CircuitGPTConfig, jacobian
from scalpel.jacobians.operator import Jacobian

pytestmark = pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")

_i = torch.arange(400, dtype=torch.float64)
SPECTRA = {
    "decaying": 0.9**_i,
    "power_law": 1 / (1 + _i),
    "flat": torch.ones(400, dtype=torch.float64),
    "clusters": 41 - (_i // 10 + 1),
    "rank_4": torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64),
    "slow": 1 - _i / 500,
    "zero": torch.zeros(3, dtype=torch.float64),
    "tiny": 1e-30 * 0.95**_i,
    "huge": 1e30 * 0.95**_i,
}


def operator(spectrum: Tensor, m: int = 400, n: int = 450, dtype: torch.dtype = torch.float64) -> Jacobian:
    """The Jacobian of a linear layer with the given singular values."""
    generator = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_((U[:, : len(spectrum)] * spectrum) @ V[:, : len(spectrum)].T)
    return jacobian(layer, torch.zeros(1, n, dtype=dtype), ":in", "")


def check(J: Jacobian, matrix: Tensor, k: int, close: float) -> None:
    U, S, Vh = J.svd(k)
    m, n = J.shape
    assert (U.shape, S.shape, Vh.shape) == ((m, k), (k,), (k, n))
    true = torch.linalg.svdvals(matrix)
    U, S, Vh = U.double(), S.double(), Vh.double()
    scale = float(true[0])
    assert bool((S[:-1] >= S[1:]).all())
    assert float((S - true[:k]).abs().max()) <= close * scale
    unit = torch.eye(k, dtype=torch.float64)
    assert max(float((U.T @ U - unit).abs().max()), float((Vh @ Vh.T - unit).abs().max())) < 100 * close
    # Checks the triples and not only the values: both residuals must be small.
    loose = max(30 * close, 2e-9) * scale
    assert float((matrix @ Vh.T - U * S).norm(dim=0).max()) <= loose
    assert float((matrix.T @ U - Vh.T * S).norm(dim=0).max()) <= loose


@pytest.mark.parametrize("k", [1, 6, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_hard_spectra(name: str, k: int) -> None:
    J = operator(SPECTRA[name])
    check(J, J.to_dense(), k, 1e-12)


@pytest.mark.parametrize("name", ["decaying", "clusters", "rank_4"])
def test_float32_against_float64(name: str) -> None:
    J = operator(SPECTRA[name], dtype=torch.float32)
    check(J, J.to_dense().double(), 16, 1e-5)
    assert J.spectrum(3).dtype == torch.float32


@pytest.mark.parametrize("shape", [(300, 900), (900, 300), (290, 290), (40, 600), (5, 5)])
def test_shapes_around_the_dense_fallback(shape: tuple[int, int]) -> None:
    J = operator(SPECTRA["power_law"][: min(shape)], *shape)
    for k in {1, 5, min(shape)}:
        check(J, J.to_dense(), k, 1e-12)
        check(J.T, J.to_dense().T, k, 1e-12)


def test_a_model_and_a_composition() -> None:
    config = BASE | {"d_model": 48, "d_mlp": 64, "sink": True, "afrac": 0.5, "rms_norm": True}
    model = CircuitGPT(CircuitGPTConfig.from_dict(config), seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    ids = tokens(model, 1, 8)
    J = jacobian(model, ids)
    assert min(J.shape) > 256
    matrix = J.to_dense()
    check(J, matrix, 16, 1e-11)
    check(J.T, matrix.T, 16, 1e-11)
    chain = jacobian(model, ids, "1.resid_in") @ jacobian(model, ids, target="1.resid_in")
    torch.testing.assert_close(chain.spectrum(16), torch.linalg.svdvals(matrix)[:16], rtol=1e-10, atol=0)
    single = jacobian(model.float(), ids).spectrum(16)
    torch.testing.assert_close(single.double(), torch.linalg.svdvals(matrix)[:16], rtol=1e-4, atol=0)


def test_the_seed_decides() -> None:
    J = operator(SPECTRA["slow"])
    first, again, other = J.svd(4, seed=1), J.svd(4, seed=1), J.svd(4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[1], other[1], rtol=1e-12, atol=0)
    assert torch.equal(J.spectrum(4, seed=1), first[1])


def test_k() -> None:
    J = operator(SPECTRA["decaying"])
    U, S, Vh = J.svd(0)
    assert (U.shape, S.shape, Vh.shape) == ((400, 0), (0,), (0, 450))
    for k in (-1, 401):
        with pytest.raises(ValueError, match=rf"k is {k}; this Jacobian has 400 .* 0 <= k <= 400"):
            J.svd(k)
    for k in (1.0, "3", True, None):
        with pytest.raises(TypeError, match="must be an int"):
            J.spectrum(k)


def test_what_does_not_settle_is_said(monkeypatch) -> None:
    monkeypatch.setattr("scalpel.jacobians.svd._STEPS", 3)
    J = operator(SPECTRA["slow"])
    with pytest.warns(RuntimeWarning, match=r"svd\(5\) stopped after 3 block products with a residual"):
        U, S, Vh = J.svd(5)
    assert (U.shape, S.shape, Vh.shape) == ((400, 5), (5,), (5, 450))
    assert bool((S <= 1 + 1e-12).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J.svd(5, tol=0.5)


def test_derivatives_that_are_not_finite() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    for width in (4, 400):
        with pytest.raises(ValueError, match="NaN or infinity"):
            jacobian(Root(), torch.zeros(1, width), ":in", "").svd(1)


@pytest.mark.parametrize("name", ["circuit", "gpt2", "llama"])
def test_sixteen_values_of_a_float32_model_are_those_of_float64(name: str) -> None:
    """The values are within 1e-4 of a dense decomposition in float64, relative to each value."""
    if name == "circuit":
        config = CircuitGPTConfig(
            **(BASE | {"n_layer": 3, "d_model": 48, "n_head": 4, "d_mlp": 96}), afrac=0.25, afrac_loctypes="mlp_neuron"
        )
        model: nn.Module = CircuitGPT(config, seed=1).requires_grad_(False)
        for parameter in model.parameters():
            parameter.mul_(4)
        ids = tokens(model, 1, 10)
    else:
        pytest.importorskip("transformers")
        model, ids = model_of(name), ids_of(1, 12)
    with exact_norms() if name == "llama" else nullcontext():
        dense = jacobian(copy.deepcopy(model).double(), ids).to_dense()
        found = jacobian(model.float(), ids).spectrum(16)
    true = torch.linalg.svdvals(dense)[:16]
    assert float((found.double() / true - 1).abs().max()) <= 1e-4
