"""Run the fuzz target of TopK, with sanitizers, for a few seconds; .ci/sanitize runs it for longer."""

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
pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.xdist_group("native"), pytest.mark.timeout(900)]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
INPUTS = 1500


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | {"PATH": SEARCH})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def has_sanitizers(folder: Path) -> bool:
    """Whether the compiler has the sanitizers' libraries, which some distributions package separately."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [COMPILER, "-fsanitize=address,undefined", str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(CMAKE is None, reason="cmake isn't installed")
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
def test_topk_agrees_with_a_sort_on_random_inputs(tmp_path: Path) -> None:
    build = tmp_path / "build"
    sanitize = "ON" if has_sanitizers(tmp_path) else "OFF"
    generator = [] if NINJA is None else ["-G", "Ninja"]
    run(CMAKE, *generator, "-S", ROOT, "-B", build, "-DSCALPEL_FUZZ=ON", f"-DSCALPEL_SANITIZE={sanitize}")
    run(CMAKE, "--build", build, "--target", "fuzz_topk", "--parallel", "2")
    out = run(build / "tests/native/fuzz_topk", "--inputs", str(INPUTS), "--seed", "0")
    checked = re.search(r"^checked (\d+) inputs, (\d+) calls$", out, re.MULTILINE)
    assert checked is not None, out
    assert int(checked[1]) >= INPUTS
    assert int(checked[2]) >= 3 * INPUTS  # every op, on at least one target
