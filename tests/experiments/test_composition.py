"""The experiment on composition: estimates on toys of a known answer, frozen attention by autograd, and the rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scalpel
from circuitgpt_cases import build, tokens
from decoder_cases import exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, lens_matrix
from scalpel.experiments.composition.asked import asked
from scalpel.experiments.composition.defect import Products, exchanged, measure, relative, split_halves, squares
from scalpel.experiments.composition.experiment import _pairs, _verdict, run
from scalpel.experiments.composition.prompts import Prompts
from scalpel.experiments.composition.summary import Summary, summarise
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

WIDTH, POSITIONS = 5, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Toy:
    """A prompt whose layers are given, each (positions, width, positions, width), target first."""

    positions, width = POSITIONS, WIDTH

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = [each.reshape(POSITIONS * WIDTH, -1) for each in layers]

    def pull(self, rows: Tensor, signs: Tensor, target: int, sources: Sequence[int]) -> dict[int, Tensor]:
        found = {}
        for source in sources:
            product = torch.eye(POSITIONS * WIDTH, dtype=torch.float64)
            for layer in self.layers[source:target]:
                product = layer @ product
            cotangents = (signs[:, :, None] * rows[:, None, :]).double().flatten(1)
            arrived = (cotangents @ product).unflatten(1, (POSITIONS, WIDTH))
            found[source] = torch.einsum("tc,tcw->tw", signs.double(), arrived) / POSITIONS
        return found


def at_each_position(matrix: Tensor) -> Tensor:
    """A layer without attention: the same matrix at every position."""
    return torch.einsum("st,ij->sitj", torch.eye(POSITIONS, dtype=torch.float64), matrix)


def everything(products: Products) -> np.ndarray:
    _, probes, units, _ = products.defect.shape
    return relative(products, np.ones((1, units)), np.ones((1, probes)))[0]


def test_a_linear_model_without_attention_composes_exactly() -> None:
    layers = [at_each_position(torch.eye(WIDTH) + drawn(WIDTH, WIDTH, seed=i)) for i in range(4)]
    found = measure([Toy(layers)] * 8, [(0, 1), (0, 2), (1, 3)], 4, 6, 0)
    for products in found.values():
        assert np.abs(everything(products)).max() < 1e-24
        assert squares(products.moved, np.ones((1, 4)), np.ones((1, 6))).min() > 1


def scaled(count: int, draw: Any, delta: float) -> list[Toy]:
    """Prompts whose two layers are both multiplied by 1 + s, s = ±delta: the mean of products is (1 + delta²) BA."""
    first, second = drawn(WIDTH, WIDTH, seed=1), drawn(WIDTH, WIDTH, seed=2)
    signs = [draw(number) for number in range(count)]
    return [Toy([at_each_position(each * (1 + sign * delta)) for each in (first, second)]) for sign in signs]


def test_the_product_of_means_is_not_the_mean_of_products() -> None:
    """Of the two prompts of a unit one has 1 + d and one 1 − d: left (1 + d²) BA, right (1 − d²) BA."""
    delta = 0.25
    found = measure(scaled(8, lambda number: 1 - 2 * (number % 2), delta), [(0, 1)], 2, 40, 0)
    product = drawn(WIDTH, WIDTH, seed=2) @ drawn(WIDTH, WIDTH, seed=1)
    generator = torch.Generator().manual_seed(0)
    u = torch.randint(0, 2, (40, WIDTH), generator=generator).double() * 2 - 1
    right = float((2 * delta**2 * u @ product).norm() / ((1 + delta**2) * u @ product - u).norm())
    assert everything(found["after"])[0] ** 0.5 == pytest.approx(right, rel=1e-12)
    assert everything(found["same"])[0] ** 0.5 == pytest.approx(right, rel=1e-12)


def test_intervals_cover_the_truth_and_nulls_are_at_zero() -> None:
    """With independent s the truth is d² BA; with independent layers it is 0, however noisy each of them is."""
    delta, rng = 0.5, np.random.default_rng(0)
    product = drawn(WIDTH, WIDTH, seed=2) @ drawn(WIDTH, WIDTH, seed=1)
    means = drawn(2, WIDTH, WIDTH, seed=3)
    one = torch.eye(WIDTH, dtype=torch.float64)
    truth = float((delta**2 * product).norm() / ((1 + delta**2) * product - one).norm())
    inside, still_zero, below = 0, 0, 0
    for seed in range(40):
        prompts = scaled(24, lambda number: rng.choice([-1, 1]), delta)
        found = measure(prompts, [(0, 1)], 2, 16, seed)["after"]
        each = summarise([(0, 1)], 2, found, None, None, True, 200, rng)
        inside += each.interval[0] <= truth <= each.interval[1]
        noisy = [
            Toy([at_each_position(each + torch.tensor(rng.normal(size=(WIDTH, WIDTH)))) for each in means])
            for _ in range(24)
        ]
        found = measure(noisy, [(0, 1)], 2, 16, seed)["after"]
        each = summarise([(0, 1)], 2, found, None, None, True, 200, rng)
        assert each.split is not None
        below += each.defect <= each.split
        still_zero += each.interval[0] <= 0 <= each.interval[1]
    print(inside, still_zero, below)
    assert inside >= 34 and still_zero >= 34 and below >= 36


def test_what_resampled_products_are() -> None:
    """By the obvious loops over units."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 3, 4)) + 1  # units, probes, width
    gram = np.einsum("ikw,jkw->kij", z, z)[None]
    units, probes = np.array([[2, 0, 1, 1, 0, 2]]), np.array([[1, 0, 2]])
    total, count = 0.0, 0
    for i in range(6):
        for j in range(6):
            if i != j:
                times = units[0, i] * units[0, j]
                count += times
                total += times * sum(probes[0, k] * z[i, k] @ z[j, k] for k in range(3)) / 3
    assert squares(gram, units, probes)[0, 0] == pytest.approx(total / count)
    products = Products(gram, gram * 4, gram)
    moved = squares(gram * 4, np.ones((1, 6)), np.ones((1, 3)))[0, 0]
    halves = split_halves(products, np.random.default_rng(5), 400)
    assert abs(halves.mean()) < 4 * halves.std() / 20
    shown = exchanged(products, np.random.default_rng(5), 400)
    assert abs(shown.mean()) < 4 * shown.std() / 20  # at 0, though z has a mean of its own
    one, other = z[:3], z[3:]
    expected = 0.0
    for half in (one, other):
        expected += sum((half[i] * half[j]).sum() for i in range(3) for j in range(3) if i != j) / 6
    expected -= 2 * (one.mean(0) * other.mean(0)).sum()
    assert np.abs(shown[:, 0] - expected / 3 / 4 / moved).min() < 1e-12


# ---- frozen attention --------------------------------------------------------------------------------------------


@pytest.fixture
def exact() -> Iterator[None]:
    pytest.importorskip("transformers")
    with exact_norms():
        yield


@pytest.mark.usefixtures("exact")
def test_rows_are_those_of_the_lens_and_of_a_model_with_frozen_attention() -> None:
    model = model_of("llama")
    texts = [ids_of(1, 8, seed=seed) for seed in range(3)]
    source = asked(model)
    u, ones = drawn(4, source.width), torch.ones(4, 5)
    own = Prompts(source, texts, 2, [1, 2, 3])
    right = lens_matrices(model, texts[1], layers=[0], target=1, skip_first=2)[0]
    torch.testing.assert_close(own[1].pull(u, ones, 2, [1])[1], u @ right, rtol=1e-9, atol=1e-11)

    weights = mean_weights(model, texts)
    frozen = Prompts(source, texts, 2, [1, 2, 3], "frozen")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.forward = fixed(layer.self_attn, weights[number])
    full = block_jacobian(model, {"input_ids": texts[1]}, model.model.layers[0], model.model.layers[2], source.width)
    right = lens_matrix(full, range(2, 7), "after")
    for layer in model.model.layers:
        del layer.self_attn.forward
    # transformers' eager attention takes the softmax in float32
    torch.testing.assert_close(frozen[1].pull(u, ones, 3, [1])[1], u @ right, rtol=1e-5, atol=1e-6)


def mean_weights(model: Any, texts: Sequence[Tensor]) -> list[Tensor]:
    """The attention weights of transformers' own eager attention, (heads, L, L) for each layer."""
    model.set_attn_implementation("eager")
    found = [model(text, output_attentions=True).attentions for text in texts]
    model.set_attn_implementation("sdpa")
    return [torch.stack([each[i][0] for each in found]).mean(0) for i in range(len(found[0]))]


def fixed(attention: Any, weights: Tensor) -> Any:
    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        v = attention.v_proj(hidden_states).unflatten(-1, (2, 4)).repeat_interleave(2, dim=2)  # to all heads
        return attention.o_proj(torch.einsum("hij,bjhd->bihd", weights, v).flatten(2)), None

    return forward


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_a_linear_model_composes_where_the_window_has_no_edge(name: str) -> None:
    """With one position, nothing is averaged over; the model as it is depends on the prompt, and doesn't compose."""
    texts = [ids_of(1, 6, seed=seed) for seed in range(8)]
    source = asked(model_of(name))
    for mode, composes in (("linear", True), ("own", False)):
        found = measure(Prompts(source, texts, 4, [1, 2, 3], mode), [(1, 2)], 3, 8, 0)
        assert (abs(everything(found["after"])[0]) < 1e-9) == composes
        wide = measure(Prompts(source, texts, 1, [1, 2, 3], mode), [(1, 2)], 3, 8, 0)
        assert abs(everything(wide["after"])[0]) > 1e-9


def test_frozen_attention_of_a_circuitgpt() -> None:
    model = build("like_csp_yolo2")
    texts = [tokens(model, 1, 7), (tokens(model, 1, 7) + 3) % model.config.vocab_size]
    names = [f"{i}.attn.pattern" for i in range(2)]
    seen = [model.run_with_cache(text, names)[1] for text in texts]
    mean = {name: (seen[0][name] + seen[1][name]) / 2 for name in names}

    def moved(delta: Tensor) -> Tensor:
        kept = {}

        def tap(name: str, value: Tensor) -> Tensor:
            kept[name] = mean[name] if name in mean else value + delta if name == "1.resid_in" else value
            return kept[name]

        model(texts[0], tap=tap, patterns=names)
        return kept["final_resid"]

    zero = torch.zeros(1, 7, model.config.d_model, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(moved, zero)[0, :, :, 0]
    u = drawn(20, model.config.d_model)
    prompt = Prompts(asked(model), texts, 2, [1, 2], "frozen")[0]
    signs = torch.where(drawn(20, 4) > 0, 1.0, -1.0)
    for factors in (torch.ones(20, 4), signs):
        found = prompt.pull(u, factors, 2, [1, 2])
        expected = torch.einsum(
            "ts,tr,ti,sirj->tj", factors.double(), factors.double(), u, full[2:6][:, :, 2:6]
        ) / 4  # fmt: skip
        torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[2], u)


# ---- the experiment ----------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    each = Summary([], 0.1, (0.05, 0.2), 0.15, 0.3, 0.12, (0.1, 0.2), None, 0.5, (0.1, 0.8))
    worse = replace(each, defect=0.4, interval=(0.3, 0.5))
    less_than_frozen = replace(worse, frozen_interval=(0.4, 0.6), edges=0.2)
    assert less_than_frozen.beyond and less_than_frozen.beyond_frozen is False and worse.beyond_frozen
    assert not replace(less_than_frozen, edges=0.35).beyond and not replace(less_than_frozen, edges=None).beyond
    unsure = replace(each, defect=0.18)
    assert each.zero and each.beyond is False and worse.beyond and not worse.zero
    assert _verdict([each, each]) == "reproduced"
    assert _verdict([each, worse]) == "not reproduced"
    assert _verdict([each, unsure]) == "indistinguishable"
    assert _verdict([each, replace(each, split=None)]) == "not testable here"
    assert worse.measured()["grows"] and not worse.measured()["zero_stands"]


def test_layers_on_an_even_grid() -> None:
    assert _pairs(2, (), ()) == [(0, 1)]
    assert _pairs(3, (), ()) == [(1, 2)]
    assert _pairs(30, (2, 9), (5, 20)) == [(3, 6), (3, 21), (10, 21)]
    default = _pairs(30, (), ())
    assert len({m for _, m in default}) == 4 and len({l for l, _ in default}) == 6  # noqa: E741
    assert all(1 <= l < m < 30 for l, m in default)  # noqa: E741
    with pytest.raises(scalpel.experiments.Refused, match="two are needed"):
        _pairs(1, (), ())
    with pytest.raises(ValueError, match=r"option 'middles' has layer 29; allowed: 0 to 28"):
        _pairs(30, (), (29,))
    with pytest.raises(ValueError, match="comes before one of middles"):
        _pairs(30, (7,), (7,))


@pytest.mark.usefixtures("exact")
def test_of_a_decoder_and_of_text_of_the_users_own(tmp_path: Any) -> None:
    model = model_of("llama")
    options: dict[str, Any] = {"prompts": 8, "tokens": 8, "skip_first": 2, "probes": 3, "resamples": 60}
    result = scalpel.experiments.run("composition", model, **options)
    assert result.verdict in ("reproduced", "not reproduced", "indistinguishable")
    assert result.provenance["text"] == "random token ids" and "random token ids" in str(result.measured["left_out"])
    (row,) = result.measured["after"]["pairs"]
    assert row["l"] == 0 and row["m"] == 1 and row["to_the_end"] == 2 and row["edges"] is not None
    assert result.null["after"]["frozen"] == pytest.approx(row["frozen"])
    assert set(result.figures) == {"defect_after", "defect_same"}
    again = scalpel.experiments.run("composition", model, **options)
    assert str(again.measured) == str(result.measured) and str(again.null) == str(result.null)  # with their NaN
    without = scalpel.experiments.run("composition", model, **options, nulls=["split"])
    assert without.verdict == "not testable here" and without.measured["after"]["defect"] == row["defect"]
    file = tmp_path / "text.txt"
    file.write_text("some words of a list, [1, 2, [3, 4]], " * 20)
    found = run("bracket-mini", text=str(file), **options)
    assert found.provenance["text"] == "text.txt" and found.measured["after"]["pairs"][0]["l"] == -1
    for changes, message in (
        ({"prompts": 9}, "'prompts' is 9; it must be even"),
        ({"prompts": 6}, "'prompts' is 6; it must be 8 or more"),
        ({"nulls": ["shuffled"]}, "unknown null 'shuffled'; there are split, frozen"),
        ({"text": str(file), "prompts": 500}, "give a longer text"),
        ({"text": 3}, "option 'text' of 'composition' is 3; it must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            scalpel.experiments.run("composition", "bracket-mini", **options | changes)
    with pytest.raises(ValueError, match="has no tokenizer"):
        run(model, text=str(file), **options)
    with pytest.raises(TypeError, match="takes a CircuitGPT or a transformers model"):
        asked(SimpleNamespace())


def test_a_folder_of_transformers_is_found_by_its_path(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    model = model_of("qwen2").float()
    model.save_pretrained(tmp_path / "qwen")
    found = asked(str(tmp_path / "qwen"))
    assert (found.name, found.layers, found.width, found.tokenizer) == ("qwen", 3, 12, None)
    assert torch.equal(found.model(ids_of()).logits, model(ids_of()).logits)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="holds a BertModel; supported are CircuitGPT, GPT2LMHeadModel"):
        asked(tmp_path / "other")
    with pytest.raises(scalpel.experiments.Refused, match="no rules, which this experiment needs"):
        asked(torch.nn.Linear(2, 2))
    with pytest.raises(scalpel.experiments.Refused, match="weights are torch.bfloat16"):
        asked(model_of("llama").bfloat16())
