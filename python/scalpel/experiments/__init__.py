"""Experiments. Each asks one question, and each can come out either way.

``run(name, model, **options)`` gives a :class:`~scalpel.experiments.result.Result`, or raises :class:`Refused` if the
experiment can't be run on the model. ``names()`` lists the experiments.
"""

from importlib import import_module
from inspect import Parameter, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..tasks.refused import Refused

if TYPE_CHECKING:
    from .result import Result

__all__ = ["Refused", "names", "run"]

# The registry: each experiment's name and its file, in the order of the report.
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
    "composition": "composition.experiment",
    "orbits": "orbits.experiment",
}


def names() -> list[str]:
    """The names of all experiments.

    Returns:
        They are in the order of the report.

    Example:
        >>> import scalpel
        >>> scalpel.experiments.names()[:3]
        ['minimal_simulator', 'dilution', 'distractors']
    """
    return list(_FILES)


def module_of(name: str) -> ModuleType:
    """The module that holds an experiment's ``run`` and its rules. ValueError for an unknown name."""
    if name not in _FILES:
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(names())}")
    return import_module(f".{_FILES[name]}", __name__)


def run(name: str, model: Any = "bracket-mini", **options: Any) -> "Result":
    """Run one experiment on a model.

    Args:
        name: One of :func:`names`.
        model: A CircuitGPT on the CPU, or what ``CircuitGPT.from_pretrained`` takes. For "composition" also a
            transformers model that has rules, its folder, or a GGUF file.
        options: Keyword arguments of that experiment's ``run``.

    Returns:
        The prediction, the measurement, its null and the verdict.

    Raises:
        Refused: The experiment can't be run on this model; the message says why.
        ValueError: There is no such experiment or option, an option is not of its default's kind, or the model isn't
            on the CPU.

    Example:
        >>> import scalpel
        >>> result = scalpel.experiments.run("minimal_simulator", k_max=3, n_max=30, samples=3)
        >>> result.verdict
        'reproduced'
    """
    module = module_of(name)
    parameters = dict(signature(module.run).parameters)
    needs_model = parameters.pop("model").default is Parameter.empty
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f"experiment {name!r} has no option {option!r}; it has {', '.join(parameters)}")
        _check(name, option, value, parameters[option].default)
    if needs_model and hasattr(module, "opened"):  # it takes other models than a CircuitGPT, too
        needs_model, model = False, module.opened(model)
    if needs_model and isinstance(model, str):
        from ..models.circuitgpt.model import CircuitGPT

        model = CircuitGPT.from_pretrained(model)
    if needs_model:
        from ..hooks.standing import stood_for
        from .askable import check_askable

        model = stood_for(model)
        check_askable(model)
    result: Result = module.run(model, **options)
    return result


def _check(name: str, option: str, value: Any, default: Any) -> None:
    """ValueError if an option isn't of its default's kind, since options also come from the command line."""
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
    elif isinstance(default, str):
        right, kind = isinstance(value, str), "text"
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
