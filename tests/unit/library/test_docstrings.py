"""Public names explain themselves: their purpose, arguments, results and errors, and an example that runs.

The public names are those that a package of the library lists in `__all__`, the classes that public functions return,
and the public methods of all these classes. Whether a sentence is clear only a reader can say; what can be checked by
rule is checked here:

- The docstring begins with one sentence that stands on one line and ends in a full stop.
- `Args:` has an entry for each parameter (for a dataclass or a NamedTuple: `Attributes:` for each field).
- `Returns:` (or `Yields:`) stands wherever something is returned.
- `Raises:` names each exception that the body itself raises.
- `Example:` holds a doctest, and all doctests run. A method may instead be shown in the example of its class.

In examples, `scalpel`, `torch` and `np` are already imported.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import gguf_cases
import scalpel
from circuitgpt_cases import one_thread

__all__ = ["one_thread"]

# Packages inside a room that README shows, and the classes that public functions return.
PACKAGES = ("models.circuitgpt", "models.gguf", "models.transformers_classes")
RETURNED = (
    "experiments.result.Result",
    "jacobians.operator.Jacobian",
    "jacobians.stream.StreamedLayer",
    "jacobians.stream.stream_layers",
    "jacobians.validity.ValidityRadius",
    "jacobians.depth.lyapunov.Lyapunov",
    "semigroup.greens.EggBox",
    "semigroup.greens.Greens",
    "semigroup.greens.Group",
    "streams.saved.Stored",
)
NOT_LISTED = {"cli": "its public face is the command line"}
# Examples that take longer than a second, and why they cannot be quicker.
SLOW: dict[str, str] = {
    "circuits.prune": "each search measures a hundred circuits",
}

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
HEADING = re.compile(r"^([A-Z][A-Za-z]+):$", re.MULTILINE)


# ---- the public names ----------------------------------------------------------------------------


def packages() -> Iterator[ModuleType]:
    """The library itself and each of its packages that lists its public names."""
    yield scalpel
    rooms = [room.name for room in pkgutil.iter_modules(scalpel.__path__) if room.ispkg]
    for name in [*rooms, *PACKAGES]:
        package = import_module(f"scalpel.{name}")
        if hasattr(package, "__all__") and name not in NOT_LISTED:
            yield package


def exported() -> Iterator[tuple[str, Any]]:
    """The name and the object of each function and class that is public."""
    for package in packages():
        for name in package.__all__:
            yield f"{package.__name__}.{name}", getattr(package, name)
    for name in RETURNED:
        module, _, attribute = name.rpartition(".")
        yield f"scalpel.{name}", getattr(import_module(f"scalpel.{module}"), attribute)


def library_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "scalpel"]


def methods_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties but those that a class outside the library declares and documents."""
    foreign = [base for base in kind.__mro__ if base not in library_bases(kind)]
    seen = set()
    for base in library_bases(kind):
        for name, value in vars(base).items():
            value = getattr(value, "__func__", value)
            if name[0] == "_" or name in seen or not isinstance(value, FunctionType | property | cached_property):
                continue
            seen.add(name)
            if name == "forward" or not any(name in vars(other) for other in foreign):
                yield name, value


def public() -> dict[str, Documented]:
    names: dict[str, Documented] = {}
    known = set()
    for name, value in exported():
        value = inspect.unwrap(value) if callable(value) else value
        if not isinstance(value, FunctionType | type) or value in known:
            continue
        known.add(value)
        short = name.removeprefix("scalpel.")
        names[short] = Documented(value)
        if isinstance(value, type):
            names |= {f"{short}.{method}": Documented(body, value) for method, body in methods_of(value)}
    return names


# ---- what a docstring must have ------------------------------------------------------------------


class Documented:
    """A function, class or method with its docstring taken apart into sections."""

    def __init__(self, value: Any, owner: type | None = None) -> None:
        self.value, self.owner = value, owner
        self.is_class = isinstance(value, type)
        self.is_property = isinstance(value, property | cached_property)
        # A dataclass and a NamedTuple inherit generated docstrings, which say nothing.
        self.text = inspect.cleandoc((vars(value).get("__doc__") if self.is_class else value.__doc__) or "")
        pieces = HEADING.split(self.text)
        self.sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))

    def faults(self) -> list[str]:
        if not self.text or self.text.startswith(f"{getattr(self.value, '__name__', '')}("):
            return ["it has no docstring"]
        return [*self._first_line(), *self._arguments(), *self._result(), *self._errors(), *self._example()]

    def _first_line(self) -> Iterator[str]:
        first, *others = self.text.split("\n", 2)
        if not re.fullmatch(r".*[^.]\.", first) or (others and others[0]):
            yield f"the first line is not one sentence with a full stop: {first!r}"
        if re.search(r"[.!?] [A-Z]", first):
            yield f"the first line is more than one sentence: {first!r}"

    def _arguments(self) -> Iterator[str]:
        section, names = "Args", self._parameters()
        if self.is_class and (fields := fields_of(self.value)):
            section, names = "Attributes", fields
        text = self.sections.get(section, "")
        for name in names:
            if not re.search(rf"^ +\*{{0,2}}{name}( \(.+?\))?: *\S", text, re.MULTILINE):
                yield f"{section} does not name {name}"

    def _parameters(self) -> list[str]:
        functions = [body for body in self._bodies() if body.__name__ in ("__init__", "__new__") or not self.is_class]
        if not functions:
            return []
        return [name for name in inspect.signature(functions[0]).parameters if name not in ("self", "cls")]

    def _result(self) -> Iterator[str]:
        if self.is_class or self.is_property:
            return
        returned = str(self.value.__annotations__.get("return", ""))
        if returned not in ("None", "NoReturn") and not self.sections.keys() & {"Returns", "Yields"}:
            yield "Returns is missing"

    def _errors(self) -> Iterator[str]:
        text = self.sections.get("Raises", "")
        for name in sorted({name for body in self._bodies() for name in raised_in(body)}):
            if not re.search(rf"^ +{name}: *\S", text, re.MULTILINE):
                yield f"Raises does not name {name}"

    def _example(self) -> Iterator[str]:
        plain_record = self.is_class and (fields_of(self.value) or issubclass(self.value, BaseException))
        if self.is_property or plain_record or self.examples():
            return
        if self.owner and f".{self.value.__name__}(" in (Documented(self.owner).sections.get("Example") or ""):
            return
        yield "Example with a doctest is missing"

    def _bodies(self) -> list[FunctionType]:
        """The functions whose code the docstring speaks for."""
        if isinstance(self.value, property):
            return [self.value.fget] if self.value.fget else []
        if isinstance(self.value, cached_property):
            return [self.value.func]
        if not self.is_class:
            return [self.value]
        own = (vars(base).get(name) for base in library_bases(self.value) for name in ("__init__", "__post_init__"))
        return [
            body
            for body in own
            if isinstance(body, FunctionType) and inspect.getsourcefile(body) == inspect.getsourcefile(self.value)
        ]

    def examples(self) -> list[doctest.Example]:
        text = self.sections.get("Example", "") + self.sections.get("Examples", "")
        return doctest.DocTestParser().get_examples(text)


def fields_of(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.name[0] != "_"]
    return list(getattr(kind, "_fields", ()))


def raised_in(function: FunctionType) -> Iterator[str]:
    """The exceptions that a function's own statements raise by name; functions inside it are not looked at."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return
    waiting: list[ast.AST] = list(tree.body[0].body)  # type: ignore[attr-defined]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id[0].isupper():
                yield raised.id
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


PUBLIC = public()
WITH_EXAMPLES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, documented in PUBLIC.items()
    if documented.examples()
]


# ---- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name: str) -> None:
    faults = PUBLIC[name].faults()
    assert not faults, f"the docstring of {name}: {'; '.join(faults)}"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may save files
    if name.startswith("models.gguf"):
        pytest.importorskip("gguf")
        gguf_cases.qwen(tmp_path / "model.gguf", version=2)  # the file that these examples read
    names = {"scalpel": scalpel, "torch": torch, "np": np}
    example = doctest.DocTest(PUBLIC[name].examples(), names, name, None, None, None)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    runner.run(example, out=report.append)
    assert not report, "".join(report)


def test_lists_name_what_is_public() -> None:
    assert sorted(SLOW.keys() - PUBLIC.keys()) == []
