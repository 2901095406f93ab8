"""The choice of a CPU target, the stub file of the native module, and the build information."""

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import scalpel
from cases import COMPILED_FOR, SUPPORTED
from scalpel import _core

# Runs a kernel through the native module only, which starts much faster than torch.
KERNEL = """
import array, sys
import scalpel._core as core
x, out = array.array("f", [3, -5, 1, 4]), array.array("q", [9, 9])
core.topk_indices((x.buffer_info()[0], "float32", (1, 4), (4, 1)), 2, False,
                  (out.buffer_info()[0], "int64", (1, 2), (2, 1)))
assert list(out) == [1, 3], out
print(core.active_target(), *(name for name, (_, n) in core.kernel_calls()["topk"].items() if n))
"""


def run_kernel(target: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "SCALPEL_TARGET"}
    if target is not None:
        environment["SCALPEL_TARGET"] = target
    return subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("target", SUPPORTED)
def test_environment_forces_a_target(target: str) -> None:
    done = run_kernel(target)
    assert done.stdout.split() == [target, target], done.stderr


@pytest.mark.parametrize("unset", [None, ""])
def test_default_is_the_first_supported_target(unset: str | None) -> None:
    done = run_kernel(unset)
    assert done.stdout.split() == [SUPPORTED[0]] * 2, done.stderr


def test_unknown_target_is_refused_with_what_is_allowed() -> None:
    done = run_kernel("sse9")
    assert done.returncode != 0
    assert f"ValueError: SCALPEL_TARGET is 'sse9', which is no target; allowed here: {', '.join(SUPPORTED)}" in (
        done.stderr
    )
    with pytest.raises(ValueError, match="'sse9'.*portable"):
        _core.force_target("sse9")


def test_targets() -> None:
    listed = _core.targets()
    assert [t["name"] for t in listed] == ["avx512vbmi2", "avx512", "avx2", "portable"]
    assert listed[-1]["supported"]
    for op, targets in _core.kernel_calls().items():
        assert {name: compiled for name, (compiled, _) in targets.items()} == {
            t["name"]: COMPILED_FOR.get((op, t["name"]), t["name"]) for t in listed if t["built"]
        }, op


def test_show_config() -> None:
    config = scalpel.show_config()
    assert config["version"] == scalpel.__version__ == _core.version() == version("semigroup-scalpel")
    assert config["target"] in config["targets_supported"] == SUPPORTED
    assert config["cuda"].startswith(("not built", "built; no GPU can be used: ")) or config["cuda"].endswith("devices")
    text = str(config).splitlines()
    assert len(text) == len(config)
    assert text[0].split() == ["version:", scalpel.__version__]


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args] + [ast.unparse(d) for d in function.args.defaults]


def test_stub_matches_the_module() -> None:
    stub = ast.parse(Path(scalpel.__file__).with_name("_core.pyi").read_text())
    described = {f.name: parameters(f) for f in stub.body if isinstance(f, ast.FunctionDef)}
    real = {}
    for name in dir(_core):
        if not name.startswith("_"):
            signature = getattr(_core, name).__doc__.splitlines()[0]
            real[name] = parameters(ast.parse(f"def {signature}: ...").body[0])
    assert described == real


def test_stubgen_agrees_on_the_names(tmp_path: Path) -> None:
    pytest.importorskip("pybind11_stubgen")
    command = [sys.executable, "-m", "pybind11_stubgen", "scalpel._core", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    generated = ast.parse((tmp_path / "scalpel" / "_core.pyi").read_text())
    written = ast.parse(Path(scalpel.__file__).with_name("_core.pyi").read_text())
    names = [{f.name for f in tree.body if isinstance(f, ast.FunctionDef)} for tree in (generated, written)]
    assert names[0] == names[1]
