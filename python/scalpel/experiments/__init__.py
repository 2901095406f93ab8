"""Experiments: one file a question, each able to come out either way.

``run(name, model, **options)`` gives a :class:`Result`, or raises :class:`Refused` where the model can't be put to the
experiment; ``names()`` lists what can be run.
"""

from importlib import import_module
from inspect import Parameter, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..tasks.refused import Refused

if TYPE_CHECKING:
    from ..models.circuitgpt.model import CircuitGPT
    from .result import Result

__all__ = ["Refused", "names", "run"]

# The registry: an experiment's name and its file, in the order of the report.
_FILES = {
    "minimal_simulator": "brackets.minimal_simulator",
    "dilution": "brackets.dilution",
    "distractors": "brackets.distractors",
    "agreement": "brackets.agreement",
    "causes": "brackets.causes",
    "guard": "brackets.guard",
    "machine": "machine.experiment",
    "circuit": "machine.circuit",
    "mapping": "mapping.experiment",
    "alignment": "alignment.experiment",
    "collapse": "collapse.experiment",
    "depth": "depth.experiment",
    "orbits": "orbits.experiment",
}


def names() -> list[str]:
    """The experiments that this version has, in the order of the report."""
    return list(_FILES)


def module_of(name: str) -> ModuleType:
    """The module that holds an experiment's ``run`` and its rules. ValueError for an unknown name."""
    if name not in _FILES:
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(names())}")
    return import_module(f".{_FILES[name]}", __name__)


def run(name: str, model: "CircuitGPT | str | None" = "bracket-mini", **options: Any) -> "Result":
    """Run one experiment on a model (a CircuitGPT, or what from_pretrained takes) and return its Result.

    ``options`` are the keyword arguments of that experiment's ``run``. Refused, which says why, for a model that this
    can't be asked of; ValueError for an unknown name or option, and for a model that isn't on the CPU.
    """
    file = module_of(name)
    parameters = dict(signature(file.run).parameters)
    needs_model = parameters.pop("model").default is Parameter.empty
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f"experiment {name!r} has no option {option!r}; it has {', '.join(parameters)}")
        _check(name, option, value, parameters[option].default)
    if needs_model and isinstance(model, str):
        from ..models.circuitgpt.model import CircuitGPT

        model = CircuitGPT.from_pretrained(model)
    if needs_model:
        from .askable import check_askable

        check_askable(model)
    result: Result = file.run(model, **options)
    return result


def _check(name: str, option: str, value: Any, default: Any) -> None:
    """ValueError where an option isn't of its default's kind: options come from the command line too."""
    if isinstance(default, bool):
        right, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, tuple) and default and isinstance(default[0], str):
        right = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        kind = "a list of names"
    elif isinstance(default, tuple):
        right = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        kind = "a list of whole numbers"
    elif isinstance(default, int):
        right, kind = type(value) is int, "a whole number"
    elif isinstance(default, float):
        right, kind = type(value) in (int, float), "a number"
    elif option == "law":
        from ..guard.hole_guard import FailureLaw
        from ..semigroup import ThresholdCounter

        right = value is None or isinstance(value, ThresholdCounter | FailureLaw)
        kind = "a scalpel.semigroup.ThresholdCounter or an object with tokens_left(ids)"
    else:
        from .controls import Controls

        right, kind = value is None or isinstance(value, Controls), "a scalpel.experiments.controls.Controls"
    if not right:
        shown = list(default) if isinstance(default, tuple) else default
        example = "" if default is None else f", such as {shown}"
        raise ValueError(f"option {option!r} of {name!r} is {value!r}; it must be {kind}{example}")
