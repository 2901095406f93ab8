"""The shipped models match their cards, and the whole suite of experiments runs on them."""

import json
import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import scalpel
from decoder_cases import ids_of, model_of
from places import ROOT
from scalpel.experiments import suite
from scalpel.experiments.abilities import accuracies
from scalpel.experiments.brackets import critical
from scalpel.experiments.collapse import measure
from scalpel.experiments.controls import Controls, untrained
from scalpel.experiments.provenance import fingerprint
from scalpel.experiments.statistics import redraw
from scalpel.jacobians.stream import stream_layers
from scalpel.tasks import held_out, literals
from scalpel.tasks.brackets import answer
from scalpel.training import bracket_mini, python_small
from scalpel.training.bracket_mini import CONTROLS, SHORT_TOKENS, accuracy_card, held_out_questions
from scalpel.training.machines import MACHINES
from scalpel.training.recipe import density_table

NAMES = ["bracket-mini", *(f"bracket-mini-{control}" for control in CONTROLS if control != "none")]

PYTHON_NAMES = [f"python-small{'' if control == 'none' else f'-{control}'}" for control in python_small.CONTROLS]


@pytest.fixture(scope="module", autouse=True)
def _parsed_once():
    """Parse each file of numpy and scipy once, though several tests and experiments ask about its list literals."""
    real, known = literals.literals_of, {}

    def literals_of(source, name="", max_chars=2000):
        if (source, max_chars) not in known:
            known[source, max_chars] = list(real(source, "", max_chars))
        return iter([replace(literal, source=name) for literal in known[source, max_chars]])

    with pytest.MonkeyPatch.context() as patch:
        for module in (literals, held_out):
            patch.setattr(module, "literals_of", literals_of)
        yield


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return scalpel.CircuitGPT.from_pretrained(request.param)


def test_all_of_it_is_small():
    names = [*NAMES, *PYTHON_NAMES, *MACHINES]
    sizes = [path.stat().st_size for name in names for path in (files("scalpel") / "data" / name).iterdir()]
    assert len(sizes) == 4 * len(names) + 1 and sum(sizes) < 12 * 2**20  # one circuit


def test_the_card_counts_the_weights_that_are_there(model):
    assert model.card["matrices"] == density_table(model)
    sparse = [row["density"] for name, row in model.card["matrices"].items() if ".h." in name]
    assert max(sparse) < 0.27


def test_what_each_control_leaves_out(model):
    name = model.card["name"]
    assert (model.config.afrac is None) == (name == "bracket-mini-no-topk")
    assert bool(model.transformer.wpe.weight.any()) == (name != "bracket-mini-no-positions")
    main = scalpel.CircuitGPT.from_pretrained("bracket-mini").card["recipe"]
    differing = {key for key, value in model.card["recipe"].items() if main[key] != value}
    assert differing == set(CONTROLS[model.card["control"]])


@pytest.mark.slow
def test_real_library_prompts_are_answered(monkeypatch):
    """The accuracy on the card, measured again; the installed numpy and scipy may be other versions than the card's."""
    shipped = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    questions, versions = held_out_questions()
    # Cached, so that the files are read once.
    monkeypatch.setattr(bracket_mini, "held_out_questions", lambda: (questions, versions))
    now, card = accuracy_card(shipped), shipped.card["accuracy"]
    assert now["all"] >= 0.95 and now["prompts_depth_2"] >= 25
    assert min(now["depth_1"], now["depth_2"]) >= 0.88
    if versions == card["held_out"]:
        assert len(questions) == sum(card[name] for name in card if name.startswith(("prompts_", "longer_prompts")))
        assert now["all"] == pytest.approx(card["all"], abs=0.02)
    fresh = answer(untrained(shipped), questions[:400], SHORT_TOKENS)
    assert abs((fresh.accuracy(1) + fresh.accuracy(2)) / 2 - 0.5) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHON_NAMES)
def test_python_small_does_what_its_card_says(name):
    """Two of the three tasks, on files of numpy and scipy only, with fewer prompts than the card."""
    shipped = scalpel.CircuitGPT.from_pretrained(name)
    assert shipped.card["matrices"] == density_table(shipped) and shipped.card["name"] == name
    assert bool(shipped.transformer.wpe.weight.any()) == (name == "python-small")
    now = accuracies(shipped, prompts=96)
    for task, one in shipped.card["tasks"].items():
        assert now[task]["accuracy"] == pytest.approx(one["accuracy"], abs=0.1)
    assert min(now["bracket_counting"]["accuracy"], now["single_double_quote"]["accuracy"]) > 0.85
    assert now["set_or_string"]["accuracy"] < 0.65


def test_the_untrained_model_comes_from_its_seed():
    shipped = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    one, other = untrained(shipped), untrained(shipped)
    assert fingerprint(one) == fingerprint(other) != fingerprint(shipped)
    for name, parameter in one.named_parameters():
        if parameter.dim() == 2:
            assert int(parameter.count_nonzero()) == shipped.card["matrices"][name]["nonzero"]


def test_the_controls_of_the_shipped_model():
    shipped = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    assert set(Controls.of(shipped).models) == {"untrained", "no-positions", "no-topk"}


# Each experiment gets the smallest options that give it something to measure; its findings are tested elsewhere.
SHORT = {
    "minimal_simulator": {},
    "dilution": {"prompts": 6, "offsets": 160, "nulls": ("shuffled",)},
    "distractors": {"prompts": 6, "offsets": 160},
    "agreement": {"prompts": 6, "offsets": 160},
    "causes": {"prompts": 4},
    "machine": {"short": 2, "long": 3, "prefixes": 16, "pairs": 8, "positive": 0},
    "circuit": {"prompts": 64, "draws": 2},
    "guard": {"prompts": 40, "offsets": 160},
    "mapping": {"amounts": (1, 2, 3, 4), "prompts": 4, "length": 64, "draws": 49, "wrong": 2, "rotations": 4, "cap": 2},
    "alignment": {"amounts": (1, 2, 3, 4), "prompts": 4, "length": 64, "resamples": 20, "draws": 99},
    "collapse": {"tokens": 96, "nulls": ("shuffled",)},
    "depth": {"prompts": 2, "tokens": 6},
    "composition": {"prompts": 8, "tokens": 24, "probes": 2, "resamples": 50},
    "orbits": {"prompts": 4, "window": 8, "steps": 16, "starts": 2, "iterations": 20},
}


def test_of_a_model_of_a_machine_the_suite_asks_what_it_can_answer(monkeypatch):
    monkeypatch.setattr(
        suite,
        "run",
        lambda name, model, **options: scalpel.experiments.run(
            name, model, **options, **({"prefixes": 64, "pairs": 112} if name == "machine" else {})
        ),
    )
    found = suite.run_suite("parity-mini")
    assert [result.name for result in found.results] == ["minimal_simulator", "machine"]
    machine = found.results[1]
    assert machine.verdict == "reproduced" and "Z_2" in machine.prediction["summary"]
    assert {"machine", "cayley", "eggbox", "growth"} == set(machine.figures)
    assert suite.left_out(found) == []


def test_without_libsemigroups_the_report_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "libsemigroups_pybind11", None)
    result = scalpel.experiments.run("machine", "parity-mini", prefixes=64, pairs=112)
    assert result.verdict == "reproduced" and set(result.figures) == {"machine", "growth"}
    (note,) = suite.left_out(suite.Suite([result], {}, 0.0))
    assert "Cayley graph" in note and "[algebra]" in note


@pytest.mark.slow
def test_the_whole_suite_in_short(monkeypatch):
    def short(name, model, **options):
        return scalpel.experiments.run(name, model, **options, **SHORT[name])

    def few(statistic, count, rng, resamples):
        return redraw(statistic, count, rng, 8)

    monkeypatch.setattr(suite, "run", short)
    # What decides a verdict is tested with each experiment, so the suite needs no narrow intervals.
    monkeypatch.setattr(critical, "redraw", few)
    monkeypatch.setattr(measure, "DRAWS", 1)
    seen = []
    found = suite.run_suite("bracket-mini", progress=lambda what, done: seen.append((what, done)))
    assert not found.refused
    assert [result.name for result in found.results] == scalpel.experiments.names()
    assert seen[-1] == ("done", 1.0) and [d for _, d in seen] == sorted(d for _, d in seen)
    read = json.loads(found.to_json())
    assert read["model"]["accuracy"]["all"] == found.model["accuracy"]["all"]
    assert all(result.provenance["weights_sha256"] for result in found.results[1:])


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readme_example_runs():
    """Run the first Python block of the README unchanged, except for the long experiment at its end."""
    names: dict = {}
    exec(readme_blocks()[0].split("result = ")[0], names)
    assert names["S"].shape == (4,) and names["values"].shape == (4,)
    assert torch.is_tensor(names["without"]) and not torch.equal(names["without"], names["logits"])


def test_the_readme_example_of_the_algebra_runs():
    """Run the sixth block."""
    names = {"scalpel": scalpel, "m": scalpel.CircuitGPT.from_pretrained("bracket-mini")}
    exec(readme_blocks()[5], names)
    assert names["S"].size == 3 and names["holes"].tolist() == [3]
    assert names["found"].verdict == "finite" and names["found"].semigroup().groups()[0].name == "Z_3"
    card = scalpel.CircuitGPT.from_pretrained("mod3-mini").card["machine"]
    machine = (tuple(card["letters"]), tuple(map(tuple, card["transitions"])), tuple(card["outputs"]))
    assert names["found"].machine.equivalent(scalpel.semigroup.MooreMachine(*machine))
    assert len(names["effects"].hooks) == 23


def test_the_readme_example_of_a_decoder_runs(tmp_path: Path):
    """Run the second block on a tiny model."""
    pytest.importorskip("transformers")
    model = model_of("llama").float()
    model.save_pretrained(tmp_path)
    names = {"scalpel": scalpel, "folder": tmp_path, "ids": ids_of(1, 5), "V": torch.randn(2, 1, 5, 12)}
    expected = scalpel.jacobian(model, ids_of(1, 5)).jvp(names["V"])
    block = readme_blocks()[1]
    exec(block, names)
    assert torch.allclose(names["V"], expected, atol=1e-4)
    assert names["J"].source_shape == (1, 5, 12)


def test_the_readme_example_of_a_lens_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the fifth block unchanged."""
    monkeypatch.chdir(tmp_path)
    names = {"scalpel": scalpel, "m": scalpel.CircuitGPT.from_pretrained("bracket-mini")}
    exec(readme_blocks()[4], names)
    assert names["lens"].n_prompts == 2 and 0 < names["lens"].error[0] < 1
    stored = scalpel.JacobianLens.load(tmp_path / "bracket-mini_jacobian_lens.pt")
    assert torch.equal(stored.J[0], names["lens"].J[0].half().float())


def test_the_example_of_the_guide_to_the_lens_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "jacobian_lens.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["read"].top(0, -1) != names["without"].top(0, -1)


def test_the_readme_example_of_transformers_classes_runs():
    """Run the third block unchanged."""
    pytest.importorskip("transformers")
    names: dict = {"scalpel": scalpel}
    exec(readme_blocks()[2], names)
    core = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    expected = scalpel.jacobian(core, names["batch"]["input_ids"])
    tangent = torch.ones(1, *expected.source_shape)
    assert torch.allclose(names["J"].jvp(tangent), expected.jvp(tangent), atol=1e-4)


def test_the_readme_example_of_a_gguf_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the fourth block on a tiny file with the name used there."""
    for package in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    import gguf_cases

    model = gguf_cases.llama()
    gguf_cases.write(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", gguf_cases.tensors_of(model))
    exec(readme_blocks()[3], {"folder": tmp_path / "saved"})
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    ids = ids_of(1, 5)
    *_, last = stream_layers(tmp_path / "saved", ids)
    torch.testing.assert_close(last.after, scalpel.jacobian(model.float(), ids).primal, rtol=1e-4, atol=1e-4)
