"""Whether a folder holds the model that its config describes: asked by whatever reads a model of transformers'.

transformers draws a missing weight at random, drops one that the model has no place for, and says so at most in a log.
Here the model's own class, built without memory, says which tensors it has with this config. A family's file
says which other names and which left-overs its checkpoints may hold. Anything else is refused before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..weight_files import CheckpointError, read_json, some
from .decoder import Family
from .families import FAMILIES, family_of, supported

__all__ = [
    "Expected",
    "Stored",
    "check_loaded",
    "check_plain",
    "config_in",
    "expected_by",
    "match",
    "passed_over",
]

_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"


class Stored(Protocol):
    """The tensors of a checkpoint, which have not been read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers."""


@dataclass(frozen=True)
class Expected:
    """The tensors of a model's class with a config, by the names that the class gives them."""

    architecture: str
    family: Family
    config: Any
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]  # a name → the name of which it is another


def config_in(folder: Path) -> tuple[Any, str]:
    """transformers' config of the model in ``folder``, and the name of its class.

    Raises CheckpointError where there is no config, it names no class that has rules, or it would make transformers
    read something else than the folder's own weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a folder as transformers' save_pretrained writes it")
    raw = read_json(path)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"{path} has no list of 'architectures', which names the model's class")
    architecture = str(names[0])
    if family_of(architecture) is None:
        raise _unsupported(architecture, folder)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} has an adapter_config.json, so transformers would load the adapter's base model from elsewhere: "
            "merge the adapter (peft's merge_and_unload), save the result to a folder of its own, and give that"
        )
    if raw.get("transformers_weights") is not None or any(folder.glob(_DISTRIBUTED)):
        raise CheckpointError(
            f"the weights of {folder} are not in model.safetensors or pytorch_model.bin, whole or in shards: load the "
            "model with transformers, save it with save_pretrained, and give that folder"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise CheckpointError(f"{folder} needs transformers: pip install 'semigroup-scalpel[transformers]'") from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; each means that there is no such config
        raise CheckpointError(f"transformers can't read {path}: {type(error).__name__}: {error}") from error
    return config, architecture


def expected_by(config: Any, architecture: str | None, where: str | Path) -> Expected:
    """What the class named ``architecture`` (None: whichever it is) has with transformers' ``config``; ``where`` is
    for messages.

    Raises CheckpointError where the config can't be built, has no rules, or is the config of another class:
    transformers goes by its ``model_type``, and a reader of files by its ``architectures``.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes only
            made: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(
            f"the config of {where} describes no model that transformers can build: {type(error).__name__}: {error}"
        ) from error
    if architecture not in (None, type(made).__name__):
        raise CheckpointError(
            f"the config of {where} contradicts itself: 'architectures' says {architecture}, and 'model_type', "
            f"{config.model_type!r}, is that of {type(made).__name__}. Correct the one that is wrong"
        )
    architecture = type(made).__name__
    family = family_of(architecture)
    if family is None:
        raise _unsupported(architecture, where)
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in made.state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return Expected(architecture, family, config, shapes, tied)


def _unsupported(architecture: str, where: str | Path) -> CheckpointError:
    return CheckpointError(f"{where} holds a {architecture}, which has no rules; those that have: {some(supported())}")


def match(expected: Expected, stored: Stored, where: str | Path) -> dict[str, str]:
    """The class's name → the file's name of each tensor, once where several names are tied.

    Raises CheckpointError that names the tensors that are missing, unexpected or of another shape, or the tied
    ones that differ.
    """
    found: dict[str, str] = {}
    extra: list[str] = []
    for key in stored.shapes:
        name = _name_of(key, expected)
        if name is None:
            if not passed_over(key, expected.family):
                extra.append(key)
        elif name in found:
            raise CheckpointError(
                f"{where} holds both {found[name]!r} and {key!r}, which are names of one tensor: remove one of them"
            )
        else:
            found[name] = key
    missing = [name for name in expected.shapes if not any(other in found for other in _alike(name, expected.tied))]
    other_shape = {
        key: (stored.shapes[key], expected.shapes[name])
        for name, key in found.items()
        if stored.shapes[key] != expected.shapes[name]
    }
    if missing or extra or other_shape:
        raise CheckpointError(_complaint(expected, where, missing, extra, other_shape))
    for name, original in expected.tied.items():
        if name in found and original in found and not stored.equal(found[name], found[original]):
            raise CheckpointError(
                f"the config of {where} ties {name!r} to {original!r}, but the weights hold both, and they differ "
                "(transformers would leave them untied): which is meant can't be known. Write "
                '"tie_word_embeddings": false into config.json if the two are the model\'s own, or remove the one that '
                "is left over"
            )
        if name in found:
            key = found.pop(name)
            found.setdefault(original, key)
    return found


def passed_over(key: str, family: Family | None = None) -> bool:
    """Whether a file may hold this although the class has no place for it, as ``family``'s file says (or any
    family's)."""
    families = FAMILIES if family is None else (family,)
    return any(re.fullmatch(pattern, key) for each in families for pattern in each.PASSED_OVER)


def check_loaded(info: Mapping[str, Any], architecture: str, where: str | Path) -> None:
    """CheckpointError where transformers' report of loading (``output_loading_info=True``) says that the model in
    memory is not that of the file."""
    family = family_of(architecture)
    assert family is not None
    found = {
        "missing_keys": "it lacks",
        "unexpected_keys": "the model has no place for",
        "mismatched_keys": "of another shape are",
    }
    said = []
    for kind, words in found.items():
        names = sorted(str(each[0] if isinstance(each, tuple) else each) for each in info.get(kind) or ())
        names = [name for name in names if kind == "missing_keys" or not passed_over(name, family)]
        if names:
            said.append(f"{words} {some(names)}")
    if info.get("error_msgs"):
        said.append(f"transformers says: {info['error_msgs']}")
    if said:
        raise CheckpointError(f"{where} was not read as a {architecture} whole: {'; '.join(said)}. {_ADVICE}")


def check_plain(config: Any, architecture: str, where: str | Path) -> None:
    """CheckpointError where transformers' ``config`` says that the model is quantised.

    Its modules are then replaced by ones that round weights or activations, which no family's rules do. Of a model that
    transformers dequantised while it was loaded, the config says it no longer.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    named = "without a 'quant_method'" if method is None else f"by {getattr(method, 'value', method)!r}"
    raise CheckpointError(
        f"the quantization_config of {where} says that it is quantised {named}, so it does not compute what a plain "
        f"{architecture} with its weights does: load it with transformers, dequantise it (model.dequantize()), save it "
        "with save_pretrained, and give that folder. A model that was published without quantisation serves as well"
    )


_ADVICE = (
    "A missing weight would be drawn at random and an extra one dropped, so the model is refused. Check that "
    "config.json and the weights are of the same model, and that the download is complete"
)


def _name_of(key: str, expected: Expected) -> str | None:
    """The class's name of what a file calls ``key``."""
    family = expected.family
    also = family.ALSO_NAMED.get(key, key)
    candidates = (key, also, f"{family.PREFIX}.{key}")
    return next((name for name in candidates if name in expected.shapes), None)


def _alike(name: str, tied: dict[str, str]) -> list[str]:
    """``name`` and the names of the same tensor."""
    original = tied.get(name, name)
    return [original, *(other for other, its in tied.items() if its == original)]


def _complaint(
    expected: Expected,
    where: str | Path,
    missing: list[str],
    extra: list[str],
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    said = []
    if missing:
        said.append(f"it lacks {some(missing)}")
    if extra:
        said.append(f"it holds {some(sorted(extra))}, for which the model has no place")
    said += [
        f"{key!r} has shape {shape}, by the config {right}" for key, (shape, right) in list(other_shape.items())[:3]
    ]
    if len(other_shape) > 3:
        more = len(other_shape) - 3
        said.append("1 more has another shape" if more == 1 else f"{more} more have other shapes")
    advice = ". ".join([_ADVICE, *_hints(expected, missing, extra)])
    return f"{where} does not hold the {expected.architecture} that its config describes: {'; '.join(said)}. {advice}"


def _hints(expected: Expected, missing: list[str], extra: list[str]) -> Iterator[str]:
    config = expected.config
    if {"lm_head.weight", "embed_out.weight"} & set(missing) and not expected.tied:
        yield 'If its output matrix is the embedding, write "tie_word_embeddings": true into config.json'
    if any(key.endswith(".bias") for key in extra):
        names = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, None) is False]
        if names:
            yield f"If it was trained with such biases, set {' or '.join(names)} to true in config.json"
    if any(key.endswith(("q_norm.weight", "k_norm.weight")) for key in extra):
        yield "Norms of each head are Qwen3's: is 'architectures' right?"
    count = config.num_hidden_layers
    numbers = [int(found[1]) for key in extra if (found := re.search(r"(?:layers|h)\.(\d+)\.", key))]
    if any(number >= count for number in numbers):
        yield f"By the config it has {'1 layer, numbered 0' if count == 1 else f'{count} layers, numbered from 0'}"
