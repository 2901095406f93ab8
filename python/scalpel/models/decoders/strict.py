"""Checks that a folder holds the model that its config describes, before any weight is read.

Where a weight is missing, transformers draws it at random; where the model has no place for one, it drops it; and it
mentions either at most in a log. Here the model's own class, built without memory, says which tensors a model of this
config has. The file of its family says which other names its checkpoints may use, and which other tensors they may
hold. Anything else is refused.
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
from .families import family_of, passed_over, supported

__all__ = [
    "Expected",
    "Stored",
    "check_loaded",
    "check_plain",
    "config_in",
    "expected_by",
    "match",
]

_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"


class Stored(Protocol):
    """The tensors of a checkpoint, described without reading them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, by the file's name for it."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor, by the file's name for it."""

    def equal(self, name: str, other_name: str) -> bool:
        """Read two tensors of the same shape, and tell whether they hold the same numbers."""


@dataclass(frozen=True)
class Expected:
    """The tensors that a model class has with a given config, by the class's names for them."""

    architecture: str
    family: Family
    config: Any
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]  # from a further name of a tied tensor to its first name


def config_in(folder: Path) -> tuple[Any, str]:
    """Read transformers' config of the model in ``folder``, and the name of its class.

    Raises:
        CheckpointError: If there is no config, it names no class that has rules, or it would make transformers read
            anything but the folder's own weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a folder as transformers' save_pretrained writes it")
    raw = read_json(path)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"{path} has no list of 'architectures', which should name the model's class")
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
    except Exception as error:  # transformers raises errors of many kinds, and each means that the config is unusable
        raise CheckpointError(f"transformers can't read {path}: {type(error).__name__}: {error}") from error
    return config, architecture


def expected_by(config: Any, architecture: str | None, where: str | Path) -> Expected:
    """List the tensors of the model that transformers builds from a config.

    Args:
        config: transformers' config.
        architecture: The name that the model's class must have, or None to accept any.
        where: What messages call the checkpoint.

    Raises:
        CheckpointError: If transformers can't build the model, its class has no rules, or it is another class than
            ``architecture``: transformers goes by the config's ``model_type``, and readers of files go by its
            ``architectures``.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes only
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # again of any kind
        raise CheckpointError(
            f"the config of {where} describes no model that transformers can build: {type(error).__name__}: {error}"
        ) from error
    if architecture not in (None, type(model).__name__):
        raise CheckpointError(
            f"the config of {where} contradicts itself: 'architectures' says {architecture}, and 'model_type', "
            f"{config.model_type!r}, belongs to {type(model).__name__}. Correct whichever is wrong"
        )
    architecture = type(model).__name__
    family = family_of(architecture)
    if family is None:
        raise _unsupported(architecture, where)
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return Expected(architecture, family, config, shapes, tied)


def _unsupported(architecture: str, where: str | Path) -> CheckpointError:
    return CheckpointError(f"{where} holds a {architecture}, which has no rules; those that have: {some(supported())}")


def match(expected: Expected, stored: Stored, where: str | Path) -> dict[str, str]:
    """Find each expected tensor in a checkpoint.

    Args:
        expected: What the model's class has.
        stored: What the checkpoint holds.
        where: What messages call the checkpoint.

    Returns:
        A dict from the class's name of each tensor to the file's name; a tied tensor has one entry.

    Raises:
        CheckpointError: If tensors are missing, unexpected or of another shape, or tied ones differ; the message
            names them.
    """
    key_of: dict[str, str] = {}
    extra: list[str] = []
    for key in stored.shapes:
        name = _name_of(key, expected)
        if name is None:
            if not passed_over(key, expected.family):
                extra.append(key)
        elif name in key_of:
            raise CheckpointError(
                f"{where} holds both {key_of[name]!r} and {key!r}, which are names of one tensor: remove one of them"
            )
        else:
            key_of[name] = key
    missing = [
        name for name in expected.shapes if not any(other in key_of for other in _names_tied_to(name, expected.tied))
    ]
    other_shape = {
        key: (stored.shapes[key], expected.shapes[name])
        for name, key in key_of.items()
        if stored.shapes[key] != expected.shapes[name]
    }
    if missing or extra or other_shape:
        raise CheckpointError(_complaint(expected, where, missing, extra, other_shape))
    for name, original in expected.tied.items():
        if name in key_of and original in key_of and not stored.equal(key_of[name], key_of[original]):
            raise CheckpointError(
                f"the config of {where} ties {name!r} to {original!r}, but the weights hold both, and they differ "
                "(transformers would leave them untied), so it is unknown which is meant. Write "
                '"tie_word_embeddings": false into config.json if the model has both, or remove the one that it '
                "doesn't have"
            )
        if name in key_of:
            key = key_of.pop(name)
            key_of.setdefault(original, key)
    return key_of


def check_loaded(info: Mapping[str, Any], architecture: str, where: str | Path) -> None:
    """Check that transformers loaded the whole model that the file holds.

    Args:
        info: What transformers reports with ``output_loading_info=True``.
        architecture: The name of the model's class.
        where: What the message calls the checkpoint.

    Raises:
        CheckpointError: If the report names tensors that are missing, unexpected or of another shape, or errors.
    """
    family = family_of(architecture)
    assert family is not None
    introductions = {
        "missing_keys": "it lacks",
        "unexpected_keys": "the model has no place for",
        "mismatched_keys": "other shapes than the model's have",
    }
    faults = []
    for kind, introduction in introductions.items():
        # A key may come with its two shapes.
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        names = [name for name in names if kind == "missing_keys" or not passed_over(name, family)]
        if names:
            faults.append(f"{introduction} {some(names)}")
    if info.get("error_msgs"):
        faults.append(f"transformers says: {info['error_msgs']}")
    if faults:
        raise CheckpointError(f"{where} was not read completely as a {architecture}: {'; '.join(faults)}. {_ADVICE}")


def check_plain(config: Any, architecture: str, where: str | Path) -> None:
    """Check that transformers' ``config`` doesn't say that the model is quantised.

    In a quantised model, modules are replaced by others that round weights or activations, and no family's rules do
    that. After transformers has dequantised a model while loading it, the config no longer says that it is quantised.

    Raises:
        CheckpointError: If the config says that it is.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    how = "without a 'quant_method'" if method is None else f"by {getattr(method, 'value', method)!r}"
    raise CheckpointError(
        f"the quantization_config of {where} says that it is quantised {how}, so it does not compute what a plain "
        f"{architecture} with its weights does: load it with transformers, dequantise it (model.dequantize()), save it "
        "with save_pretrained, and give that folder; or use a version that was published without quantisation"
    )


_ADVICE = (
    "A missing weight would be drawn at random and an extra one dropped, so the model is refused. Check that "
    "config.json and the weights belong to the same model, and that the download is complete"
)


def _name_of(key: str, expected: Expected) -> str | None:
    """Return the class's name of the tensor that a file calls ``key``, or None if the class has none."""
    family = expected.family
    candidates = (key, family.ALSO_NAMED.get(key, key), f"{family.PREFIX}.{key}")
    return next((name for name in candidates if name in expected.shapes), None)


def _names_tied_to(name: str, tied: dict[str, str]) -> list[str]:
    """List all names of a tensor, ``name`` included."""
    original = tied.get(name, name)
    return [original, *(other for other, first in tied.items() if first == original)]


def _complaint(
    expected: Expected,
    where: str | Path,
    missing: list[str],
    extra: list[str],
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    faults = []
    if missing:
        faults.append(f"it lacks {some(missing)}")
    if extra:
        faults.append(f"it holds {some(sorted(extra))}, for which the model has no place")
    faults += [
        f"{key!r} has shape {shape}, by the config {right}" for key, (shape, right) in list(other_shape.items())[:3]
    ]
    if len(other_shape) > 3:
        more = len(other_shape) - 3
        faults.append("1 more has another shape" if more == 1 else f"{more} more have other shapes")
    advice = ". ".join([_ADVICE, *_hints(expected, missing, extra)])
    return f"{where} does not hold the {expected.architecture} that its config describes: {'; '.join(faults)}. {advice}"


def _hints(expected: Expected, missing: list[str], extra: list[str]) -> Iterator[str]:
    """Guess which entry of the config may be wrong."""
    config = expected.config
    if {"lm_head.weight", "embed_out.weight"} & set(missing) and not expected.tied:
        yield 'If the embedding also serves as the output matrix, write "tie_word_embeddings": true into config.json'
    if any(key.endswith(".bias") for key in extra):
        names = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, None) is False]
        if names:
            yield f"If it was trained with such biases, set {' or '.join(names)} to true in config.json"
    if any(key.endswith(("q_norm.weight", "k_norm.weight")) for key in extra):
        yield "Only Qwen3 has a norm of each head: check 'architectures' in config.json"
    count = config.num_hidden_layers
    numbers = [int(layer[1]) for key in extra if (layer := re.search(r"(?:layers|h)\.(\d+)\.", key))]
    if any(number >= count for number in numbers):
        yield f"By the config it has {'1 layer, numbered 0' if count == 1 else f'{count} layers, numbered from 0'}"
