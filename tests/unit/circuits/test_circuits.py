"""Circuits: tasks, masks, pruning and its controls, graphs, and the closure of a circuit."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from circuitgpt_cases import build, one_thread, tokens
from scalpel.circuits import (
    CannotDoTask,
    Schedule,
    SeedCircuit,
    Task,
    bracket_counting,
    circuit_graph,
    node_hooks,
    prune,
)
from scalpel.circuits.ablations import Substitute, nodes_at, substitute
from scalpel.circuits.closure import closes_over
from scalpel.circuits.fit import refit
from scalpel.circuits.masks import learn_masks
from scalpel.circuits.measure import measure, only
from scalpel.circuits.packing import pack
from scalpel.circuits.task import answer_logits, check_able, nonsense
from scalpel.experiments.machine.circuit import FILE, examine, read_pruning, run, stored
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.models.untrained import untrained
from scalpel.tasks.bracket_words import BRACKET_WORDS

__all__ = ["one_thread"]

QUICK = Schedule(steps=40, batch=16)


@pytest.fixture(scope="module")
def model():
    return CircuitGPT.from_pretrained("bracket-mini")


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """A quick search that is too short to find a small circuit. Its mean ablations use the task's prompts."""
    task = bracket_counting(model, 48, 9)
    folder = tmp_path_factory.mktemp("prune")
    options = {"reference": (task.ids, task.mask), "target": 0.45, "prompts": 64, "schedule": QUICK}
    return prune(model, seeds=2, folder=folder, **options), folder, options


# ---- tasks ------------------------------------------------------------------------------------------


def test_prompts_come_in_pairs_that_differ_in_the_depth_alone(model):
    task = bracket_counting(model, 40, 0)
    assert task.labels.tolist() == [0, 1] * 20 and len(task) == 40
    texts = [model.tokenizer.decode(row[: end + 1]) for row, end in zip(task.ids, task.asked, strict=True)]
    for flat, nested in zip(texts[::2], texts[1::2], strict=True):
        assert nested.count("[") == flat.count("[") + 1
        assert nested.replace("[", "") == flat.replace("[", "")
        assert nested.count("[") - nested.count("]") == 2 and flat.count("[") - flat.count("]") == 1
    assert bracket_counting(model, 40, 0).ids.equal(task.ids)
    assert not bracket_counting(model, 40, 1).ids.equal(task.ids)


def test_a_part_of_a_task_is_no_wider_than_it_has_to_be(model):
    task = bracket_counting(model, 20, 0)
    short = int(task.asked.argmin())
    part = task.part(torch.tensor([short]))
    assert part.ids.shape == (1, int(task.asked[short]) + 1) and bool(part.mask.all())
    assert torch.allclose(answer_logits(model, part), answer_logits(model, task)[[short]], atol=1e-5)


def test_a_model_that_can_not_do_the_task_is_refused_with_its_accuracy(model):
    task = bracket_counting(model, 64, 0)
    assert check_able(model, task) > 0.9
    with pytest.raises(CannotDoTask, match=r"accuracy \d+% over 64 prompts \(answer 0: \d+%, answer 1: \d+%\)"):
        check_able(untrained(model), task)
    with pytest.raises(CannotDoTask):
        prune(untrained(model), prompts=32, reference=[[0, 1]])


def test_a_tokenizer_that_splits_the_answers_is_refused():
    other = CircuitGPT.from_pretrained("mod3-mini")
    with pytest.raises(ValueError, match="splits an answer of the bracket task"):
        prune(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "chess"}, "no task 'chess'; there are bracket_counting"),
        ({"ablation": "median"}, "allowed: mean, zero, resample"),
        ({"seeds": 0}, "seeds is 0"),
        ({"prompts": 3}, "prompts is 3"),
        ({"target": 0.0}, "target is 0.0"),
    ],
)
def test_bad_options(model, options, words):
    with pytest.raises(ValueError, match=words):
        prune(model, **options)


def test_bad_tasks():
    with pytest.raises(ValueError, match="one label per prompt"):
        Task.of("t", [[1], [2]], [0], (1, 2))
    with pytest.raises(ValueError, match="two or more"):
        Task.of("t", [[1]], [2], (1, 2))


def test_packed_prompts_are_their_prefixes_once():
    rows = [[1, 2, 3], [1, 2, 4, 5], [1, 2, 3], [6]]
    task = Task.of("t", rows, [0, 1, 0, 1], (0, 1))
    (packed,) = pack(task, 100)
    assert len(packed.first) == 6  # 1, 12, 123, 124, 1245, 6
    for place, row in zip(packed.asked.tolist(), packed.rows.tolist(), strict=True):
        own = packed.ancestors[place].nonzero()[:, 0]
        assert packed.ids.flatten()[packed.first[own]].tolist() == rows[row]
        assert packed.depth[own].tolist() == list(range(len(rows[row])))
    assert sorted(r for p in pack(task, 2) for r in p.rows.tolist()) == [0, 1, 2, 3]
    assert len(pack(task, 2)) > 1


# ---- masks and measures -----------------------------------------------------------------------------


def test_the_refit_is_the_best_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (200,), generator=generator)
    logits = torch.randn(200, 2, generator=generator) + 0.7 * F.one_hot(labels, 2) + torch.tensor([3.0, 0.0])
    best = refit(logits, labels)
    assert best.loss < float(F.cross_entropy(logits, labels))
    for scale, shift in ((1.02, 0.0), (0.98, 0.0), (1.0, 0.05), (1.0, -0.05)):
        moved = logits.double() * best.scale * scale + torch.tensor(best.shift) + torch.tensor([shift, 0.0])
        assert float(F.cross_entropy(moved, labels)) >= best.loss - 1e-9
    assert refit(-logits, labels).scale < 1e-2  # the scale never becomes negative
    assert refit(torch.zeros(10, 2), torch.tensor([0, 1] * 5)).loss == pytest.approx(np.log(2))


@pytest.mark.parametrize("kind", ["mean", "zero", "resample"])
def test_keeping_and_removing_are_what_ablate_does(kind):
    model = build("like_csp_yolo2")
    task = Task.of("t", [tokens(model, 1, 6, seed=i)[0].tolist() for i in range(4)], [0, 1, 0, 1], (2, 5))
    reference = [[3]]  # of one token, so that resampling has a single value to draw
    stand_in = substitute(model, kind, reference, node_hooks(model))
    every = [f"{name}:{c}" for name, width in nodes_at(model).items() for c in range(width)]
    kept = every[::3]
    with torch.no_grad():
        with only(model, kept, stand_in):
            alone = model(task.ids)
        with model.ablate([node for node in every if node not in kept], kind, reference=reference):
            assert torch.allclose(model(task.ids), alone, atol=1e-10)
        with only(model, kept, stand_in, removed=True):
            without = model(task.ids)
        with model.ablate(kept, kind, reference=reference):
            assert torch.allclose(model(task.ids), without, atol=1e-10)
        with only(model, every, stand_in):
            assert torch.allclose(model(task.ids), model(task.ids))
    assert model._interventions == []


def test_masks_find_the_node_that_carries_the_answer():
    """The two answers read a single neuron; for them every other node is noise."""
    model = build("plain", torch.float32)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
        model.transformer.h[1].mlp.c_proj.weight[3, 7] = 4.0
        model.lm_head.weight[[2, 5]] = 0.0
        model.lm_head.weight[2, 3], model.lm_head.weight[5, 3] = -3.0, 3.0
        model.transformer.h[1].attn.c_proj.weight[3] = 0.0
        model.transformer.h[0].mlp.c_proj.weight[3] = 0.0
        model.transformer.h[0].attn.c_proj.weight[3] = 0.0
        model.transformer.wte.weight[:, 3] = 0.0
        model.transformer.wpe.weight[:, 3] = 0.0
    rows = [tokens(model, 1, 5, seed=i)[0].tolist() for i in range(64)]
    ids = torch.tensor(rows)
    _, cache = model.run_with_cache(ids, names=["1.mlp.post_act"])
    neuron = cache["1.mlp.post_act"][:, -1, 7]
    task = Task.of("t", rows, (neuron > neuron.median()).long().tolist(), (2, 5))
    stand_in = Substitute("zero", {name: torch.zeros(width) for name, width in nodes_at(model).items()})
    taus = learn_masks(model, task, stand_in, Schedule(steps=150), 0)
    neurons, writes = taus["1.mlp.post_act"], taus["1.mlp.resid_delta"]
    assert int(neurons.argmax()) == 7 and float(neurons.topk(2).values[1]) < float(neurons[7]) - 0.5
    assert int(writes.argmax()) == 3
    assert all(float(tau.abs().max()) <= 1 for tau in taus.values())
    assert all(p.requires_grad for p in model.parameters())


# ---- pruning ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_circuit_does_what_its_controls_do_not(found):
    pruning, _, options = found
    assert len(pruning.circuits) == 2 and pruning.total == 2816
    for circuit in pruning.circuits:
        assert circuit.reached and circuit.loss <= options["target"]
        assert 0 < len(circuit.nodes) < pruning.total
        assert circuit.kept["mean"].loss < circuit.random.loss
        assert circuit.removed["mean"].loss > circuit.random_removed.loss + 0.05
        assert circuit.nonsense.loss > circuit.kept["mean"].loss
        assert circuit.edges == circuit_graph(CircuitGPT.from_pretrained("bracket-mini"), circuit.nodes).weights
    assert len(pruning.best.nodes) == min(len(circuit.nodes) for circuit in pruning.circuits)
    assert 0 < pruning.overlap() < 1
    assert pruning.shared()[0][1] == 2


def test_its_loss_is_that_of_ablating_everything_else(model, found):
    pruning, _, options = found
    task = bracket_counting(model, 64, 0)
    every = [f"{name}:{c}" for name, width in nodes_at(model).items() for c in range(width)]
    kept = set(pruning.best.nodes)
    rest = [node for node in every if node not in kept]
    with torch.no_grad(), model.ablate(rest, "mean", reference=options["reference"]):
        loss = refit(answer_logits(model, task), task.labels).loss
    assert loss == pytest.approx(pruning.best.loss, abs=1e-3)


def test_a_stopped_search_goes_on_and_another_is_refused(model, found):
    pruning, folder, options = found
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.startswith("seed-")}
    again = prune(model, seeds=2, folder=folder, **options)
    assert [asdict(c) for c in again.circuits] == [asdict(c) for c in pruning.circuits]
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.startswith("seed-")}
    assert before == after and len(before) == 2
    with pytest.raises(ValueError, match=r"another search \(options.target 0.45 there, 0.3 here\)"):
        prune(model, seeds=2, folder=folder, **(options | {"target": 0.3}))
    assert SeedCircuit.from_dict(json.loads((folder / "seed-0.json").read_text())) == pruning.circuits[0]


def test_what_it_closes_over_is_measured_beside_what_nothing_does(found):
    closure = found[0].closure
    assert set(closure["rates"]) == {"x", "[", "]"}
    assert closure["whole_size"] == 8  # counts the machine's three states and an invalid one
    assert set(closure["rates"]["["]["cells"]) == {"0"}  # a row can only be opened between rows
    for letter, rate in closure["rates"].items():
        nothing = closure["rates_of_nothing"][letter]["worst_cell"]
        assert (letter in closure["letters"]) == (rate["worst_cell"] <= 0.05 < nothing)


def test_the_whole_model_closes_over_more_than_a_constant_does(model):
    task = bracket_counting(model, 256, 3)
    stand_in = substitute(model, "mean", None, node_hooks(model))
    every = [f"{name}:{c}" for name, width in nodes_at(model).items() for c in range(width)]
    whole = closes_over(model, every, stand_in, task, BRACKET_WORDS)
    assert whole["letters"] == ["x", "[", "]"] and whole["states_kept"] > whole["states_kept_by_nothing"] + 0.1
    nothing = closes_over(model, [], stand_in, task, BRACKET_WORDS)
    assert nothing["letters"] == [] and nothing["size"] == 0


def test_nonsense_labels_go_by_the_beginning_and_could_be_learned(model):
    one, other = (nonsense(bracket_counting(model, 64, seed), 5) for seed in (0, 1))
    said = {}
    for task in (one, other):
        assert set(task.labels.tolist()) == {0, 1}
        for row in range(len(task)):
            assert said.setdefault(task.prompt(row)[1], int(task.labels[row])) == int(task.labels[row])
    assert not one.labels.equal(bracket_counting(model, 64, 0).labels)


def test_new_prompts_are_new(model):
    old = bracket_counting(model, 600, 0)
    new = bracket_counting(model, 600, 1).unseen(old)
    seen = {old.prompt(row) for row in range(len(old))}
    prompts = [new.prompt(row) for row in range(len(new))]
    assert len(set(prompts)) == len(prompts) < 600 and not seen & set(prompts)
    assert (torch.bincount(new.groups) % 2 == 0).all()  # pairs stay together
    with pytest.raises(ValueError, match="seen before"):
        old.unseen(old)


def test_a_resumed_search_draws_what_an_unbroken_one_does(tmp_path):
    model = CircuitGPT.from_pretrained("bracket-mini")
    task = bracket_counting(model, 32, 9)
    options = {"ablation": "resample", "reference": (task.ids, task.mask), "target": 0.6, "prompts": 48}
    options["schedule"] = Schedule(steps=8, batch=8)

    def make(*given):  # this name has no words, so the closure is not measured
        return replace(bracket_counting(*given), name="brackets")

    whole = prune(model, make, seeds=2, folder=tmp_path, **options)
    (tmp_path / "seed-1.json").unlink()  # as if it had been stopped before
    first = prune(model, make, seeds=1, folder=tmp_path, **options)
    resumed = prune(model, make, seeds=2, folder=tmp_path, **options)
    assert [c.nodes for c in resumed.circuits] == [c.nodes for c in whole.circuits]
    assert [c.nodes for c in first.circuits] == [whole.circuits[0].nodes] and (tmp_path / "seed-1.json").exists()


def test_what_no_circuit_can_be_sought_for(model):
    with pytest.raises(ValueError, match="answer 1 is right for no prompt"):
        check_able(model, Task.of("t", [[1, 2]], [0], (2, 5)))
    with pytest.raises(ValueError, match="a prompt is empty"):
        Task.of("t", [[1], []], [0, 1], (2, 5))
    with pytest.raises(ValueError, match="not all different"):
        Task.of("t", [[1], [2]], [0, 1], (2, 2))
    with pytest.raises(ValueError, match="is not a token"):
        answer_logits(model, Task.of("t", [[1], [2]], [0, 1], (2, 99_999)))
    with pytest.raises(ValueError, match="no layer"):
        prune(build("no_layer"), lambda model, prompts, seed: Task.of("t", [[1], [2]], [0, 1], (2, 5)))
    broken = CircuitGPT.from_pretrained("bracket-mini")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="aren't finite"):
        prune(broken, reference=[[0]])


def test_the_graph_has_the_weights_between_kept_nodes(model):
    nodes = ["0.attn.act_in:5", "0.attn.q:3", "0.attn.k:3", "0.attn.v:2", "0.attn.resid_delta:9", "1.attn.act_in:9"]
    graph = circuit_graph(model, nodes)
    weights = {(a, b): w for a, b, kind, w in graph.edges if kind == "weight"}
    attention = model.transformer.h[0].attn
    c_attn, c_proj = attention.c_attn.weight.detach(), attention.c_proj.weight.detach()
    expected = {
        ("0.attn.act_in:5", "0.attn.q:3"): c_attn[3, 5],
        ("0.attn.act_in:5", "0.attn.k:3"): c_attn[128 + 3, 5],
        ("0.attn.act_in:5", "0.attn.v:2"): c_attn[256 + 2, 5],
        ("0.attn.v:2", "0.attn.resid_delta:9"): c_proj[9, 2],
    }
    assert weights == {pair: pytest.approx(float(w)) for pair, w in expected.items() if float(w) != 0}
    links = {(a, b, kind) for a, b, kind, w in graph.edges if w is None}
    assert ("0.attn.resid_delta:9", "1.attn.act_in:9", "residual") in links
    assert ("0.attn.k:3", "0.attn.q:3", "score") in links and ("0.attn.q:3", "0.attn.v:2", "mix") in links
    assert graph.weights == len(weights)


# ---- the experiment ---------------------------------------------------------------------------------


def test_the_stored_search_is_read_back_and_judged(model, found, tmp_path):
    pruning = found[0]
    (tmp_path / FILE).write_text(pruning.to_json())
    read = read_pruning(tmp_path / FILE)
    assert read.best == pruning.best and read.graph == pruning.graph and read.circuits == pruning.circuits
    result = examine(model, read, prompts=48, draws=3)
    assert result.name == "circuit" and len(result.null["random_losses"]) == 3
    assert result.measured["kept"]["mean"]["loss"] > 0
    assert result.figures["circuit"]["kind"] == "layered"
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="make it anew with scalpel prune"):
        read_pruning(tmp_path / "broken.json")


def test_a_circuit_that_is_none_is_not_reproduced(model, found):
    pruning = found[0]
    rng = np.random.default_rng(0)
    nodes = tuple(f"0.mlp.post_act:{c}" for c in rng.permutation(512)[:60])
    wrong = replace(pruning, best=replace(pruning.best, nodes=nodes), graph=None)
    result = examine(model, wrong, prompts=48, draws=3)
    assert result.verdict == "not reproduced"


def test_without_a_search_it_is_not_testable(tmp_path):
    bare = CircuitGPT.from_pretrained("bracket-mini")
    bare.folder = tmp_path
    result = run(bare)
    assert result.verdict == "not testable here" and "scalpel prune" in result.measured["summary"]


def test_a_search_of_other_weights_is_not_taken(model, tmp_path):
    shipped = stored(model)
    assert shipped is not None and shipped.fingerprint
    other = CircuitGPT.from_pretrained("bracket-mini")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert stored(other) is None


def test_the_shipped_circuit_does_the_task_on_new_prompts(model):
    shipped = stored(model)
    assert len(shipped.circuits) >= 10 and shipped.best.reached
    task = bracket_counting(model, 96, 4242)
    stand_in = substitute(model, "mean", None, node_hooks(model))
    assert measure(model, shipped.best.nodes, stand_in, task).loss < 0.35
    assert measure(model, shipped.best.nodes, stand_in, task, removed=True).loss > 0.5
