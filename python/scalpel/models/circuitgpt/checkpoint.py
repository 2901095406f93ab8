"""Checkpoints: they are found by name, folder or hub id, loaded strictly or refused, and saved atomically.

The public format is a folder with ``beeg_config.json`` and ``final_model.pt`` (Gao et al. 2025, the inference
code of arXiv 2511.13653). The hub's format has the same fields in ``config.json`` beside
``model.safetensors`` or ``pytorch_model.bin``, with keys that begin with ``circuit_model.``. Nothing that
comes with a checkpoint is executed.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...hooks.adapters import check_unadapted
from ..gguf_files import gguf_in, no_circuitgpt
from ..tokenizer import TOKENIZER_FILES, Tokenizer
from ..weight_files import CheckpointError, read_json, read_weights, some, write_weights
from .config import CircuitGPTConfig
from .core import CircuitCore
from .loaded import LoadedCore

Model = TypeVar("Model", bound=LoadedCore)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "checked_weights",
    "find_checkpoint",
    "from_pretrained",
    "read_checkpoint",
    "read_config",
    "save_pretrained",
    "shipped_models",
]

CONFIG_FILES = ("beeg_config.json", "config.json")
_HUB_PREFIX = "circuit_model."
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_CAUSAL_BUFFER = re.compile(r"transformer\.h\.(\d+)\.attn\.bias")
_LOG = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """What a checkpoint holds, checked against its configuration.

    ``weights``: CPU tensors, by the names of the model's state dict. ``notes``: what was harmless and passed over.
    """

    folder: Path
    config: CircuitGPTConfig
    weights: dict[str, Tensor]
    notes: list[str]

    @property
    def default_dtype(self) -> torch.dtype:
        """float32, which holds half precision exactly, or float64 where a weight is stored as float64."""
        return torch.float64 if torch.float64 in {tensor.dtype for tensor in self.weights.values()} else torch.float32

    def weights_as(self, dtype: torch.dtype, device: torch.device | str | None) -> dict[str, Tensor]:
        """Return the weights in another dtype, on a device; CheckpointError if one is too large for the dtype."""
        return {key: _cast(key, tensor, dtype, device) for key, tensor in self.weights.items()}

    def describe(self, model: LoadedCore) -> None:
        """Give a model that has the weights its tokenizer, its card and its folder."""
        model.folder = self.folder
        if (self.folder / "card.json").is_file():
            model.card = read_json(self.folder / "card.json")
        notes = self.notes + _load_tokenizer(model, self.folder)
        if notes:
            before = model.card.get("notes", [])
            before = list(before) if isinstance(before, list) else [before]
            model.card["notes"] = before + [note for note in notes if note not in before]
            for note in notes:
                _LOG.info("%s: %s", self.folder, note)


def find_checkpoint(source: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """Find the folder of a checkpoint, given the name of a shipped model, a folder, or a hub id, which is downloaded.

    ``subfolder``: the folder in it that holds the model. ``**hub``: options of huggingface_hub's ``snapshot_download``.
    """
    return _locate(source, hub) / (subfolder or "")


def read_checkpoint(folder: Path, config: CircuitGPTConfig | None = None) -> Checkpoint:
    """Read a checkpoint strictly.

    Args:
        folder: Where it is.
        config: What to check the weights against instead of the checkpoint's own configuration.

    Raises:
        CheckpointError: As for :meth:`scalpel.CircuitGPT.from_pretrained`.
    """
    config = config or read_config(folder)[1]
    weights, notes = checked_weights(config, read_weights(folder))
    return Checkpoint(folder, config, weights, notes)


def checked_weights(config: CircuitGPTConfig, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Check a state dict, in the public layout or the hub's, against a configuration.

    Returns:
        The weights by the names of the model's state dict, and notes on what was harmless and passed over.

    Raises:
        CheckpointError: As for :meth:`scalpel.CircuitGPT.from_pretrained`.
    """
    weights = _without_prefix(dict(given))
    notes = [
        f"config field {name!r} = {value!r} is unknown; it is off and was kept"
        for name, value in config.unknown_fields().items()
    ]
    notes += _fit(CircuitCore(config, device="meta"), weights)  # shapes only: nothing is drawn at random
    _check_finite(weights)
    return weights, notes


def from_pretrained(
    cls: type[Model],
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **hub: Any,
) -> Model:
    """Load a model of the class ``cls``: :meth:`scalpel.CircuitGPT.from_pretrained`."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; it must be a torch.dtype, as torch.float32")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; a model's weights are floating point")
    if unknown := sorted(hub.keys() - set(HUB_OPTIONS)):
        raise TypeError(
            f"from_pretrained has no option {unknown[0]!r}; allowed: dtype, device, {', '.join(HUB_OPTIONS)}"
        )
    checkpoint = read_checkpoint(find_checkpoint(source, **hub))
    weights = checkpoint.weights_as(dtype or checkpoint.default_dtype, device)
    model = cls(checkpoint.config, device="meta")  # no second copy of the weights is made
    model.load_state_dict(weights, strict=True, assign=True)
    if checkpoint.config.tied_unembed:
        model.lm_head.weight = model.transformer.wte.weight
    model.eval()
    checkpoint.describe(model)
    return model


def save_pretrained(model: LoadedCore, folder: str | Path, *, compress: bool = True) -> None:
    """Write a model in the public format: :meth:`scalpel.CircuitGPT.save_pretrained`.

    The public inference code reads it too, so fields that its config class lacks are left out; they change nothing, or
    the model would have been refused. ``compress``: see :func:`scalpel.models.weight_files.write_weights`.
    """
    folder = Path(folder)
    check_unadapted(model, "its weights can't be saved without it", CheckpointError)
    weights = dict(model.state_dict())
    _check_finite(weights)
    texts = {"beeg_config.json": json.dumps(model.config.to_public_dict(), indent=2)}
    if model.card:
        try:
            texts["card.json"] = json.dumps(model.card, indent=2)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"model.card can't be written as JSON: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        draft = Path(scratch)
        write_weights(weights, draft / "final_model.pt", compress=compress)
        for name, text in texts.items():
            (draft / name).write_text(text + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(draft)
        drafted = sorted(draft.iterdir())
        for path in drafted:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path in drafted:
            os.replace(path, folder / path.name)
    for name in {"card.json", *TOKENIZER_FILES} - {path.name for path in drafted}:
        (folder / name).unlink(missing_ok=True)
    _remove_layout_of_the_hub(folder)


def _remove_layout_of_the_hub(folder: Path) -> None:
    """Remove an earlier CircuitGPT in the hub's layout, whose config transformers would read in place of this one's."""
    path = folder / CONFIG_FILES[1]
    if path.is_file() and read_json(path).get("model_type") == "circuitgpt":
        for pattern in (CONFIG_FILES[1], "model*.safetensors*", "pytorch_model*.bin*"):
            for file in folder.glob(pattern):
                file.unlink()


def remove_public_layout(folder: Path) -> None:
    """Remove an earlier CircuitGPT in the public layout, which would be read in place of one saved by transformers."""
    for name in (CONFIG_FILES[0], "final_model.pt"):
        (folder / name).unlink(missing_ok=True)


def shipped_models() -> dict[str, Path]:
    """List the models that come with the package: {name: folder}."""
    data = resources.files("scalpel") / "data"
    found = [child for child in data.iterdir() if isinstance(child, Path)] if data.is_dir() else []
    return {child.name: child for child in sorted(found) if (child / "beeg_config.json").is_file()}


def _locate(source: str | Path, hub: dict[str, Any]) -> Path:
    shipped = shipped_models()
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    path = Path(source).expanduser()
    if (file := gguf_in(path)) is not None:
        raise no_circuitgpt(file)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds the config and the weights")
    if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return _download(source, hub)
    raise CheckpointError(
        f"{str(source)!r} is neither a shipped model ({', '.join(shipped) or 'none'}), nor a folder, nor a "
        "hub id (owner/name)"
    )


def _download(source: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source,
                **hub,
                # data only: the code that a hub repository may carry is not even fetched
                allow_patterns=["*.json", "*.safetensors", "*.bin", "*.pt", "vocab.bpe", "merges.txt"],
            )
        )
    except Exception as error:  # the hub's client raises errors of many kinds; each means that there is no checkpoint
        raise CheckpointError(
            f"{source!r} is no folder here and couldn't be fetched from the hub: {type(error).__name__}: "
            f"{error}. Check the id and the connection, or give the path of a folder that you downloaded."
        ) from error


def read_config(folder: Path) -> tuple[dict[str, Any], CircuitGPTConfig]:
    """Read the configuration: its fields as they stand in the file, and what they say."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            try:
                fields = read_json(folder / name)
                return fields, CircuitGPTConfig.from_dict(fields)
            except CheckpointError:
                raise
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
    raise CheckpointError(f"{folder} holds no {' and no '.join(CONFIG_FILES)}")


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(key.startswith(_HUB_PREFIX) for key in weights):
        return weights
    if bare := sorted(key for key in weights if not key.startswith(_HUB_PREFIX)):
        raise CheckpointError(f"some keys begin with {_HUB_PREFIX!r} and others don't: {some(bare)}")
    return {key.removeprefix(_HUB_PREFIX): tensor for key, tensor in weights.items()}


def _fit(model: CircuitCore, weights: dict[str, Tensor]) -> list[str]:
    """Change ``weights`` in place to what the (shape-only) ``model`` needs; returns notes on what was passed over."""
    notes = _drop_causal_buffers(model.config, weights)
    wanted = model.state_dict()
    tied = ("transformer.wte.weight", "lm_head.weight")
    if model.config.tied_unembed:
        for one, other in (tied, tied[::-1]):
            if one in weights and other not in weights:
                weights[other] = weights[one]
                notes.append(f"{other!r} is absent; tied_unembed is true, so it is {one!r}")
    if "final_logits_bias" not in weights:
        weights["final_logits_bias"] = torch.zeros(model.config.vocab_size, dtype=torch.float32, device="cpu")
        notes.append("'final_logits_bias' is absent and was set to zeros")
    for key in sorted(weights.keys() - wanted.keys()):
        raise CheckpointError(f"the checkpoint has an extra key {key!r}: {_why_extra(key)}")
    if missing := [key for key in wanted if key not in weights]:
        raise CheckpointError(
            f"the checkpoint lacks {some(missing)}, which its config asks for. "
            "Are config and weights of the same model, and is the download complete?"
        )
    for key, expected in wanted.items():
        tensor = weights[key]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{key!r} is {tensor.dtype}; weights are floating point")
        if key.endswith("sink_logit") and tensor.numel() == 1 and expected.numel() != 1:
            weights[key] = tensor = tensor.reshape(1).repeat(expected.numel())
            notes.append(f"{key!r} has one value, shared by all {expected.numel()} heads; it was repeated")
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)}; by its config it is {tuple(expected.shape)}"
            )
    if model.config.tied_unembed and not torch.equal(weights[tied[0]], weights[tied[1]]):
        raise CheckpointError(
            f"tied_unembed is true, but {tied[0]!r} and {tied[1]!r} differ: it is unknown which of them "
            "is meant. "
            "If the head is its own, set tied_unembed to false."
        )
    return notes


def _drop_causal_buffers(config: CircuitGPTConfig, weights: dict[str, Tensor]) -> list[str]:
    """Check and drop the causal masks that the public code stores in attention where ``flash`` is off."""
    found = [key for key in weights if (at := _CAUSAL_BUFFER.fullmatch(key)) and int(at[1]) < config.n_layer]
    for key in found:
        mask = weights.pop(key)
        size = config.block_size
        square = mask.dim() == 4 and mask.shape[:2] == (1, 1) and mask.shape[-2:] == (size, size)
        if not square or not torch.equal(
            mask[0, 0] != 0, torch.ones(size, size, dtype=torch.bool, device="cpu").tril()
        ):
            raise CheckpointError(
                f"{key!r}, of shape {tuple(mask.shape)}, is not the causal mask of block_size {size}: "
                "attention "
                "would not be causal, which this model can't express"
            )
    return [f"{len(found)} causal-mask buffers ('attn.bias') were checked and dropped"] if found else []


def _why_extra(key: str) -> str:
    if key.endswith("attn_imp.sink_logit"):
        return (
            "the weights have attention sinks, but the config has none (sink is false or absent). Loading "
            "without them "
            'would silently change the model; if it was trained with them, write "sink": true into the config'
        )
    if key == "bigram_table":
        return "enable_bigram_table is false in the config. If the model was trained with the table, set it"
    if re.search(r"\.ln_p[12]\.", key):
        return "it belongs to concatenated positions, and the config has no d_pos_emb"
    if key.endswith(".bias"):
        return "the config has no such bias (bias, ln_bias and rms_norm decide)"
    return "the model that its config describes has none. Dropping it could change what the model computes"


def _check_finite(weights: dict[str, Tensor]) -> None:
    for key, tensor in weights.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{key!r} is on meta, where tensors have a shape and no numbers: build or load the model on the CPU"
            )
        if tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)  # both are NaN if any value is, and no mask of the tensor's size is made
        if not bool(low.isfinite() & high.isfinite()):
            bad = ~torch.isfinite(tensor)
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise CheckpointError(
                f"{key!r} has {int(bad.sum())} values that are NaN or infinite, the first at {first}: "
                "the checkpoint is damaged or its training diverged"
            )


def _cast(key: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    cast = tensor.to(device=device or "cpu", dtype=dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not bool(cast.isfinite().all()):
        raise CheckpointError(f"{key!r} has values too large for {dtype}; ask for a wider dtype")
    return cast


def _load_tokenizer(model: LoadedCore, folder: Path) -> list[str]:
    try:
        model.tokenizer = Tokenizer.from_folder(folder, model.config.tokenizer_name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    limit = model.config.vocab_size
    if model.tokenizer is not None and model.tokenizer.vocab_size > limit:
        size = model.tokenizer.vocab_size
        return [f"the tokenizer has {size} tokens and the model {limit}; ids beyond are refused"]
    return []
