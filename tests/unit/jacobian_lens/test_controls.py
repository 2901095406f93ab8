"""Control lenses keep what they should of a lens, and lose the rest."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch

from lens_cases import lens_model, random_lens
from scalpel.jacobian_lens.evaluating.controls import derangement


def test_permuted_rows() -> None:
    lens = random_lens(lens_model("gpt2"))
    control = lens.permuted(seed=3)
    orders = []
    for layer, matrix in lens.J.items():
        moved = [next(i for i, row in enumerate(matrix) if torch.equal(row, other)) for other in control.J[layer]]
        assert sorted(moved) == list(range(12)) and moved != sorted(moved)
        orders.append(moved)
    assert orders[0] != orders[1]
    assert torch.equal(lens.permuted(seed=3).J[1], control.J[1]) and not torch.equal(
        lens.permuted(4).J[1], control.J[1]
    )
    assert control.attached is lens.attached and control.about["control"] == "permuted" and control.n_prompts == 4


def test_random_matrices_of_the_same_norm() -> None:
    lens = random_lens(lens_model("gpt2"))
    control = lens.random(seed=3)
    for layer, matrix in lens.J.items():
        assert float(control.J[layer].norm()) == pytest.approx(float(matrix.norm()), rel=1e-5)
        angle = (control.J[layer] * matrix).sum() / matrix.square().sum()
        assert abs(float(angle)) < 0.3 and control.J[layer].dtype == torch.float32


def test_derangements_move_every_layer_and_are_all_as_likely() -> None:
    drawn = Counter(tuple(derangement(4, seed)) for seed in range(1800))
    right = {order for order in permutations(range(4)) if all(a != b for a, b in enumerate(order))}
    assert set(drawn) == right and len(right) == 9
    assert all(abs(count - 200) < 5 * 200**0.5 for count in drawn.values())
    lens = random_lens(lens_model("gpt2"))
    control = lens.deranged(seed=1)
    assert torch.equal(control.J[0], lens.J[1]) and torch.equal(control.J[1], lens.J[0])
    with pytest.raises(ValueError, match="has 1 layer"):
        random_lens(lens_model("gpt2"), count=1).deranged()
