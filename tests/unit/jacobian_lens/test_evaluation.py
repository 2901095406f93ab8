"""pass@k against a slow loop over items, layers and intermediates that reads one rank at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scalpel
from lens_cases import lens_model, random_lens
from scalpel.jacobian_lens.evaluating.controls import derangement
from scalpel.jacobian_lens.evaluating.items import read_items

# one token a letter; the last intermediate of the second item is two tokens, and a list is a set of spellings
ITEMS: list[dict[str, Any]] = [
    {"name": "one", "prompt": "abcd  ", "intermediates": ["e", "f"]},
    {"name": "two", "prompt": "bad a", "target": "a", "intermediates": [["b", "xx"], "ab"]},
    {"name": "three", "prompt": "ccc", "target": "q", "intermediates": [["g", "h"], "a", "d"]},
    {"name": "four", "prompt": "hg", "intermediates": ["abc"]},
]
READ = {"one": ("abcd", [[4], [5]]), "two": ("bad", [[1]]), "three": ("ccc", [[6, 7], [0], [3]])}


def ranks_of(lens: scalpel.JacobianLens, kind: str = "jacobian") -> list[list[list[int]]]:
    """For each item and intermediate, the best rank of its spellings at each layer, one rank at a time."""
    found: list[list[list[int]]] = []
    for text, intermediates in READ.values():
        found.append([])
        for spellings in intermediates:
            ranks = []
            for layer in lens.source_layers:
                ranks.append(min(int(lens.ranks(text, token, layer, -1, lens=kind)) for token in spellings))
            found[-1].append(ranks)
    return found


def slowly(ranks: list[list[list[int]]], rule: str, k: int, band: tuple[int, ...]) -> float:
    scores = []
    for item in ranks:
        passes = []
        for by_layer in item:
            one = min(by_layer) if rule == "minimum" else math.prod(by_layer[i] for i in band) ** (1 / len(band))
            passes.append(one <= k + 1e-9)
        scores.append(sum(passes) / len(passes))
    return sum(scores) / len(scores)


def deep_lens() -> scalpel.JacobianLens:
    """A lens of four layers, so that there is a band and more than one derangement."""
    import transformers

    settings: dict[str, Any] = {"n_layer": 5, "n_head": 3, "n_embd": 12, "vocab_size": 19, "n_positions": 16}
    settings |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    return random_lens(model, about={"skip_first": 4})


def test_pass_at_k_is_that_of_a_slow_loop(tmp_path: Path) -> None:
    lens = deep_lens()
    (tmp_path / "lens-eval-letters.json").write_text(json.dumps({"items": ITEMS}))
    found = lens.evaluate(tmp_path / "lens-eval-letters.json", k=(1, 3, 8), derangements=5, seed=7)
    assert (found.items, found.excluded, found.left_out, found.names) == (3, 2, ("four",), ("one", "two", "three"))
    assert found.layers == (0, 1, 2, 3) and found.band == (1, 2) and found.below_skip_first == 3
    ranked = {"jacobian": ranks_of(lens), "permuted": ranks_of(lens.permuted(7)), "random": ranks_of(lens.random(7))}
    ranked["logit"] = ranks_of(lens, "logit")
    exchanged = []
    for number in range(5):
        order = derangement(4, 7 + number)
        deranged = scalpel.JacobianLens({i: lens.J[m] for i, m in enumerate(order)}, 1)
        deranged._attached = lens.attached
        exchanged.append(ranks_of(deranged))
    for rule in ("minimum", "band"):
        for k in (1, 3, 8):
            for name, ranks in ranked.items():
                assert found.passed[name][rule][k].value == pytest.approx(slowly(ranks, rule, k, (1, 2)))
            own = slowly(ranked["jacobian"], rule, k, (1, 2))
            logit = slowly(ranked["logit"], rule, k, (1, 2))
            assert found.over_logit[rule][k].value == pytest.approx(own - logit)
            others = [slowly(ranks, rule, k, (1, 2)) for ranks in exchanged]
            assert found.beaten[rule][k] == np.mean([other < own - 1e-9 for other in others])
            assert found.tied[rule][k] == np.mean([abs(other - own) < 1e-9 for other in others])
    assert found.derangements == 5
    values = [found.passed["jacobian"]["minimum"][k].value for k in (1, 3, 8)]
    assert len(set(values)) > 1  # the cases tell ranks apart


def test_intervals_are_those_of_items() -> None:
    found = deep_lens().evaluate(ITEMS, k=3, derangements=0)
    scores = np.array(found.scores["jacobian"]["minimum"][3])
    share = found.passed["jacobian"]["minimum"][3]
    assert share.value == pytest.approx(scores.mean()) and share.low <= share.value <= share.high
    assert scores.min() <= share.low and share.high <= scores.max()
    generator = np.random.default_rng(1)
    means = [generator.choice(scores, len(scores)).mean() for _ in range(4000)]
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx([share.low, share.high], abs=0.1)
    assert math.isnan(found.beaten["band"][3]) and found.to_json()["beaten"]["band"]["3"] is None
    assert "pass@3" in repr(found) and json.dumps(found.to_json())
    alone = deep_lens().evaluate(ITEMS[:1], k=3, derangements=0)
    assert math.isnan(alone.passed["jacobian"]["band"][3].low) and math.isnan(alone.over_logit["band"][3].high)
    assert json.dumps(alone.to_json(), allow_nan=False)


def test_where_an_item_is_read() -> None:
    model = random_lens(lens_model("gpt2")).attached

    def read(read_at: str = "last", **entry: Any) -> tuple[int, ...]:
        (item,) = read_items([{"intermediates": ["a"], **entry}], model, read_at)
        assert item.text.ids is not None and item.position == len(item.text.ids) - 1
        return item.text.ids

    assert read(prompt="abc \n") == (0, 1, 2)
    assert read(prompt="abc d", target=" d") == (0, 1, 2)
    assert read(prompt="abcd", target="d") == (0, 1, 2, 3)  # part of a word, which is no answer
    assert read(prompt="d abc", target="d") == (3, 0, 1, 2)  # named before, but not at the end
    assert read("newline", prompt="ab\nc") == (0, 1)
    with pytest.raises(ValueError, match="a prompt without a newline"):
        read("newline", prompt="ab")


def test_refusals() -> None:
    lens = random_lens(lens_model("gpt2"))
    for items, options, message in (
        ([], {}, "there are no items"),
        ([{"prompt": "a"}], {}, "item 0 has no prompt, or no intermediates"),
        ([ITEMS[3]], {}, "no item has an intermediate that is one token"),
        (ITEMS, {"k": 0}, "give ranks of at least 1"),
        (ITEMS, {"layers": [0], "band": [1]}, "the band has layer 1, which isn't among layers"),
        (ITEMS, {"read_at": "first"}, "read_at is 'first'; allowed: 'last', 'newline'"),
        (ITEMS, {"derangements": -1}, "derangements is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            lens.evaluate(items, **options)
    with pytest.raises(TypeError, match="items is int"):
        lens.evaluate(5)
