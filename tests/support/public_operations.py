"""Every public operation, called once on small inputs that state their device and dtype.

The table has one line per operation. test_foreign_defaults.py runs it in programs with other torch defaults, and checks
that no public name is missing: a new name needs one line here.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import scalpel
from analysis_cases import SIZES
from circuitgpt_cases import BASE, CASES
from lens_operations import LENS_OPERATIONS
from operation_inputs import Given, drawn
from scalpel.analysis import analyze
from scalpel.circuits import Schedule, node_hooks
from scalpel.circuits.ablations import substitute
from scalpel.circuits.closure import closes_over
from scalpel.circuits.task import answer_logits
from scalpel.cli import bench
from scalpel.covariance import DebiasedCKA, leave_one_out
from scalpel.jacobians.stream import stream_layers
from scalpel.models.circuitgpt.ablation import hook_means
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.untrained import untrained
from scalpel.semigroup.anchor import block_map, find_anchors, norm_growth, spectral_radius
from scalpel.semigroup.greedy import greedy_orbits
from scalpel.tasks.bracket_words import BRACKET_WORDS
from scalpel.training.loop import train
from scalpel.training.machines import MACHINES, MachineCourse, machine_recipe


def generate(g: Given, **options: Any) -> Tensor:
    return g.brackets.generate(g.prompt, 3, **options)


def products(g: Given, model: Any, **options: Any) -> list[Tensor]:
    J = g.J(model, **options)
    V = g.tangents(J, 17)
    return [J.primal, J.jvp(V), J.vjp(drawn(17, *J.target_shape, seed=3))]


def of_a_module(g: Given) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        J = scalpel.jacobian(g.plain, g.plain_x, "first", "second")
        return [J.jvp(g.tangents(J)), J.to_dense()]


def composed(g: Given) -> list[Tensor]:
    J = scalpel.jacobian(g.model, g.ids, "1.resid_in", "final_resid") @ scalpel.jacobian(
        g.model, g.ids, "0.resid_in", "1.resid_in"
    )
    v = drawn(J.shape[1])
    return [J @ v, J.T @ (J @ v), J.H @ drawn(J.shape[0], 2)]


def through_scipy(g: Given) -> list[np.ndarray]:
    A = g.J().to_scipy()
    rng = np.random.default_rng(0)
    return [
        A @ rng.normal(size=A.shape[1]),
        A.T @ rng.normal(size=A.shape[0]),
        A.matmat(rng.normal(size=(A.shape[1], 2))),
    ]


def large_svd(g: Given) -> list[Tensor]:
    """An operator that is never expanded to a dense matrix."""
    J = scalpel.jacobian(g.brackets, g.prompt, "0.resid_in", "final_resid")
    assert min(J.shape) > 256
    return list(J.svd(2))


def gradient(g: Given) -> Tensor:
    x = g.x.clone().requires_grad_()
    scalpel.AbsTopK(3)(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def compiled(g: Given) -> Tensor:
    with torch.no_grad():
        return torch.compile(scalpel.AbsTopK(3), backend="eager")(g.x)


def no_gradient(operation: Callable[[Given], Any]) -> Callable[[Given], Any]:
    return torch.no_grad()(operation)


def ablated(g: Given, kind: str, **options: Any) -> Tensor:
    with torch.no_grad(), g.model.ablate(["0.attn.v:3", "1.mlp.post_act"], kind, **options):
        return g.model(g.ids)


def hooked(g: Given) -> Tensor:
    with torch.no_grad():
        return g.model.run_with_hooks(g.ids, [("1.resid_in", lambda value, name: value * 2)])


def guarded(g: Given) -> Any:
    reports: list[Any] = []
    guard = scalpel.HoleGuard(g.brackets, scalpel.semigroup.ThresholdCounter("1/8"), on_failure=reports.append)
    out = generate(g, processors=[guard])
    guard = scalpel.HoleGuard(g.brackets, scalpel.semigroup.ThresholdCounter("1/2"), on_failure="stop", eos_token_id=0)
    return out, reports, guard.distance("x = [[1, 2"), generate(g, processors=[guard])


def merged(g: Given, rank: int | None = None, **options: Any) -> scalpel.StreamingCovariance:
    first, second = (scalpel.StreamingCovariance(8, rank, **options).update(part) for part in g.rows.split(20))
    return first.merge(second)


def subtracted(g: Given) -> scalpel.StreamingCovariance:
    return copy.deepcopy(g.exact()).subtract(g.states[0])


def sketched(g: Given, method: Any) -> Any:
    state = scalpel.StreamingCovariance(8, 2, method=method)
    for part in g.rows.repeat(4, 1).split(7):
        state.update(part)
    return state, state.eigh(), state.covariance(), state.mean, state.effective_rank_bounds(), state.stable_rank()


def wide_state(g: Given) -> Any:
    """Rows wide enough that eigenvectors are computed iteratively and that huge pages are requested."""
    state = scalpel.StreamingCovariance(300).update(drawn(400, 300, seed=4))
    return state.eigh(3)


def saved(g: Given, state: scalpel.StreamingCovariance) -> Any:
    state.save(path := g.new("saved"))
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}


def scikit(g: Given) -> Any:
    state = scalpel.StreamingCovariance(8).partial_fit(g.rows)
    variances = state.explained_variance_, state.explained_variance_ratio_
    return state.components_, *variances, state.mean_, state.n_samples_seen_


def similarity(g: Given) -> tuple[float, tuple[float, float]]:
    found = DebiasedCKA()
    for part in g.rows.split(20):
        found.update(part, part[:, :3])
    return found.value, found.interval()


def pickled(g: Given) -> scalpel.StreamingCovariance:
    return pickle.loads(pickle.dumps(g.exact(rank=2)))


def collected(g: Given, model: Any, ids: Tensor, hooks: list[str], **options: Any) -> Any:
    return dict(scalpel.collect(model, [ids, ids], hooks, progress=False, **options))


def streamed(g: Given, folder: Path) -> list[Tensor]:
    V, found = None, []
    for layer in stream_layers(folder, g.decoder_ids):
        V = layer.jvp(drawn(2, *layer.before.shape, dtype=layer.before.dtype) if V is None else V)
        found += [layer.after, layer.vjp(V)]
    return found


def saved_model(g: Given) -> list[bytes]:
    g.model.save_pretrained(folder := g.new("model"))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def built(g: Given, name: str, **options: Any) -> Any:
    model = scalpel.CircuitGPT(CircuitGPTConfig.from_dict(BASE | CASES[name]), seed=3, **options)
    with torch.no_grad():
        return model, model(g.ids)


def loaded(g: Given, source: Any, ids: Tensor, **options: Any) -> Any:
    model = scalpel.CircuitGPT.from_pretrained(source, **options)
    with torch.no_grad():
        return model, model(ids)


def own_answers(model: scalpel.CircuitGPT, prompts: int, seed: int) -> scalpel.circuits.Task:
    """Choose the answer among two tokens that the model itself prefers, so that it solves the task."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(model.config.vocab_size, (prompts, 5), generator=generator, device="cpu").tolist()
    task = scalpel.circuits.Task.of("own answers", rows, [0] * prompts, (1, 2))
    return task.relabelled(answer_logits(model, task).argmax(-1).detach(), "own answers")


def pruned(g: Given) -> Any:
    found = scalpel.circuits.prune(
        g.model, own_answers, seeds=1, prompts=16, target=0.3, schedule=Schedule(steps=3, batch=4), ablation="zero"
    )
    return [(c.nodes, c.edges, c.loss, c.kept, c.removed, c.random, c.nonsense) for c in found.circuits]


def closed_over(g: Given) -> Any:
    stand_in = substitute(g.brackets, "mean", (g.task.ids, g.task.mask), node_hooks(g.brackets))
    nodes = [f"{hook}:{i}" for hook in node_hooks(g.brackets) for i in range(8)]
    sizes = {"horizon": 3, "prefixes": 16, "pairs": 4}
    return closes_over(g.brackets, nodes, stand_in, g.task, BRACKET_WORDS, **sizes)


def algebra(g: Given) -> Any:
    S = scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0], "hold": [0, 1]})
    return S.size, S.words(), S.is_aperiodic(), S.greens().egg_boxes, S.idempotents(), S.orbit(0)


def extracted(g: Given) -> Any:
    card = g.flip_flop.card["machine"]
    found = scalpel.semigroup.extract(
        g.flip_flop, card["letters"], card["outputs"], horizon=1, prefixes=16, pairs=8, nulls=True
    )
    return found.verdict, found.machine, found.growth, found.conflict, found.fidelity, found.nulls


def anchors(g: Given) -> Any:
    function = block_map(g.model)
    found = find_anchors(function, drawn(2, 1, 12), radius=3.0, steps=12)
    return found, norm_growth(function, drawn(2, 1, 12), 3), spectral_radius(function, found.directions[0], radius=3.0)


def trained(g: Given) -> Any:
    machine = MACHINES["parity-mini"].machine
    recipe = replace(machine_recipe(machine, 4, 0), batch=8)
    return train(recipe, MachineCourse(recipe, machine), g.new("training")).model


def analysis(g: Given, model: Path, **options: Any) -> Any:
    found = analyze(
        model,
        g.text,
        g.new("analysis"),
        **(SIZES | {"length": 6, "stretches": 2, "chunks": 1, "tangents": 2} | options),
    )
    return found.trained, found.untrained, found.spectra


def experiment(name: str, **options: Any) -> Callable[[Given], Any]:
    def run(g: Given) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = scalpel.experiments.run(name, g.brackets, **options)
        return result.prediction, result.measured, result.interval, result.null, result.verdict

    return run


def benched(g: Given) -> Any:
    for case in bench.cases(quick=True):
        case.check()
        case.ours()
        case.peer()
    return None


OPERATIONS: dict[str, Callable[[Given], Any]] = {
    "__version__": lambda g: scalpel.__version__,
    "show_config": lambda g: scalpel.show_config(),
    # TopK
    "topk_mask": lambda g: scalpel.topk_mask(g.x, 3),
    "topk_mask, out": lambda g: scalpel.topk_mask(g.x, 3, out=torch.empty(4, 9, dtype=torch.bool, device="cpu")),
    "topk_mask, numpy": lambda g: scalpel.topk_mask(g.x.numpy(), 3),
    "keep_topk": lambda g: scalpel.keep_topk(g.x, 3),
    "keep_topk, columns": lambda g: scalpel.keep_topk(g.x.T, 3, by="value", out=torch.empty_like(g.x).T),
    "keep_topk, vmap": lambda g: torch.func.vmap(lambda row: scalpel.keep_topk(row, 3))(g.x),
    "topk_indices": lambda g: scalpel.topk_indices(g.x, 3),
    "AbsTopK": lambda g: scalpel.AbsTopK(3)(g.x),
    "AbsTopK, gradient": gradient,
    "AbsTopK, compiled": compiled,
    "reference": lambda g: (scalpel.reference.topk_mask(g.x, 3), scalpel.reference.moments(g.rows)),
    # Jacobians
    "jacobian": lambda g: products(g, g.model),
    "jacobian, non-zeros": lambda g: products(g, g.sparse),
    "jacobian, padding": lambda g: products(g, g.wide, attention_mask=g.mask),
    "jacobian, gpt2": lambda g: products(g, g.gpt2),
    "jacobian, llama": lambda g: products(g, g.llama, positions=[1, 3]),
    "jacobian, module": of_a_module,
    "Jacobian.jvp": lambda g: (J := g.J(positions=[0, 2])).jvp(g.tangents(J)),
    "Jacobian.vjp": lambda g: (J := g.J(positions=[0, 2])).vjp(g.tangents(J.T)),
    "Jacobian.__matmul__": composed,
    "Jacobian.svd": lambda g: g.J().svd(3),
    "Jacobian.svd, large": large_svd,
    "Jacobian.spectrum": lambda g: g.J(positions=-1).spectrum(3),
    "Jacobian.to_scipy": through_scipy,
    "Jacobian.to_dense": lambda g: [g.J().to_dense(), g.J(positions=(0, -1)).to_dense()],
    "Jacobian.validity_radius": lambda g: g.J().validity_radius(g.tangents(g.J())),
    "Jacobian.validity_radius, llama": lambda g: g.J(g.llama).validity_radius(g.tangents(g.J(g.llama))),
    "lyapunov": lambda g: scalpel.lyapunov(g.model, g.ids[:1], 2),
    "lyapunov, gpt2": lambda g: scalpel.lyapunov(g.gpt2, g.decoder_ids[:1], 2, positions=-1),
    "stream_layers": lambda g: streamed(g, g.llama_folder),
    "stream_layers, yarn": lambda g: streamed(g, g.yarn_folder),
    **LENS_OPERATIONS,
    # covariances
    "StreamingCovariance": lambda g: (s := g.exact(), s.covariance(), s.mean, s.eigh(), s.eigh(2)),
    "StreamingCovariance, float32": lambda g: g.exact(dtype=torch.float32, center=False).eigh(2),
    "StreamingCovariance, numpy": lambda g: scalpel.StreamingCovariance(8).update(g.rows.numpy()).covariance(),
    "StreamingCovariance, wide": wide_state,
    "StreamingCovariance, tracker": lambda g: sketched(g, "tracker"),
    "StreamingCovariance, frequent directions": lambda g: sketched(g, "frequent_directions"),
    "StreamingCovariance.covariance": lambda g: g.exact(center=False).covariance(),
    "StreamingCovariance.eigh": lambda g: [g.exact().eigh(3), g.states[0].eigh()],
    "StreamingCovariance.update": lambda g: g.exact().update(g.rows.double()).update(g.rows.bfloat16()),
    "StreamingCovariance.merge": lambda g: [merged(g), merged(g, 2), merged(g, 2, method="frequent_directions")],
    "StreamingCovariance.subtract": subtracted,
    "StreamingCovariance.contrast": lambda g: g.states[0].contrast(g.states[1], 2),
    "StreamingCovariance.principal_angles": lambda g: g.states[0].principal_angles(g.states[1], 2),
    "StreamingCovariance.eigenvalues": lambda g: [g.exact().eigenvalues(), g.states[0].eigenvalues()],
    "StreamingCovariance.explained_variance_ratio": lambda g: g.exact().explained_variance_ratio(3),
    "StreamingCovariance.effective_rank": lambda g: [g.exact().effective_rank(of) for of in ("eigen", "singular")],
    "StreamingCovariance.effective_rank_bounds": lambda g: g.exact().effective_rank_bounds(3),
    "StreamingCovariance.participation_ratio": lambda g: g.exact().participation_ratio(),
    "StreamingCovariance.stable_rank": lambda g: g.exact().stable_rank(),
    "StreamingCovariance.save": lambda g: [saved(g, g.exact()), saved(g, g.exact(rank=2))],
    "StreamingCovariance.load": lambda g: scalpel.StreamingCovariance.load(g.state_file),
    "StreamingCovariance.to": lambda g: g.exact().to("cpu"),
    "StreamingCovariance.partial_fit": scikit,
    "StreamingCovariance, pickled": pickled,
    "covariance.leave_one_out": lambda g: leave_one_out(g.states, lambda state: state.stable_rank()),
    "covariance.DebiasedCKA": similarity,
    "collect": lambda g: collected(g, g.model, g.ids, ["0.resid_in", "1.mlp.post_act.grad"]),
    "collect, groups": lambda g: collected(g, g.model, g.ids, ["0.resid_in", "1.resid_in"], memory=70000),
    "collect, llama": lambda g: collected(g, g.llama, g.decoder_ids, ["1.resid_in", "1.resid_in.grad"], rank=2),
    "Rows": lambda g: collected(
        g, g.model, g.ids, ["0.resid_in", "0.resid_in.grad"], rows=scalpel.Rows(1, g.ids[0, :2])
    ),
    # models
    "CircuitGPT": lambda g: [built(g, name) for name in ("like_csp_yolo2", "sinusoids_odd", "bigram_learnable")],
    "CircuitGPT, float64": lambda g: built(g, "plain", dtype=torch.float64),
    "CircuitGPT.forward": lambda g: g.model(g.ids, g.mask),
    "CircuitGPT.forward, non-zeros": no_gradient(lambda g: g.brackets(g.prompt)),
    "CircuitGPT.residual": lambda g: g.model.residual(g.ids, g.mask),
    "CircuitGPT.near_ties": lambda g: [tie.margin for tie in g.model.near_ties(g.ids, 0.05)],
    "CircuitGPT.unembed": lambda g: g.model.unembed(g.model.run_with_cache(g.ids)[1]["final_resid"], g.ids, (1, 2)),
    "CircuitGPT.from_pretrained": lambda g: loaded(g, "bracket-mini", g.prompt),
    "CircuitGPT.from_pretrained, folder": lambda g: loaded(g, g.checkpoint, g.ids, dtype=torch.float64),
    "CircuitGPT.save_pretrained": saved_model,
    "CircuitGPT.run_with_cache": lambda g: g.model.run_with_cache(g.ids),
    "CircuitGPT.run_with_hooks": hooked,
    "CircuitGPT.ablate, zero": lambda g: ablated(g, "zero"),
    "CircuitGPT.ablate, mean": lambda g: ablated(g, "mean", reference=[[1, 2, 3], [4, 5]]),
    "CircuitGPT.ablate, resample": lambda g: ablated(g, "resample", reference="abc"),
    "CircuitGPT.logit_attribution": lambda g: g.model.logit_attribution(g.ids, (1, 2)),
    "CircuitGPT.edges": lambda g: g.model.edges().weight,
    "CircuitGPT.generate, whole": lambda g: generate(g, use_cache=False),
    "CircuitGPT.generate": lambda g: [generate(g), generate(g, temperature=1.0, top_k=5, stop="]")],
    "CircuitGPT.hook_names": lambda g: (g.model.hook_names, str(g.model.device), str(g.model.dtype)),
    "CircuitGPTConfig": lambda g: CircuitGPTConfig.from_dict(BASE),
    "hook_means": lambda g: hook_means(g.model, [[1, 2, 3]]),
    "tokenizer.batch": lambda g: g.brackets.tokenizer.batch(["x = [", "y = [[1"], side="left"),
    "untrained": lambda g: untrained(g.flip_flop),
    "HoleGuard": guarded,
    # circuits
    "circuits.ablation_effects": lambda g: scalpel.circuits.ablation_effects(
        g.brackets, g.task, hooks=["0.attn.v", "1.attn.q", "1.mlp.resid_delta"], kind="resample"
    ),
    "circuits.ablation_effects, zero": lambda g: scalpel.circuits.ablation_effects(
        g.brackets, g.task, hooks=["0.mlp.post_act"], kind="zero"
    ),
    "circuits.bracket_counting": lambda g: scalpel.circuits.bracket_counting(g.brackets, 6, 1),
    "circuits.circuit_graph": lambda g: scalpel.circuits.circuit_graph(g.model, ["0.attn.v:1", "1.mlp.post_act:2"]),
    "circuits.node_hooks": lambda g: scalpel.circuits.node_hooks(g.model),
    "circuits.prune": pruned,
    "circuits.prune, closure": closed_over,
    # algebra
    "semigroup.ThresholdCounter": lambda g: scalpel.semigroup.ThresholdCounter("3/20").hole(4, 30),
    "semigroup.TransformationSemigroup": algebra,
    "semigroup.distances": lambda g: scalpel.semigroup.distances([[1, 2, 2, 3]], 0),
    "semigroup.reachable": lambda g: scalpel.semigroup.reachable([[1, 2, 2, 3]], 0),
    "semigroup.unreachable": lambda g: scalpel.semigroup.unreachable([[1, 2, 2, 3]], 0),
    "semigroup.orbit_shapes": lambda g: scalpel.semigroup.orbit_shapes([1, 2, 2, 3]),
    "semigroup.extract": extracted,
    "anchors": anchors,
    "greedy_orbits": lambda g: greedy_orbits(g.brackets, [[1, 2, 3], [4]], window=6, steps=6),
    # everything that builds on the above
    "train": trained,
    "analyze": lambda g: analysis(g, g.checkpoint),
    "analyze, transformers": lambda g: analysis(g, g.llama_folder),
    "analyze, streamed": lambda g: analysis(g, g.llama_folder, stream=True),
    "analyze, tokens that count": lambda g: analysis(g, g.llama_folder, skip_first=1, skip_special=True),
    "bench": benched,
    "experiments.names": lambda g: scalpel.experiments.names(),
    "experiments.run": experiment("minimal_simulator", k_max=2, n_max=20, samples=3),
    "experiments.run, composition": experiment("composition", prompts=8, tokens=5, skip_first=1, probes=1, resamples=9),
    "experiments.run, depth": experiment("depth", prompts=2, tokens=3, directions=1, draws=1, nulls=[]),
}
