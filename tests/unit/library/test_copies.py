"""Copies and pickles of every public class behave like the original, or the error says what to do instead."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scalpel
from analysis_cases import letters
from bracket_fixtures import small_tokenizer
from circuitgpt_cases import build, one_thread, tokens
from scalpel import circuits, covariance, experiments, jacobian_lens, semigroup
from scalpel.circuits.result import Measured, Pruning, SeedCircuit
from scalpel.cli.bench import WrongAnswer
from scalpel.experiments.suite import Suite
from scalpel.guard.hole_guard import Distance, HoleReached
from scalpel.hooks.masks import watch_masks
from scalpel.jacobians.operator import Jacobian
from scalpel.jacobians.scipy_operator import JacobianLinearOperator
from scalpel.jacobians.svd import NotFinite
from scalpel.models.circuitgpt.ablation import Ablation
from scalpel.models.circuitgpt.near_ties import NearTie
from scalpel.models.weight_files import CheckpointError
from scalpel.semigroup.anchor import NoDirection, find_anchors
from scalpel.semigroup.greedy import greedy_orbits
from scalpel.tasks.held_out import NoHeldOutText
from scalpel.training.recipe import Recipe
from scalpel.training.study import StaleStudy

__all__ = ["one_thread"]


@cache
def model() -> scalpel.CircuitGPT:
    return build("like_csp_yolo2")


@cache
def ids() -> Tensor:
    return tokens(model(), 2, 4)


@cache
def jacobian(*hooks: str) -> Jacobian:
    return scalpel.jacobian(model(), ids(), *hooks)


@cache
def extraction() -> semigroup.Extraction:
    def parity(words: Any) -> list[int]:
        return [word.count("a") % 2 for word in words]

    return semigroup.extract(parity, ["a", "b"], horizon=3, prefixes=64, pairs=16, nulls=False)


@cache
def simulated() -> Any:
    return experiments.run("minimal_simulator", None, k_max=3, n_max=30, samples=3)


def rows(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@cache
def pruning() -> Pruning:
    plain = Measured(0.1, 0.9)
    one = SeedCircuit(0, ("0.attn.v:1",), 3, 0.1, True, {"mean": plain}, {"mean": plain}, plain, plain, plain, 1.5)
    graph = circuits.CircuitGraph(("a", "b"), (("a", "b", "x", 1.0),))
    return Pruning("it", "abc", "counting", "mean", 0.2, 0.9, 0.1, 40, (one,), one, graph, {"closed": True})


def shown(value: Any) -> Any:
    """Everything an object consists of, in a form that can be compared."""
    if isinstance(value, Tensor | np.ndarray):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {str(key): shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shown(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value), {name: shown(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def of_tokens(one: Any) -> Any:
    return one.encode("x = [[a, b"), one.decode([3, 4, 5]), one.vocab_size


def of_semigroup(one: semigroup.TransformationSemigroup) -> Any:
    found = one.words(), one.images, one.idempotents(), one.minimal_ideal(), one.is_aperiodic()
    return one.generators, one.limit, one.size, shown(found)


def of_state(one: covariance.StreamingCovariance) -> Any:
    before = one.count
    one.update(torch.ones(3, one.dim, dtype=torch.float64))
    # A copy folds the waiting rows, so its sums run in another order.
    found = [one.mean, *one.eigh(2), one.covariance()]
    return before, one.count, one.center, [shown(each.round(decimals=9)) for each in found]


def of_guard(one: scalpel.HoleGuard) -> Any:
    seen = torch.tensor([small_tokenizer().encode("x = [[" + ", ".join("a" * 12))])
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    return [shown(one(seen[:, :n].clone(), scores)) for n in range(12, 26)], one.distances


def of_ablated(one: Ablation) -> Any:
    with one as ablated:
        inside = ablated(ids())
    return shown(inside), shown(ablated(ids()))


@cache
def lens() -> jacobian_lens.JacobianLens:
    J = {0: rows(12, 12)}
    about = {"skip_first": 1}
    return jacobian_lens.JacobianLens(J, 3, error={0: 0.5}, about=about, model=model(), tokenizer=letters(13))


def of_lens(one: jacobian_lens.JacobianLens) -> Any:
    return shown(dict(one.J)), one.n_prompts, one.error, one.source_layers, one.d_model, one.about


def of_error(one: Exception) -> Any:
    return type(one), str(one), one.args, shown(vars(one))


def ablated_model() -> scalpel.CircuitGPT:
    with model().ablate("0.attn.v:1", "zero"):
        return copy.deepcopy(model())


ITEMS = [{"prompt": "abc", "intermediates": ["d"]}]
LABELS = np.array([0, 1, 1]), np.array([0, 0, 1])

# The class, how to make an instance, and what the instance does.
WORKS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "AbsTopK": (lambda: scalpel.AbsTopK(3), lambda one: shown(one(rows(4, 9)))),
    "CircuitGPT": (model, lambda one: (shown(one(ids())), one.card, one.config)),
    "CircuitGPT, ablated": (ablated_model, lambda one: shown(one(ids()))),
    "CircuitGPTConfig": (lambda: model().config, shown),
    "Tokenizer": (small_tokenizer, of_tokens),
    "HoleGuard": (
        lambda: scalpel.HoleGuard(
            model(), semigroup.ThresholdCounter("1/10"), tokenizer=small_tokenizer(), on_failure="stop", eos_token_id=7
        ),
        of_guard,
    ),
    "Distance": (lambda: Distance(2, 3, 4.0, False), shown),
    "NearTie": (lambda: NearTie(0, 3, "0.attn.q", 1e-6), shown),
    "Rows": (lambda: scalpel.Rows(1, [5, 3], "counts"), shown),
    "StreamingCovariance": (lambda: covariance.StreamingCovariance(4).update(rows(9, 4)), of_state),
    "StreamingCovariance, a sketch": (lambda: covariance.StreamingCovariance(8, rank=2).update(rows(30, 8)), of_state),
    "Eigen": (lambda: covariance.StreamingCovariance(4).update(rows(9, 4)).eigh(), shown),
    "DebiasedCKA": (lambda: covariance.DebiasedCKA().update(rows(9, 3), rows(9, 2)), lambda one: one.value),
    "Interval": (lambda: covariance.Interval(*rows(4, 2)), shown),
    "Lyapunov": (lambda: scalpel.lyapunov(build("plain"), ids(), 2), shown),
    "ValidityRadius": (lambda: jacobian().validity_radius(rows(96, 1).reshape(1, 2, 4, 12)), shown),
    "JacobianLens": (lens, of_lens),
    "Readout": (lambda: lens().readout(ids()[:1], k=2), lambda one: (shown(one), repr(one), one.to_json())),
    "Evaluation": (lambda: lens().evaluate(ITEMS, derangements=0), lambda one: (one.to_json(), repr(one))),
    "Transported": (
        lambda: jacobian_lens.transported(model(), [ids()[:1], ids()[1:2]], {0: rows(2, 12).float()}, skip_first=1),
        lambda one: (shown(one), shown(one.mean), shown(one.error)),
    ),
    "EdgeTable": (lambda: model().edges(), shown),
    "Ablation": (lambda: model().ablate("0.attn.v:1", "mean", reference=ids()), of_ablated),
    "Ablation, resampled": (lambda: model().ablate("0.attn.v", "resample", reference=ids()), of_ablated),
    "ThresholdCounter": (
        lambda: semigroup.ThresholdCounter("0.15", sink=2),
        lambda one: (shown(one), one.critical_length(2), one.decide(2, 11)),
    ),
    "TransformationSemigroup": (
        lambda: semigroup.TransformationSemigroup({"a": [1, 2, 0], "b": [0, 0, 2]}, identity=True, limit=99),
        of_semigroup,
    ),
    "MooreMachine": (lambda: semigroup.MooreMachine(("a", "b"), ((1, 0), (0, 1)), (False, True)), shown),
    "Extraction": (extraction, shown),
    "Anchors": (lambda: find_anchors(lambda x: 2 * x, rows(2, 3)), shown),
    "GreedyOrbits": (lambda: greedy_orbits(model(), [[1, 2], [3]], 3, steps=20), shown),
    "Task": (lambda: circuits.Task.of("it", [[1, 2], [3]], [0, 1], (1, 2)), shown),
    "CircuitGraph": (lambda: pruning().graph, shown),
    "Effects": (
        lambda: circuits.Effects({"0.attn.v": rows(2 * 3, 2).reshape(2, 3, 2).numpy()}, rows(3, 2).numpy(), *LABELS),
        lambda one: (shown(one), one.largest()),
    ),
    "Measured": (lambda: Measured(0.1, 0.9), shown),
    "Pruning": (pruning, shown),
    "SeedCircuit": (lambda: pruning().circuits[0], shown),
    "Schedule": (circuits.Schedule, shown),
    "Recipe": (Recipe, shown),
    "Result": (simulated, shown),
    "Suite": (lambda: Suite([], {"name": "x"}, 1.0, {"orbits": "no"}), lambda one: one.to_json()),
    "Config": (scalpel.show_config, lambda one: (str(one), dict(one))),
    "Refused": (lambda: experiments.Refused("no tokenizer"), of_error),
    "CannotDoTask": (lambda: circuits.CannotDoTask("accuracy 50 %"), of_error),
    "SemigroupTooLarge": (lambda: semigroup.SemigroupTooLarge(3, 4, 5), of_error),
    "HoleReached": (lambda: HoleReached(Distance(2, 20, 0.0, True), 1), of_error),
    "CheckpointError": (lambda: CheckpointError("no file"), of_error),
    "StaleStudy": (lambda: StaleStudy("old"), of_error),
    "NoDirection": (lambda: NoDirection("zero"), of_error),
    "NotFinite": (lambda: NotFinite("NaN"), of_error),
    "NoHeldOutText": (lambda: NoHeldOutText("numpy"), of_error),
    "WrongAnswer": (lambda: WrongAnswer("differs"), of_error),
}


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


@pytest.mark.parametrize("how", [pickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("name", WORKS)
def test_a_copy_behaves_as_the_original(name: str, how: Callable[[Any], Any]) -> None:
    if name.startswith("TransformationSemigroup"):
        pytest.importorskip("libsemigroups_pybind11")
    make, does = WORKS[name]
    original, expected = make(), does(make())
    twin = how(original)
    assert type(twin) is type(original) and type(original).__name__ == name.split(",")[0]
    if how is copy.copy and name.startswith("StreamingCovariance"):
        return  # it shares its state, as a shallow copy does
    assert does(twin) == expected
    assert does(original) == expected  # changing the copy did not change the original


def test_the_table_holds_every_public_class() -> None:
    listed = {name.split(",")[0] for name in WORKS} | {"Jacobian", "JacobianLinearOperator", "Intervention"}
    for home in (scalpel, semigroup, circuits, covariance, experiments, jacobian_lens):
        for name in home.__all__:
            if inspect.isclass(getattr(home, name)):
                assert name in listed, f"{home.__name__}.{name} isn't tried"


# ---- what holds a model and its pass ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["J", "J.T", "J2 @ J1", "to_scipy"])
def test_a_jacobian_says_why_it_is_not_pickled(kind: str) -> None:
    first, second = jacobian("0.resid_in", "1.resid_in"), jacobian("1.resid_in", "final_resid")
    one = {"J": first, "J.T": first.T, "J2 @ J1": second @ first, "to_scipy": first.to_scipy()}[kind]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"'0\.resid_in'.*holds the model.*scalpel\.jacobian again.*to_dense"):
            pickle.dumps(one, protocol)
    for how in (copy.copy, copy.deepcopy):
        (twin,) = how([one])
        if isinstance(one, JacobianLinearOperator):
            assert twin.J is one.J and np.array_equal(twin @ np.ones(96), one @ np.ones(96))
        else:
            assert twin is one and isinstance(twin, Jacobian)


def test_a_context_of_a_watch_says_why_it_is_not_pickled() -> None:
    for how in (pickled, copy.deepcopy):
        with pytest.raises(TypeError, match="mask_watches.*this process.*where it is entered"):
            how(watch_masks(print))


def test_an_intervention_says_why_it_is_not_pickled() -> None:
    for how in (pickled, copy.deepcopy):
        with pytest.raises(TypeError, match="an intervention can't be copied or pickled.*where it is entered"):
            how(lens().steer(1, 1.0, 0))


# ---- what a copy shares with its original -------------------------------------------------------


def test_a_model_and_its_ablation_stay_together() -> None:
    twin, ablation = pickled((model(), model().ablate("0.attn.v:1", "zero")))
    plain = model()(ids())
    with ablation as ablated:
        assert ablated is twin and not twin(ids()).equal(plain) and model()(ids()).equal(plain)
    assert twin(ids()).equal(plain)


def test_what_a_guard_has_told_is_told_to_its_copies() -> None:
    told: list[Distance] = []
    watch = scalpel.HoleGuard(
        model(), semigroup.ThresholdCounter("1/10"), tokenizer=small_tokenizer(), on_failure=told.append
    )
    seen = torch.tensor([small_tokenizer().encode("x = [[" + ", ".join("a" * 14))])
    watch(seen[:, :22].clone(), torch.randn(1, 9))
    twin = copy.deepcopy(watch)
    for one in (watch, twin):
        one(seen[:, :23].clone(), torch.randn(1, 9))
    assert len(told) == 1


def test_a_semigroup_is_pickled_by_its_generators() -> None:
    pytest.importorskip("libsemigroups_pybind11")
    seen: list[int] = []
    large = semigroup.TransformationSemigroup({"a": [1, 2, 3, 4, 5, 0], "b": [1, 0, 2, 3, 4, 5]}, progress=seen.append)
    bare = len(pickle.dumps(large))
    assert large.size == 720 and len(large.words()) == 720 and seen
    assert len(pickle.dumps(large)) == bare < 1000  # no cached results
    for how, reports in ((pickled, False), (copy.deepcopy, True), (copy.copy, True)):
        seen.clear()
        twin = how(large)
        assert "not yet counted" in repr(twin) and not seen
        assert twin.size == 720 and bool(seen) == reports and twin.words() == large.words()
    small = pickled(semigroup.TransformationSemigroup({"a": [1, 2, 3, 4, 5, 0], "b": [1, 0, 2, 3, 4, 5]}, limit=100))
    with pytest.raises(semigroup.SemigroupTooLarge, match="more than 100"):
        _ = small.size
