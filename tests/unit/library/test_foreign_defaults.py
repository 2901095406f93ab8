"""The library gives the same results in programs that change torch's default device or dtype.

Each public operation runs under other defaults of torch and must give the same bits. test_new_tensors.py searches the
source for tensors that do not name their device, and test_memory.py tests the gate to the core.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import scalpel
from circuitgpt_cases import BASE, CASES, one_thread
from operation_inputs import Given, plain
from public_operations import OPERATIONS
from scalpel.jacobians.operator import Jacobian
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.weight_files import CheckpointError

__all__ = ["one_thread"]

pytest.importorskip("transformers")
META = torch.device("meta")
DEFAULTS: dict[str, tuple[str | None, torch.dtype]] = {
    "meta": ("meta", torch.float32),
    "float64": (None, torch.float64),
    "float16": (None, torch.float16),
    "cuda and bfloat16": ("cuda", torch.bfloat16),  # without a GPU, a tensor that names no device raises
    "meta and float16": ("meta", torch.float16),
}
# The slow operations run only once, with both defaults changed.
SLOW = {
    "analyze",
    "analyze, tokens that count",
    "analyze, transformers",
    "circuits.ablation_effects",
    "circuits.ablation_effects, zero",
    "circuits.prune",
    "circuits.prune, closure",
    "experiments.run, depth",
    "lyapunov",
    "lyapunov, gpt2",
    "semigroup.extract",
    "train",
}


# Public names that are not operations: types of results and errors, and what other names are made of.
NO_OPERATION = {
    "circuits": "a package; its names are in the table",
    "experiments": "a package; its names are in the table",
    "jacobian_lens": "a package; its names are in the table",
    "semigroup": "a package; its names are in the table",
    "StreamingCovariance.all_reduce": "takes processes: tests/support/distributed_worker.py runs it under meta",
    "circuits.TASKS": "a table of functions like bracket_counting",
    "circuits.CannotDoTask": "an error",
    "experiments.Refused": "an error",
    "circuits.CircuitGraph": "what circuit_graph gives",
    "circuits.Effects": "what ablation_effects gives",
    "circuits.Measured": "a part of Pruning",
    "circuits.Pruning": "what prune gives",
    "circuits.Schedule": "an option of prune",
    "circuits.SeedCircuit": "a part of Pruning",
    "circuits.Task": "what bracket_counting gives",
    "covariance.Eigen": "what eigh gives",
    "covariance.Interval": "what leave_one_out gives",
    "covariance.StreamingCovariance": "stands in the flat list",
    "JacobianLens.from_pretrained": "downloads, and then does what load does",
    "jacobian_lens.Evaluation": "what evaluate gives",
    "jacobian_lens.Transported": "what transported gives",
    "jacobian_lens.Intervention": "what steer gives",
    "jacobian_lens.JacobianLens": "stands in the flat list",
    "jacobian_lens.Readout": "what readout gives",
    "semigroup.Extraction": "what extract gives",
    "semigroup.MooreMachine": "a part of Extraction, of plain numbers",
    "semigroup.SemigroupTooLarge": "an error",
}


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    """Set torch's defaults for the duration of the context."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# ---- every public operation ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def ordinary(given: Given) -> Callable[[str], Any]:
    """The result of an operation under torch's own defaults."""
    found: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in found:
            found[name] = plain(OPERATIONS[name](given))
        return found[name]

    return of


CASES_OF = [(name, case) for name in OPERATIONS for case in DEFAULTS if (name in SLOW) == (case == "meta and float16")]


@pytest.mark.parametrize(("name", "case"), CASES_OF, ids=[f"{name}-{case}" for name, case in CASES_OF])
def test_the_same_bits(name: str, case: str, given: Given, ordinary: Callable[[str], Any]) -> None:
    expected = ordinary(name)
    with defaults(*DEFAULTS[case]):
        found = OPERATIONS[name](given)
    assert plain(found) == expected


def test_every_public_name_is_among_them() -> None:
    known = {name.partition(",")[0] for name in OPERATIONS} | NO_OPERATION.keys()
    names = set(scalpel.__all__)
    for package in ("circuits", "covariance", "experiments", "jacobian_lens", "semigroup"):
        room = getattr(scalpel, package, None) or __import__(f"scalpel.{package}", fromlist=["x"])
        names |= {f"{package}.{name}" for name in getattr(room, "__all__", ("names", "run"))}
    for kind in (Jacobian, scalpel.JacobianLens, scalpel.StreamingCovariance, scalpel.CircuitGPT):
        names |= {f"{kind.__name__}.{name}" for name in methods_of(kind)}
    assert sorted(names - known) == []
    assert sorted(name for name in NO_OPERATION if name not in names) == []


def methods_of(kind: type) -> set[str]:
    """The public methods, including those of the package's own mixins."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("scalpel.")]
    return {name for base in own for name, value in vars(base).items() if name[0] != "_" and callable_(value)}


def callable_(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)


# ---- who watches ---------------------------------------------------------------------------------


def test_a_default_device_is_no_watcher() -> None:
    """torch's device mode affects only new tensors, so the fast path past the dispatcher stays in use."""

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3)
    assert scalpel.topk.unwatched(x)
    for device in ("cpu", "meta"):
        with defaults(device, torch.float32):
            assert scalpel.topk.unwatched(x)
            with Watcher():
                assert not scalpel.topk.unwatched(x)
    with torch.device("meta"):
        assert scalpel.topk.unwatched(x)
    with Watcher():
        assert not scalpel.topk.unwatched(x)


# ---- where a model is made -----------------------------------------------------------------------


def config_of(name: str) -> CircuitGPTConfig:
    return CircuitGPTConfig.from_dict(BASE | CASES[name])


@pytest.mark.parametrize("name", ["like_csp_yolo2", "tied", "sinusoids_odd", "bigram_learnable"])
def test_a_model_is_made_on_the_cpu_in_float32_unless_told(name: str) -> None:
    expected = plain(scalpel.CircuitGPT(config_of(name), seed=5))
    with torch.device("meta"):
        assert plain(scalpel.CircuitGPT(config_of(name), seed=5)) == expected
        assert scalpel.CircuitGPT.from_pretrained("parity-mini").device == torch.device("cpu")
    double = scalpel.CircuitGPT(config_of(name), seed=5, dtype=torch.float64)
    assert double.dtype == torch.float64 and plain(double.float()) == expected


def test_a_model_of_shapes_alone() -> None:
    before = torch.random.get_rng_state()
    model = scalpel.CircuitGPT(config_of("tied"), device="meta", dtype=torch.bfloat16)
    values = [*model.parameters(), *model.buffers()]
    assert {(value.device, value.dtype) for value in values} == {(META, torch.bfloat16)}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_of_shapes_alone_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is on meta.*on the CPU"):
        scalpel.CircuitGPT(config_of("plain"), device="meta").save_pretrained(tmp_path / "model")


def test_a_dtype_that_no_model_has() -> None:
    with pytest.raises(ValueError, match="dtype is torch.int64.*floating point"):
        scalpel.CircuitGPT(config_of("plain"), dtype=torch.int64)
    with pytest.raises(TypeError, match="dtype is 'float32'.*torch.float32"):
        scalpel.CircuitGPT(config_of("plain"), dtype="float32")  # type: ignore[arg-type]
