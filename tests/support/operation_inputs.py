"""The inputs of public_operations.py, and the comparison of the operations' results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import scalpel
from analysis_cases import letters, text_of
from circuitgpt_cases import build, tokens
from decoder_cases import ids_of, model_of
from scalpel.jacobians.operator import Jacobian


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")


class Plain(nn.Module):
    """A module for which the library has no rules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


class Given:
    """The inputs of the operations. They are created under torch's own defaults and must not be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.x, self.rows = drawn(4, 9), drawn(40, 8, seed=1)
        self.model, self.ids = build("like_csp_yolo2", torch.float32), tokens(build("like_csp_yolo2"))
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :2] = 0
        self.wide = build("positions_concatenated_rms", torch.float32)
        self.sparse = build("plain", torch.float32)
        with torch.no_grad():
            for name, parameter in self.sparse.named_parameters():
                if ".h." in name and parameter.dim() == 2:
                    parameter.mul_(drawn(*parameter.shape, seed=2) > 1.4)
        self.gpt2, self.llama, self.decoder_ids = model_of("gpt2").float(), model_of("llama").float(), ids_of()
        torch.manual_seed(0)
        self.plain, self.plain_x = Plain().eval(), drawn(1, 3, 6)
        self.brackets = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        self.task = scalpel.circuits.bracket_counting(self.brackets, 8, 0)
        self.flip_flop = scalpel.CircuitGPT.from_pretrained("flip-flop-mini")
        text = "x = [[" + ", ".join("1234") * 4
        self.prompt = self.brackets.tokenizer.batch([text])[0]
        self.states = [scalpel.StreamingCovariance(8).update(part) for part in self.rows.split(20)]
        self.state_file = folder / "state"
        self.states[0].save(self.state_file)
        self.checkpoint = folder / "checkpoint"
        self.model.tokenizer = letters(13)
        self.model.save_pretrained(self.checkpoint)
        self.llama_folder = folder / "llama"
        self.llama.save_pretrained(self.llama_folder, max_shard_size="4KB")
        letters(13).save(self.llama_folder)
        self.yarn_folder = folder / "yarn"
        model_of("llama, yarn").save_pretrained(self.yarn_folder)
        self.lens = scalpel.JacobianLens({0: drawn(12, 12, seed=5)}, 3, error={0: 0.5}, about={"target": 1})
        self.lens.attach(self.model, letters(13))
        self.lens_file = folder / "lens.pt"
        self.lens.save(self.lens_file)
        self.text = folder / "text.txt"
        self.text.write_text(text_of(40))

    def new(self, name: str) -> Path:
        """A path at which nothing exists yet."""
        number = len(os.listdir(self.folder))
        return self.folder / f"{name}-{number}"

    def J(self, model: Any = None, **options: Any) -> Jacobian:
        model = self.model if model is None else model
        ids = self.ids if isinstance(model, scalpel.CircuitGPT) else self.decoder_ids
        return scalpel.jacobian(model, ids, "0.resid_in", "final_resid", **options)

    def tangents(self, J: Any, count: int = 2) -> Tensor:
        return drawn(count, *J.source_shape)

    def exact(self, **options: Any) -> scalpel.StreamingCovariance:
        return scalpel.StreamingCovariance(8, **options).update(self.rows)


@dataclass(frozen=True)
class Numbers:
    """What a comparison considers of a tensor: everything except its memory."""

    dtype: str
    device: str
    shape: tuple[int, ...]
    bits: bytes


def plain(value: Any) -> Any:
    """A result as nested tuples of numbers, strings and bits, comparable with ==, including NaN and signed zeros."""
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            return Numbers(str(value.dtype), "meta", tuple(value.shape), b"")
        whole = value.detach().contiguous().flatten().view(torch.uint8)
        return Numbers(str(value.dtype), str(value.device), tuple(value.shape), whole.numpy().tobytes())
    if isinstance(value, np.ndarray | np.generic):
        found = np.ascontiguousarray(value)
        bits = found.tobytes() if found.dtype != object else repr(found.tolist()).encode()
        return Numbers(str(found.dtype), "numpy", found.shape, bits)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, scalpel.StreamingCovariance):
        return plain(value._state.tensors())
    if isinstance(value, nn.Module):
        return plain(value.state_dict())
    if isinstance(value, Mapping):
        return tuple((str(key), plain(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if is_dataclass(value):
        return tuple((field.name, plain(getattr(value, field.name))) for field in fields(value))
    if value is None or isinstance(value, str | int | bytes | bool):
        return value
    return repr(value)
