"""Without Python, the core is a CMake package: it installs, is found, and the example builds against it."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from places import ROOT

SCRIPTS = sysconfig.get_path("scripts")
CMAKE = shutil.which("cmake", path=os.pathsep.join([SCRIPTS, os.environ.get("PATH", "")]))
pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.xdist_group("native")]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def run(*command: str | Path) -> str:
    environment = os.environ | {"PATH": os.pathsep.join([SCRIPTS, os.environ.get("PATH", "")])}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(CMAKE is None, reason="cmake isn't installed")
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
def test_example_builds_against_the_installed_package(tmp_path: Path) -> None:
    core, prefix, example = tmp_path / "core", tmp_path / "prefix", tmp_path / "example"
    # -O1 saves time: this test is about packaging, and the optimised files set their own options anyway.
    run(CMAKE, "-S", ROOT, "-B", core, "-DSCALPEL_WERROR=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run(CMAKE, "--build", core, "--parallel", "2")
    run(CMAKE, "--install", core, "--prefix", prefix)
    assert (prefix / "include/scalpel/topk/topk.h").exists()
    run(CMAKE, "-S", ROOT / "examples/cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", example)
    assert run(example / "example").split("\n")[:2] == ["0 -3 0 2", "-1 1 0 0"]
