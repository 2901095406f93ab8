"""J_p h by forward mode against the prompt's own matrices times h, and against the obvious autograd Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuitgpt_cases import build, tokens, torch_func
from decoder_cases import MODELS, exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from scalpel.jacobian_lens.reading.intervals import intervals
from scalpel.jacobian_lens.reading.transported import Transported, transported
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

pytest.importorskip("transformers")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms():
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    width = model.config.hidden_size
    vectors = {2: drawn(width, seed=2), 0: drawn(3, width), 1: drawn(2, width, seed=1)}
    prompts = [ids_of(1, 8), ids_of(1, 7)]
    for options in ({}, {"targets": "same", "groups": 2}, {"targets": "same", "groups": None}, {"target": 2}):
        given: dict[str, Any] = {"skip_first": 2, **options}
        found = transported(model, prompts, vectors, **given)
        matrices = [lens_matrices(model, ids, layers=[0, 1, 2], **given) for ids in prompts]
        for layer, rows in vectors.items():
            right = torch.stack([rows.reshape(-1, width) @ each[layer].T for each in matrices])
            torch.testing.assert_close(found.per_prompt[layer], right, **EXACT)
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._PIECE_BYTES", 3000)  # one or two tangents
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._BLOCK_BYTES", 3000)
    for layer, values in transported(model, prompts, vectors, skip_first=2, target=2).per_prompt.items():
        torch.testing.assert_close(values, found.per_prompt[layer], **EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral"])
def test_against_the_obvious_jacobian_with_and_without_rules(name: str) -> None:
    model, ids = model_of(name), ids_of(1, 8)
    width = model.config.hidden_size
    h = drawn(2, width)
    blocks = blocks_of(model)
    for hooked in (False, True):
        if hooked:  # the rules don't hold then
            middle = next(part for path, part in model.named_modules() if path.endswith("1.mlp"))
            middle.register_forward_hook(lambda module, given, output: 1.5 * output)
        full = block_jacobian(model, {"input_ids": ids}, blocks[0], blocks[1], width)
        for targets in ("after", "same"):
            right = h @ lens_matrix(full, range(2, 7), targets).T
            found = transported(model, [ids], {0: h, 1: h}, target=1, skip_first=2, targets=targets, groups=None)
            torch.testing.assert_close(found.mean[0], right, **EXACT)
            torch.testing.assert_close(found.mean[1], h, **EXACT)
            assert bool(found.error[0].isnan().all()) and bool(found.standard_error[1].isnan().all())


@pytest.mark.parametrize("case", ["plain", "like_csp_yolo2"])
def test_of_a_circuitgpt(case: str) -> None:
    model = build(case)
    prompts = [tokens(model, 1, 7), {"input_ids": tokens(model, 1, 6), "attention_mask": torch.ones(1, 6)}]
    vectors = {0: drawn(18, model.config.d_model), 1: drawn(1, model.config.d_model, seed=1)}
    for targets in ("after", "same"):
        given: dict[str, Any] = {"skip_first": 1, "targets": targets}
        matrices = [lens_matrices(model, ids, layers=[0, 1], **given) for ids in prompts]
        found = transported(model, prompts, vectors, **given)
        with torch_func(model):
            without_rules = transported(model, prompts, vectors, **given)
        for layer, rows in vectors.items():
            right = torch.stack([rows @ each[layer].T for each in matrices])
            torch.testing.assert_close(found.per_prompt[layer], right, **EXACT)
            torch.testing.assert_close(without_rules.per_prompt[layer], right, **EXACT)


def test_errors_and_prompts_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(5, 2, 3)
    found = Transported({0: values})
    expected = np.std(values.numpy(), axis=0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(found.standard_error[0].numpy(), expected)
    ratio = np.linalg.norm(expected, axis=-1) / np.linalg.norm(values.numpy().mean(0), axis=-1)
    np.testing.assert_allclose(found.error[0].numpy(), ratio)
    model = model_of("llama")
    h = {0: drawn(12)}
    with pytest.warns(UserWarning, match=r"1 prompts have fewer than skip_first \+ 2 = 6 tokens"):
        found = transported(model, [ids_of(1, 8), ids_of(1, 5)], h, skip_first=4)
    assert found.n_prompts == 1 and found.skipped == 1
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"targets": "all"}, "targets is 'all'"),
        ({"skip_first": -1}, "skip_first is -1"),
        ({"groups": 0}, "groups is 0"),
        ({"skip_first": 7}, "no prompt has 9 tokens or more"),
        ({"vectors": {0: drawn(2, 5)}}, r"layer 0 have shape \(2, 5\); the residual stream needs \(n, 12\)"),
        ({"vectors": {7: drawn(12)}}, "there is no layer 7"),
        ({"prompts": [ids_of(2, 8)]}, "holds 2 texts"),
    ]
    for options, message in refusals:
        given = {"prompts": [ids_of(1, 8)], "vectors": h, "skip_first": 2} | options
        with pytest.raises(ValueError, match=message), pytest.warns() if "no prompt" in message else nullcontext():
            transported(model, **given)


def test_intervals_of_logits_follow_students_t_and_ranks_are_counted() -> None:
    width, vocab, count = 6, 11, 24
    values = 0.4 * drawn(count, 2, width) + drawn(2, width, seed=1)
    head = drawn(vocab, width, seed=2)
    found = intervals(lambda x: x @ head.T, values, [3, 7], resamples=4000)
    logits = (values @ head.T).numpy()
    mean, spread = logits.mean(0), logits.std(0, ddof=1) / np.sqrt(count)
    np.testing.assert_allclose(found.logits.numpy(), mean[:, [3, 7]])
    half = 2.0687 * spread[:, [3, 7]]  # Student's t with 23 degrees of freedom
    np.testing.assert_allclose((found.logits_high - found.logits_low).numpy() / 2, half, rtol=0.06)
    for row in range(2):
        order = sorted(range(vocab), key=lambda token: (-mean[row, token], token))
        assert found.ranks[row].tolist() == [order.index(3) + 1, order.index(7) + 1]
    assert bool((found.ranks_low <= found.ranks).all()) and bool((found.ranks <= found.ranks_high).all())
    assert bool((found.ranks_low < found.ranks_high).any())


def test_intervals_cover_what_a_norm_makes_of_the_true_mean() -> None:
    """Of 200 draws of 12 prompts, about 95 % of the intervals hold the truth, after a norm that isn't linear."""
    head = drawn(9, 5, seed=2)
    norm = nn.RMSNorm(5, dtype=torch.float64).requires_grad_(False)
    truth = drawn(1, 5, seed=1)
    right = norm(truth) @ head.T
    inside = 0
    for seed in range(200):
        values = truth + 0.5 * drawn(12, 1, 5, seed=seed + 10)
        found = intervals(lambda x: norm(x) @ head.T, values, [4], seed=seed)
        inside += bool(found.logits_low <= right[:, 4] <= found.logits_high)
    assert 180 <= inside <= 199


def test_ties_one_prompt_and_refusals() -> None:
    values = torch.tensor([[[1.0, 1.0, 0.0]]])
    found = intervals(lambda x: x, values, [0, 1, 2])
    assert found.ranks.tolist() == [[1.0, 2.0, 3.0]]
    assert bool(found.logits_low.isnan().all()) and bool(found.ranks_high.isnan().all())
    with pytest.raises(ValueError, match=r"per_prompt has shape \(1, 3\)"):
        intervals(lambda x: x, values[0], [0])
    with pytest.raises(ValueError, match="resamples is 0"):
        intervals(lambda x: x, values, [0], resamples=0)
