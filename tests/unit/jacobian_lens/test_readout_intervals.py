"""Intervals of a readout, against those of each prompt's own matrix times the text's states."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitgpt_cases import build
from scalpel.jacobian_lens.fitting import fit
from scalpel.jacobian_lens.lens import JacobianLens
from scalpel.jacobian_lens.reading.intervals import intervals
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

TEXT, AT = [1, 5, 2, 4], [1, 3]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("like_csp_yolo2").double()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 7) for _ in range(9)] for _ in range(5)]


@pytest.fixture(scope="module")
def lens(model: Any, prompts: list[list[int]]) -> JacobianLens:
    return fit(model, prompts, skip_first=2, max_tokens=8, progress=False)


def test_they_are_those_of_the_prompts_own_matrices(model: Any, lens: JacobianLens, prompts: list[list[int]]) -> None:
    read = lens.readout(TEXT, positions=AT, k=3)
    seen: list[int] = []
    found = lens.intervals(read, TEXT, prompts[:4], resamples=50, seed=3, progress=seen.append)
    assert found.n_prompts == 4 and seen == [1, 2, 3, 4]
    layer = lens.source_layers[-1]
    each = [lens_matrices(model, torch.tensor([ids[:8]]), layers=[layer], skip_first=2)[layer] for ids in prompts[:4]]
    h = lens.attached.values(lens.attached.text(TEXT), [layer]).states[layer]
    for place, position in enumerate(AT):
        own = h[position : position + 1]
        tokens = read.jacobian.tokens[-1, place].tolist()

        def unembed(ids: int) -> Callable[[Tensor], Tensor]:
            def head(x: Tensor) -> Tensor:
                rows = x.reshape(-1, x.shape[-1])
                return lens.attached.head.logits(rows, torch.full((len(rows),), ids)).reshape(*x.shape[:-1], -1)

            return head

        mean = own @ lens.J[layer].double().T
        right = intervals(
            unembed(TEXT[position]),
            torch.stack([own @ J.T for J in each]),
            tokens,
            resamples=50,
            seed=3,
            mean=mean,
            n_prompts=5,
        )
        ends = torch.stack([right.logits_low[0], right.logits_high[0]], dim=-1)
        torch.testing.assert_close(found.logits[-1, place], ends, rtol=1e-6, atol=1e-8)


def test_prompts_may_have_any_form_and_short_ones_are_passed_over(lens: JacobianLens, prompts: list[list[int]]) -> None:
    read = lens.readout(TEXT, positions=-1, k=2)
    right = lens.intervals(read, TEXT, [torch.tensor([ids]) for ids in prompts])
    with pytest.warns(UserWarning, match="1 prompts have fewer than 4"):
        found = lens.intervals(read, TEXT, [*prompts, [1, 2]])
    assert found.n_prompts == 5 and torch.equal(found.logits, right.logits)
    assert torch.equal(lens.intervals(read, TEXT, torch.tensor(prompts)).logits, right.logits)


def test_what_is_refused(lens: JacobianLens, prompts: list[list[int]]) -> None:
    read = lens.readout(TEXT, k=2)
    with pytest.raises(ValueError, match="another text"):
        lens.intervals(read, [1, 5, 2, 3], prompts)
    with pytest.raises(ValueError, match="positions up to 3"):
        lens.intervals(read, [1, 5, 2], prompts)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="two prompts or more of at least 4 tokens, and 1"):
        lens.intervals(read, TEXT, [prompts[0], [1, 2]])
    unknown = JacobianLens(dict(lens.J), 0, about=lens.about, model=lens.attached.model)
    with pytest.raises(ValueError, match="doesn't say how many prompts"):
        unknown.intervals(read, TEXT, prompts)


def test_probes_have_the_intervals_of_each_prompts_products(prompts: list[list[int]]) -> None:
    model = build("plain")
    width = model.config.d_model
    probes = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    lens = fit(model, prompts, skip_first=2, max_tokens=8, probes=probes, progress=False)
    each = [
        lens_matrices(model, torch.tensor([ids[:8]]), layers=lens.source_layers, skip_first=2)[lens.source_layers[-1]]
        for ids in prompts
    ]
    products = torch.stack([probes.to(matrix) @ matrix.T for matrix in each]).float()

    def unembed(x: Tensor) -> Tensor:
        rows = x.reshape(-1, width).to(lens.attached.head.dtype)
        ids = torch.tensor([2, 5]).repeat(len(rows) // 2) if len(rows) > 1 else torch.tensor([2])
        return lens.attached.head.logits(rows, ids).reshape(*x.shape[:-1], -1)

    right = intervals(unembed, products, [3, 1], resamples=50)
    found = lens.probe_intervals(lens.source_layers[-1], [3, 1], after=[2, 5], resamples=50)
    for name in vars(right):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one for each of the 2 probes"):
        lens.probe_intervals(lens.source_layers[-1], [3], after=[1])
    with pytest.raises(ValueError, match="layer 99"):
        lens.probe_intervals(99, [3])
    without = fit(model, prompts, skip_first=2, max_tokens=8, progress=False)
    with pytest.raises(ValueError, match="no probes"):
        without.probe_intervals(lens.source_layers[-1], [3])
