"""Search the package's source for tensors that leave their device to torch's default, and for raw addresses."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import scalpel

SOURCE = Path(scalpel.__file__).parent
# Factories whose dtype does not depend on torch's default.
WHOLE_NUMBERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
# torch.Generator is not listed, because it is on the CPU whatever the default device (test_a_generator_is_the_cpus).
FACTORIES = {function.__name__ for function in _device_constructors()}
# (file, call): the reason why this call need not name its dtype.
MAY_LACK_A_DTYPE = {
    (
        "models/circuitgpt/ablation.py",
        "torch.as_tensor(prompt, device='cpu')",
    ): "what a user gives: refused unless it is integers",
}
# Files that use addresses without passing them to a kernel.
TAKES_ADDRESSES = {
    "_native.py": "the gate, and whether an array gives its own memory through DLPack, or a copy",
    "jacobians/rows/narrow.py": "whether a weight is the same memory as before",
    "jacobians/passes.py": "whether a weight is the same memory as before",
    "lanes.py": "whether a weight is the same memory as before",
    "models/decoders/folder.py": "how far a new buffer of the CPU is from a multiple of a page",
    "models/weight_files.py": "whether two weights are tied",
}


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Yield every node of the source together with its file."""
    paths = sorted(SOURCE.rglob("*.py"))
    assert len(paths) > 100
    trees = [(path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]
    return [(file, node) for file, tree in trees for node in ast.walk(tree)]


def calls() -> Iterator[tuple[str, ast.Call]]:
    for file, node in nodes():
        if isinstance(node, ast.Call):
            yield file, node


def keyword(call: ast.Call, name: str) -> bool:
    """Whether the call sets the keyword; None does not set it."""
    given = [each.value for each in call.keywords if each.arg == name]
    return bool(given) and not (isinstance(given[0], ast.Constant) and given[0].value is None)


def makes_a_module(called: str) -> bool:
    """Whether ``called``, such as nn.Linear, is a torch class that creates parameters on some device."""
    kind = getattr(nn, called.rpartition(".")[2], None)
    return isinstance(kind, type) and "device" in inspect.signature(kind).parameters


def needs_a_dtype(file: str, call: ast.Call, called: str) -> bool:
    first = call.args[0] if call.args else None
    floats = any(isinstance(each, ast.Constant) and isinstance(each.value, float) for each in call.args)
    if called in WHOLE_NUMBERS and not floats:
        return False
    if isinstance(first, ast.Call) and ast.unparse(first.func).startswith("np."):
        return False  # an array has its own dtype
    return (file, ast.unparse(call)) not in MAY_LACK_A_DTYPE


def lacking(file: str, call: ast.Call) -> list[str]:
    """The keywords that the call leaves to torch's defaults."""
    owner, _, called = ast.unparse(call.func).rpartition(".")
    if owner == "torch" and called == "load":
        return [] if keyword(call, "map_location") else ["map_location"]
    if called == "get_slice":
        return ["another way: safetensors puts slices on torch's default device"]
    module = owner in ("nn", "torch.nn") and makes_a_module(called)
    if not module and not (owner.partition(".")[0] == "torch" and called in FACTORIES):
        return []
    wanted = ["device", *(["dtype"] if module or needs_a_dtype(file, call, called) else [])]
    return [name for name in wanted if not keyword(call, name)]


def test_every_new_tensor_says_where_it_is_and_its_dtype() -> None:
    found = [
        f"{file}:{call.lineno}: {ast.unparse(call)[:100]} lacks {', '.join(lacks)}"
        for file, call in calls()
        if (lacks := lacking(file, call))
    ]
    assert not found, "\n".join(found)


def test_no_factory_goes_by_another_name() -> None:
    """No file imports a torch factory by name, and own modules pass device and dtype to torch's constructors."""
    for file, node in nodes():
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.nn"):
            names = {alias.name for alias in node.names}
            assert not names & FACTORIES and not any(map(makes_a_module, names)), (file, names)
        if isinstance(node, ast.ClassDef) and any(makes_a_module(ast.unparse(base)) for base in node.bases):
            made = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            made = [each for each in made if ast.unparse(each.func) == "super().__init__"]
            assert made and all(keyword(each, "device") and keyword(each, "dtype") for each in made), node.name


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("torch.zeros(3)", ["device", "dtype"]),
        ("torch.zeros(3, device=None, dtype=x.dtype)", ["device"]),
        ("torch.zeros(3, device='cpu')", ["dtype"]),
        ("torch.arange(3)", ["device"]),
        ("torch.arange(0.5, 3, device='cpu')", ["dtype"]),
        ("torch.tensor([1.0], device=x.device, dtype=x.dtype)", []),
        ("torch.tensor(np.asarray(x), device='cpu')", []),
        ("nn.Linear(2, 3, device='cpu')", ["dtype"]),
        ("nn.Parameter(x)", []),
        ("x.new_zeros(3)", []),
        ("torch.zeros_like(x)", []),
        ("torch.load(path)", ["map_location"]),
    ],
)
def test_what_the_reader_of_the_source_sees(text: str, lacks: list[str]) -> None:
    (statement,) = ast.parse(text).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    assert lacking("x.py", statement.value) == lacks


def test_a_generator_is_the_cpus() -> None:
    torch.set_default_device("meta")
    try:
        assert torch.Generator().device == torch.device("cpu")
    finally:
        torch.set_default_device(None)


def test_addresses_are_taken_at_the_gate() -> None:
    takes = ("data_ptr", "__array_interface__", "ctypes")
    found = {file for file, node in nodes() if isinstance(node, ast.Attribute) and node.attr in takes}
    assert found == TAKES_ADDRESSES.keys()
