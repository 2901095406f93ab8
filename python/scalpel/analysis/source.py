"""The model to analyse: a CircuitGPT, a transformers folder, a GGUF file, or a folder whose layers are streamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .._native import device_named
from ..models.circuitgpt.checkpoint import CONFIG_FILES, shipped_models
from ..models.circuitgpt.model import CircuitGPT
from ..models.conventions import Conventions, conventions_in
from ..models.decoders.families import decoder_of, family_of, supported
from ..models.decoders.folder import FolderWeights, check_folder, decoder_in
from ..models.decoders.marks import sampled_mark
from ..models.decoders.strict import check_loaded, check_plain, config_in
from ..models.gguf.model import conventions as gguf_conventions
from ..models.gguf.model import plain_model, stored_as
from ..models.gguf.model import tokenizer as gguf_tokenizer
from ..models.gguf_files import gguf_in, no_stream
from ..models.tokenizer import Tokenizer
from ..models.weight_files import CheckpointError, read_json

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed")


@dataclass
class Source:
    """A model to analyse.

    Attributes:
        kind: How the model is analysed.
        facts: What the report says about the model, as plain data.
        context: The largest number of tokens in a text.
        vocab_size: The number of token ids.
        tokenizer: The model's own tokenizer; None where it has none.
        pair: "tinypython" or "gpt2": how text is cut into words before the merges of a byte-level BPE, whose two files
            do not say so; None where the model doesn't determine it.
        trained: The model; None for a folder that is streamed.
        untrained: Makes a model of the same config from a seed; None for a folder that is streamed.
        folder: The folder of a transformers model.
        device: The device of the models, or of each layer of a streamed model while it is in memory.
        conventions: Reads what begins a text and the chat template, as the model's own tokenizer says; None where there
            is nothing to read it from.
        no_tokenizer: The reason why ``tokenizer`` is None, where a specific one is known.
    """

    kind: Literal["circuitgpt", "decoder", "stream"]
    facts: dict[str, Any]
    context: int
    vocab_size: int
    tokenizer: Tokenizer | None
    pair: str | None
    trained: nn.Module | None = None
    untrained: Callable[[int], nn.Module] | None = None
    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    conventions: Callable[[], Conventions] | None = None
    no_tokenizer: str | None = None


def load(name: str | Path, stream: bool = False, device: str = "cpu") -> Source:
    """Find the model that a name, folder, GGUF file or hub id stands for, and load it.

    Args:
        name: The name, path or id.
        stream: Whether to read the layers one at a time later, instead of loading the model here.
        device: The device on which the model is analysed.

    Returns:
        The model and what is known about it.

    Raises:
        CheckpointError: (a ValueError) The model doesn't exist, can't be read, or has no rules.
        ValueError: The device doesn't exist.
    """
    target_device = _place(device)
    source = _loaded(name, stream, target_device)
    source.device = target_device
    if target_device.type == "cuda":
        source.facts["device"] = torch.cuda.get_device_name(target_device)
    return source


def _place(device: str) -> torch.device:
    """Return the device of this name; "cuda" gives each process that torchrun starts on a machine its own GPU."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    return device_named(device)


def _loaded(name: str | Path, stream: bool, device: torch.device) -> Source:
    """Find out what kind of model ``name`` is, and load it; an error says where memory ran out."""
    folder = Path(name).expanduser()
    shipped = str(name) in shipped_models()
    gguf = None if shipped else gguf_in(folder)
    architecture = None if shipped or gguf is not None else _architecture(folder)
    if stream:
        if gguf is not None:
            raise no_stream(gguf)
        if not folder.is_dir():
            raise CheckpointError(f"{str(name)!r} is no folder; what is streamed is a folder of safetensors")
        if architecture is None or family_of(architecture) is None:
            raise CheckpointError(
                f"{folder} holds a {architecture or 'CircuitGPT, or nothing known'}, which can't be streamed; these "
                f"can: {', '.join(supported())}. Without --stream a CircuitGPT is analysed in memory"
            )
        return _streamed(folder)
    try:
        if gguf is not None:
            return _gguf(gguf, device)
        if architecture is None:
            return _circuitgpt(name, device)
        return _decoder(folder, architecture, device)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        if gguf is not None:
            raise CheckpointError(f"{name}, dequantised to four bytes a weight, does not fit into memory") from error
        if architecture is None:
            raise CheckpointError(f"{name} does not fit into memory") from error
        raise CheckpointError(
            f"{name} does not fit into memory; a folder of safetensors is analysed a layer at a time with --stream"
        ) from error


def ran_out(error: Exception) -> bool:
    """Whether ``error`` is one of those by which Python, the system, numpy or torch report a lack of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _architecture(folder: Path) -> str | None:
    """Return the model class that the config of a transformers folder names; None for any other kind of model."""
    if (folder / CONFIG_FILES[0]).is_file() or not (folder / "config.json").is_file():
        return None
    names = read_json(folder / "config.json").get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else None
    return None if architecture is None or "CircuitGPT" in architecture else architecture


def _circuitgpt(name: str | Path, device: torch.device) -> Source:
    """Load a CircuitGPT from a shipped name, a folder or a hub id."""
    try:
        model = CircuitGPT.from_pretrained(str(name), device=device)
    except CheckpointError as error:
        if (Path(name).expanduser() / CONFIG_FILES[0]).is_file():
            raise  # this is a CircuitGPT, and the error says what is wrong with it
        raise CheckpointError(
            f"{str(error).rstrip('.')}. A model of another kind is analysed from its folder, with config.json and "
            f"weights as transformers writes them: {', '.join(supported())}"
        ) from error
    config = model.config
    facts = {
        "name": str(model.card.get("name") or name),
        "kind": "CircuitGPT",
        "layers": config.n_layer,
        "width": config.d_model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": _fingerprint(model),
        "training_seed": model.card.get("recipe", {}).get("seed"),
        "training_commit": model.card.get("commit"),
    }

    def untrained(seed: int) -> nn.Module:
        return CircuitGPT(config, seed=seed).to(device, model.dtype).eval()

    source = Source(
        "circuitgpt", facts, config.block_size, config.vocab_size, model.tokenizer, "tinypython", model, untrained
    )
    source.conventions = conventions_beside(Path(name).expanduser())
    return source


def conventions_beside(folder: Path) -> Callable[[], Conventions] | None:
    """Return what reads the conventions in a folder; None where it has none of the files that state them."""
    stated = any((folder / name).is_file() for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return (lambda: conventions_in(folder)) if stated else None


def _decoder(folder: Path, architecture: str, device: torch.device) -> Source:
    """Load a model from a transformers folder in float32, or in float64 where it holds float64 weights."""
    if family_of(architecture) is None:
        raise CheckpointError(
            f"{folder} holds a {architecture}, which is not supported; supported are CircuitGPT, "
            f"{', '.join(supported())}"
        )
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(f"{folder} needs transformers: pip install 'semigroup-scalpel[transformers]'") from error
    config, _ = config_in(folder)
    stored = None
    if getattr(config, "quantization_config", None) is None:  # a quantised folder has other tensor names
        stored = check_folder(folder, config, architecture)
    # float32 holds half precision exactly. By default, transformers would round weights to the dtype in the config.
    widest = None if stored is None else torch.float64 if torch.float64 in stored else torch.float32
    try:
        auto: Any = AutoModelForCausalLM
        with torch.device("cpu"):  # transformers would use torch's default device
            model, info = auto.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, dtype=widest or "auto", output_loading_info=True
            )
    except Exception as error:  # whichever of its many exceptions transformers raises, the model can't be loaded
        if ran_out(error):
            raise
        raise CheckpointError(f"{folder} can't be loaded by transformers: {type(error).__name__}: {error}") from error
    check_loaded(info, architecture, folder)
    check_plain(model.config, architecture, folder)
    stored = stored or {next(model.parameters()).dtype}
    dtype = torch.float64 if torch.float64 in stored else torch.float32
    dtype_text = _name(dtype) + ("" if stored == {dtype} else f", stored as {', '.join(sorted(map(_name, stored)))}")
    source = _of_model(model.to(device, dtype), folder.resolve().name, dtype_text, str(folder), device)
    # "" names no pair, since a folder doesn't say how text is cut into words
    source.tokenizer = Tokenizer.from_folder(folder, "")
    source.conventions = lambda: conventions_in(folder)
    source.folder = folder
    return source


def _gguf(file: Path, device: torch.device) -> Source:
    """Load a GGUF file, dequantised to float32."""
    try:
        model = plain_model(file).to(device)
    except ImportError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError as error:
        if isinstance(error.__cause__, Exception) and ran_out(error.__cause__):
            raise MemoryError from error
        raise
    dtype_text = f"float32, dequantised from a GGUF whose tensors are {stored_as(file)}"
    source = _of_model(model, file.stem, dtype_text, str(file), device)
    source.conventions = lambda: gguf_conventions(file)
    try:
        source.tokenizer = gguf_tokenizer(file)
    except CheckpointError as error:
        source.no_tokenizer = str(error)
    return source


def _of_model(model: Any, name: str, dtype: str, where: str, device: torch.device) -> Source:
    """Make the source of a transformers model in memory; the report shows ``dtype``, and errors name ``where``."""
    model = model.eval().requires_grad_(False)
    decoder = decoder_of(model)
    if decoder is None:
        raise CheckpointError(f"the config of {where} asks for attention, positions or modules that have no rules")
    architecture = type(model).__name__
    facts = {
        "name": name,
        "kind": architecture,
        "layers": decoder.config.layers,
        "width": decoder.config.width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype,
        "weights_sha256": _fingerprint(model),
    }

    def untrained(seed: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            model_on_cpu = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
        untrained_model: nn.Module = model_on_cpu.to(device, model.dtype).eval().requires_grad_(False)
        return untrained_model

    pair = "gpt2" if architecture.startswith("GPT2") else None
    limits = decoder.config.max_length, decoder.config.vocab_size
    return Source("decoder", facts, *limits, None, pair, model, untrained)


def _streamed(folder: Path) -> Source:
    """Describe a model whose layers are read one at a time, from its folder's config and tensor headers."""
    decoder = decoder_in(folder)
    weights = decoder.weights
    assert isinstance(weights, FolderWeights)
    dtypes = sorted({_name(place.dtype) for place in weights.places.values()})
    names = read_json(folder / "config.json")["architectures"]
    facts = {
        "name": folder.resolve().name,
        "kind": f"{names[0]}, streamed",
        "layers": decoder.config.layers,
        "width": decoder.config.width,
        "parameters": sum(place.bytes // place.dtype.itemsize for place in weights.places.values()),
        "dtype": ", ".join(dtypes),
        "weights_sampled_sha256": sampled_mark(weights, folder),
    }
    limits = decoder.config.max_length, decoder.config.vocab_size
    pair = "gpt2" if str(names[0]).startswith("GPT2") else None
    source = Source("stream", facts, *limits, Tokenizer.from_folder(folder, ""), pair, folder=folder)
    source.conventions = lambda: conventions_in(folder)
    return source


def _name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the names and bytes of all tensors."""
    from ..experiments.provenance import fingerprint

    return fingerprint(model)  # type: ignore[arg-type]  # it needs state_dict alone
