"""What the tests of ``scalpel analyze`` share: small models, a text, and their fixtures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from circuitgpt_cases import build
from decoder_cases import model_of
from scalpel.cli import commands as cli
from scalpel.models.tokenizer import Tokenizer

LETTERS = "abcdefghijklm"
CIRCUIT = 12  # the context length of the tiny CircuitGPT
SIZES: dict[str, int] = {"length": CIRCUIT, "chunks": 3, "tangents": 4, "stretches": 0}


def letters(count: int) -> Tokenizer:
    """Map each letter to one token."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS[:count])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner)


def text_of(count: int) -> str:
    drawn = np.random.default_rng(0).integers(len(LETTERS), size=count)
    return "".join(LETTERS[i] for i in drawn)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text_of(40))
    return path


@pytest.fixture
def circuit(tmp_path: Path) -> Path:
    model = build("like_csp_yolo2")
    model.tokenizer = letters(13)
    model.save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path / "llama"
    model_of("llama").save_pretrained(folder, max_shard_size="4KB")
    letters(13).save(folder)
    return folder


def ids_of(text: Path, number: int, step: int, length: int) -> torch.Tensor:
    ids = [LETTERS.index(letter) for letter in text.read_text()]
    return torch.tensor(ids[number * step : number * step + length])[None]


def chunk(out: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "chunks" / f"{number:05d}.json").read_text())
    return found


def lists(values: torch.Tensor | None) -> Any:
    assert values is not None
    return [[v if math.isfinite(v) else None for v in row] for row in values.reshape(-1, values.shape[-1]).tolist()]


def invoke(*arguments: Any) -> Result:
    done = CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"}).invoke(cli.app, ["analyze", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def byte_pair(folder: Path, names: tuple[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    table = {letter: i for i, letter in enumerate([*LETTERS, "Ġ"])} | {"ab": 14}
    (folder / names[0]).write_text(json.dumps(table))
    (folder / names[1]).write_text("#version: 0.2\na b\n")
    return folder
