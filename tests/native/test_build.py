"""Without Python: the core builds without a warning, is fuzzed for a few seconds, and is found as a CMake package.

One build serves both tests. It has the sanitizers where the compiler has them; `.ci/sanitize` fuzzes for longer.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from places import ROOT

SEARCH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=SEARCH)
NINJA = shutil.which("ninja", path=SEARCH)
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
SANITIZERS = "-fsanitize=address,undefined"
INPUTS = 1000
pytestmark = [
    pytest.mark.native,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CMAKE is None, reason="cmake isn't installed"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | {"PATH": SEARCH})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def configure(source: Path, build: Path, *options: str) -> None:
    generator = [] if NINJA is None else ["-G", "Ninja"]
    run(CMAKE, *generator, "-S", source, "-B", build, *options)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag for the sanitizers, whose libraries some distributions package separately; "" without them."""
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [COMPILER, SANITIZERS, str(source), "-o", str(folder / "empty")]
    return SANITIZERS if subprocess.run(command, capture_output=True).returncode == 0 else ""


@pytest.fixture(scope="module")
def built(sanitizers: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the core and of its fuzz target."""
    build = tmp_path_factory.mktemp("core") / "build"
    sanitize = "ON" if sanitizers else "OFF"
    configure(ROOT, build, "-DSCALPEL_WERROR=ON", "-DSCALPEL_FUZZ=ON", f"-DSCALPEL_SANITIZE={sanitize}")
    run(CMAKE, "--build", build, "--parallel", "2")
    return build


def test_topk_agrees_with_a_sort_on_random_inputs(built: Path) -> None:
    out = run(built / "tests/native/fuzz_topk", "--inputs", str(INPUTS), "--seed", "0")
    checked = re.search(r"^checked (\d+) inputs, (\d+) calls$", out, re.MULTILINE)
    assert checked is not None, out
    assert int(checked[1]) >= INPUTS
    assert int(checked[2]) >= 3 * INPUTS  # every op, on at least one target


def test_example_builds_against_the_installed_package(built: Path, sanitizers: str, tmp_path: Path) -> None:
    prefix, example = tmp_path / "prefix", tmp_path / "example"
    run(CMAKE, "--install", built, "--prefix", prefix)
    assert (prefix / "include/scalpel/topk/topk.h").exists()
    # A static library with sanitizers asks for them in the program that links it.
    configure(ROOT / "examples/cpp", example, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_EXE_LINKER_FLAGS={sanitizers}")
    run(CMAKE, "--build", example)
    assert run(example / "example").split("\n")[:2] == ["0 -3 0 2", "-1 1 0 0"]
