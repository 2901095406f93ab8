"""A prompt's matrices of a Jacobian lens, compared with torch.autograd.functional.jacobian in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder_cases import MODELS, exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from scalpel.jacobian_lens.sweeps.autograd_sweep import AutogradSweep
from scalpel.jacobian_lens.sweeps.cotangents import signs_of
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

pytest.importorskip("transformers")
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SKIP = 2


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.fixture
def by_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("autograd ran")

    monkeypatch.setattr(AutogradSweep, "__init__", refuse)


def padded(ids: Tensor, left: int, right: int = 0) -> dict[str, Tensor]:
    """The text with padding, as a batch of a tokenizer, with the positions that it has without."""
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": torch.nn.functional.pad(ids, (left, right), value=1),
        "attention_mask": mask,
        "position_ids": places,
    }


def expected(model: Any, given: dict[str, Tensor], layer: int, tokens: range, targets: str, end: int = -1) -> Tensor:
    blocks = blocks_of(model)
    full = block_jacobian(model, given, blocks[layer], blocks[end], model.config.hidden_size)
    return lens_matrix(full, tokens, targets)


@pytest.mark.usefixtures("by_rules")
@pytest.mark.parametrize("targets", ["after", "same"])
def test_every_layer(model: Any, targets: str) -> None:
    ids = ids_of(1, 8)
    for skip, tokens in ((SKIP, range(SKIP, 7)), (0, range(7))):
        found = lens_matrices(model, ids, layers=[2, 0, 1], skip_first=skip, targets=targets, groups=None)
        assert list(found) == [0, 1, 2]
        for layer in (0, 1):
            right = expected(model, {"input_ids": ids}, layer, tokens, targets)
            torch.testing.assert_close(found[layer], right, **EXACT)
            assert not torch.allclose(right, right.T)  # so that rows and columns are told apart
        assert torch.equal(found[2], torch.eye(model.config.hidden_size, dtype=torch.float64))


@pytest.mark.usefixtures("by_rules")
@pytest.mark.parametrize("targets", ["after", "same"])
def test_padding_counts_for_nothing(model: Any, targets: str) -> None:
    ids = ids_of(1, 7)
    options: dict[str, Any] = {"layers": [0, 1], "skip_first": SKIP, "targets": targets, "groups": None}
    alone = lens_matrices(model, ids, **options)
    left = padded(ids, 3)
    for layer in (0, 1):  # the oracle runs the model on the padded text
        tokens = range(3 + SKIP, 3 + 7 - 1)
        torch.testing.assert_close(alone[layer], expected(model, left, layer, tokens, targets), **EXACT)
    for batch in (left, padded(ids, 2, 1), padded(ids, 0, 4)):
        without_positions = {name: value for name, value in batch.items() if name != "position_ids"}
        for given in (batch, without_positions):
            found = lens_matrices(model, given, **options)
            assert all(torch.equal(found[layer], alone[layer]) for layer in alone)


@pytest.mark.usefixtures("by_rules")
def test_another_layer_is_the_target(model: Any) -> None:
    ids = ids_of(1, 7)
    for targets in ("after", "same"):
        found = lens_matrices(model, ids, layers=[0, 1], target=1, skip_first=1, targets=targets, groups=None)
        right = expected(model, {"input_ids": ids}, 0, range(1, 6), targets, 1)
        torch.testing.assert_close(found[0], right, **EXACT)
        assert torch.equal(found[1], torch.eye(len(right), dtype=torch.float64))


@pytest.mark.usefixtures("by_rules")
def test_the_shortest_prompt(model: Any) -> None:
    """With one valid position, both kinds of targets are the same Jacobian of one token."""
    ids = ids_of(1, 5)
    right = expected(model, {"input_ids": ids}, 0, range(3, 4), "after")
    for targets in ("after", "same"):
        found = lens_matrices(model, ids, layers=[0], skip_first=3, targets=targets)
        torch.testing.assert_close(found[0], right, **EXACT)
    with pytest.raises(ValueError, match=r"the prompt has 5 tokens, and with skip_first=4 a lens needs 6 or more"):
        lens_matrices(model, ids, layers=[0], skip_first=4)
    with pytest.raises(ValueError, match=r"the prompt has 4 tokens"):  # padding makes it no longer
        lens_matrices(model, padded(ids[:, :4], 6), layers=[0], skip_first=3)


@pytest.mark.usefixtures("by_rules")
def test_blocks_and_pieces_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(1, 12)
    right = lens_matrices(model, ids, layers=[0, 1], skip_first=SKIP)
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._PIECE_BYTES", 3000)  # one or two cotangents
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._BLOCK_BYTES", 5000)  # four or five
    found = lens_matrices(model, ids, layers=[0, 1], skip_first=SKIP)
    for layer in right:
        torch.testing.assert_close(found[layer], right[layer], **EXACT)


@pytest.mark.usefixtures("by_rules")
def test_a_window_over_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalpel.jacobians.rows.attention._TILE_NUMBERS", 1)  # a tile has sixteen queries
    for name in ("mistral", "llama"):
        model, ids = model_of(name), ids_of(1, 24)
        found = lens_matrices(model, ids, layers=[0], skip_first=3)
        torch.testing.assert_close(found[0], expected(model, {"input_ids": ids}, 0, range(3, 23), "after"), **EXACT)


def test_signs_are_unbiased_and_groups_make_them_exact() -> None:
    model, ids = model_of("llama"), ids_of(1, 8)
    exact = lens_matrices(model, ids, layers=[0], skip_first=SKIP, targets="same", groups=None)[0]
    same = {"layers": [0], "skip_first": SKIP, "targets": "same"}
    torch.testing.assert_close(lens_matrices(model, ids, groups=5, **same)[0], exact, **EXACT)
    torch.testing.assert_close(lens_matrices(model, ids, groups=50, **same)[0], exact, **EXACT)
    for groups, fewest in ((1, 0.02), (3, 0.002)):
        drawn = torch.stack([lens_matrices(model, ids, groups=groups, seed=seed, **same)[0] for seed in range(200)])
        # The mean's distance from the exact matrix is that of a mean of independent draws.
        scatter = float((drawn - drawn.mean(0)).square().sum((1, 2)).mean() / len(drawn)) ** 0.5
        assert scatter > fewest * float(exact.norm())
        assert float((drawn.mean(0) - exact).norm()) < 2 * scatter
    again = lens_matrices(model, ids, **same)[0]
    assert torch.equal(again, lens_matrices(model, padded(ids, 2), **same)[0])
    assert not torch.equal(again, lens_matrices(model, ids, seed=1, **same)[0])


def test_signs_differ_from_prompt_to_prompt() -> None:
    def signs(ids: Tensor, groups: int) -> Tensor:
        return signs_of(ids, 38, "same", groups, 0, torch.float32, torch.device("cpu"))

    first, second = (signs(ids_of(1, 40, seed), 1) for seed in (0, 1))
    assert first.abs().unique().tolist() == [1]
    assert not torch.equal(first, second)
    parts = signs(ids_of(1, 40), 4)
    assert torch.equal(parts.abs().sum(0), torch.ones(38))
    assert torch.equal(parts.sum(0), first[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_bfloat16(name: str) -> None:
    model, ids = model_of(name).float(), ids_of(1, 8)
    wide = lens_matrices(model, ids, layers=[0], skip_first=SKIP)[0]
    narrow = lens_matrices(model, ids, layers=[0], skip_first=SKIP, precision="bfloat16")[0]
    assert wide.dtype == narrow.dtype == torch.float32
    assert 1e-4 < float((narrow - wide).norm() / wide.norm()) < 3e-2
    whole = lens_matrices(model.bfloat16(), ids, layers=[0], skip_first=SKIP)[0]
    assert whole.dtype == torch.float32
    assert float((whole - wide).norm() / wide.norm()) < 0.1


def test_what_is_given_wrongly() -> None:
    model, ids = model_of("llama"), ids_of(1, 8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": [3]}, "there is no layer 3; this LlamaForCausalLM has layers 0 to 2"),
        ({"layers": [-1]}, "there is no layer -1"),
        ({"layers": [2], "target": 1}, "layer 2 comes after the target, layer 1"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [0], "targets": "before"}, "targets is 'before'; allowed: 'after', 'same'"),
        ({"layers": [0], "skip_first": -1}, "skip_first is -1"),
        ({"layers": [0], "groups": 0}, "groups is 0"),
        ({"layers": [0], "precision": "float16"}, "precision is 'float16'"),
        ({"layers": ["model.layers.0"]}, "target is not given"),
        ({"layers": ["model.layers.2"], "target": "model.layers.1"}, "'model.layers.2' comes after the target"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            lens_matrices(model, ids, **({"skip_first": 1} | options))
    with pytest.raises(TypeError, match="'one' stands among layers"):
        lens_matrices(model, ids, layers=[0, "one"], skip_first=1)
    with pytest.raises(ValueError, match="input_ids holds 2 prompts"):
        lens_matrices(model, ids_of(2, 8), layers=[0], skip_first=1)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="hides tokens between 1 and 7"):
        lens_matrices(model, batch, layers=[0], skip_first=1)
    with pytest.raises(ValueError, match="zero at every token"):
        lens_matrices(model, batch | {"attention_mask": torch.zeros_like(ids)}, layers=[0], skip_first=1)


def test_paths_of_blocks_mean_their_outputs(by_rules: None) -> None:
    model, ids = model_of("gpt2"), ids_of(1, 8)
    numbers = lens_matrices(model, ids, layers=[0, 1], skip_first=1)
    paths = ["transformer.h.1", "transformer.h.0"]
    named = lens_matrices(model, ids, layers=paths, target="transformer.h.2", skip_first=1)
    assert torch.equal(named["transformer.h.0"], numbers[0])
    assert torch.equal(named["transformer.h.1"], numbers[1])
