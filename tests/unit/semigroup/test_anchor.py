"""The anchor of an iterated map, on maps whose eigenvalues determine it."""

import numpy as np
import pytest
import torch

from scalpel import CircuitGPT
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.semigroup.anchor import block_map, find_anchors, norm_growth, spectral_radius

SPECTRUM = [3.0, 2.4, 1.0, 0.5, -0.3, 0.1]


def basis(n, seed=0):
    drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def linear(values, seed=0):
    """The map x ↦ A x, with A symmetric with the given eigenvalues, and its eigenvectors as rows."""
    Q = basis(len(values), seed)
    A = Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T
    return (lambda x: x @ A.T), Q.T


def starts(count, *shape, seed=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(seed=0, layers=2, **options):
    config = CircuitGPTConfig(
        block_size=8, vocab_size=6, n_layer=layers, n_head=2, d_head=4, d_model=8, d_mlp=16, rms_norm=True, **options
    )
    return CircuitGPT(config, seed=seed).double().eval()


@pytest.mark.parametrize("radius", [1.0, 7.0])
def test_the_anchor_of_a_linear_map_is_its_first_eigenvector(radius):
    function, vectors = linear(SPECTRUM)
    found = find_anchors(function, starts(5, 6), radius=radius, steps=400)
    assert found.unique and found.sign.tolist() == [1] * 5
    assert (found.directions @ vectors[0]).abs().numpy() == pytest.approx(1, abs=1e-9)
    assert found.concentration == pytest.approx(1)
    assert spectral_radius(function, found.directions[0], radius=radius) == pytest.approx(2.4 / 3, rel=1e-9)
    ratio = found.turned[40] / found.turned[39]  # the observed rate equals the spectral radius
    assert ratio == pytest.approx(0.8, rel=1e-3)


def test_a_radius_for_each_start_is_as_each_by_itself():
    function = block_map(model_of(afrac=0.5))
    given = starts(2, 1, 8)
    both = find_anchors(function, given, radius=[1.0, 5.0], steps=20)
    for i, radius in enumerate([1.0, 5.0]):
        alone = find_anchors(function, given[i : i + 1], radius=radius, steps=20)
        assert both.part(slice(i, i + 1)).turned == pytest.approx(alone.turned, abs=1e-9)
        assert torch.allclose(both.directions[i], alone.directions[0], atol=1e-9)


def test_a_negative_eigenvalue_turns_the_anchor_over():
    function, vectors = linear([-3.0, 1.0, 0.5])
    found = find_anchors(function, starts(4, 3), steps=200)
    assert found.unique and found.sign.tolist() == [-1] * 4
    assert (found.axis @ vectors[0]).abs().numpy() == pytest.approx(1, abs=1e-9)
    assert spectral_radius(function, found.directions[0]) == pytest.approx(1 / 3)


def test_a_rotation_has_no_anchor():
    turn = torch.tensor([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]], dtype=torch.float64)
    found = find_anchors(lambda x: x @ turn.T, starts(3, 2), steps=100)
    assert found.period.tolist() == [0, 0, 0] and not found.unique and found.found == []
    assert found.turned == pytest.approx(2 * np.sin(0.5))
    assert (found.concentration < 0.8).all()


def test_a_quarter_turn_comes_back_as_its_opposite():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    found = find_anchors(lambda x: 2 * x @ turn.T, starts(3, 2), steps=50)
    assert found.period.tolist() == [2, 2, 2] and found.sign.tolist() == [-1, -1, -1]


def test_two_anchors_are_not_one():
    def function(x):  # there are two attracting directions, and the start decides which
        return x**3

    given = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    found = find_anchors(function, given, steps=100)
    assert found.settled.all() and not found.unique
    assert found.found == [0, 1] and found.agreement == pytest.approx(0, abs=1e-9)


def test_a_repelling_direction_has_a_radius_above_one():
    function, vectors = linear(SPECTRUM)
    assert spectral_radius(function, vectors[1]) == pytest.approx(3 / 2.4)


def test_arpack_agrees_with_all_eigenvalues():
    values = np.linspace(0.1, 1.0, 520).tolist()
    values[-1], values[-2] = 4.0, 3.0
    function, vectors = linear(values)
    assert spectral_radius(function, vectors[-1]) == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"afrac": 0.5, "sink": True}, {"d_pos_emb": 4}])
def test_the_block_map_is_the_models_own_pass(options):
    model = model_of(**options)
    ids = torch.tensor([[1, 4, 2, 5, 3]])
    with torch.no_grad():
        _, acts = model.run_with_cache(ids, names=["0.resid_in", "1.resid_in", "final_resid"])
        whole = block_map(model)(acts["0.resid_in"])
        second = block_map(model, [1])(acts["1.resid_in"])
    assert torch.allclose(whole, acts["final_resid"], atol=1e-12)
    assert torch.allclose(second, acts["final_resid"], atol=1e-12)


def constant_block(model, vector):
    """Blocks that add ``vector`` to any input."""
    with torch.no_grad():
        for block in model.transformer.h:
            for parameter in block.parameters():
                parameter.zero_()
            block.mlp.c_proj.bias.copy_(vector)
    return model


def test_a_block_that_adds_a_constant_leads_to_it():
    vector = torch.arange(1.0, 9.0, dtype=torch.float64) * 3
    model = constant_block(model_of(layers=1), vector)
    function = block_map(model)
    found = find_anchors(function, starts(6, 3, 8), radius=2.0, steps=200)
    assert found.unique
    expected = (vector / vector.norm()).expand(3, 8) / 3**0.5
    assert torch.allclose(found.directions[0], expected, atol=1e-7)
    # The map is x + b divided by its norm, with b on all three positions. Components orthogonal to b shrink by r / (r +
    # ‖b‖).
    length = float(vector.norm()) * 3**0.5
    assert spectral_radius(function, found.directions[0], radius=2.0) == pytest.approx(2 / (2 + length))
    growth = norm_growth(function, torch.zeros(1, 3, 8, dtype=torch.float64), 5)[:, 0]
    assert growth == pytest.approx(length * np.arange(6))  # without normalisation there is no fixed point, only growth


def test_the_radius_is_that_of_finite_differences():
    model = model_of(afrac=0.5, sink=True)
    function, radius = block_map(model), 3.0
    point = starts(1, 2, 8)
    point /= point.norm()

    def step(x):
        moved = function(x.reshape(1, 2, 8)).flatten()
        return radius * moved / moved.norm()

    with torch.no_grad():
        rows = [
            (step(radius * point.flatten() + h) - step(radius * point.flatten() - h)) / 2e-6
            for h in 1e-6 * torch.eye(16, dtype=torch.float64)
        ]
    matrix = torch.stack(rows).T
    across = torch.eye(16, dtype=torch.float64) - torch.outer(point.flatten(), point.flatten())
    expected = float(torch.linalg.eigvals(across @ matrix @ across).abs().max())
    assert spectral_radius(function, point[0], radius=radius) == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    function, _ = linear(SPECTRUM)
    with pytest.raises(ValueError, match="no direction"):
        find_anchors(function, torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="no direction"):
        find_anchors(lambda x: 0 * x, starts(2, 6))
    with pytest.raises(ValueError, match="radius"):
        find_anchors(function, starts(2, 6), radius=0.0)
    with pytest.raises(ValueError, match="layers"):
        block_map(model_of(), [2])
