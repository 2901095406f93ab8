"""The model that the experiment is put to, of any kind that has rules, and texts of equal length for it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...hooks.standing import stood_for
from ...models.circuitgpt.checkpoint import CONFIG_FILES
from ...models.circuitgpt.model import CircuitGPT
from ...models.decoders.families import decoder_or_reason, family_of, supported
from ...models.decoders.strict import check_loaded, check_plain, config_in
from ...models.gguf.model import plain_model
from ...models.gguf.model import tokenizer as gguf_tokenizer
from ...models.gguf_files import gguf_in
from ...models.tokenizer import Tokenizer
from ...models.weight_files import CheckpointError, read_json
from ...tasks.refused import Refused
from ..askable import check_askable

__all__ = ["Asked", "asked", "texts_of"]

_SOURCES = ("argparse", "ast", "calendar", "csv", "datetime", "difflib", "inspect", "json.decoder", "textwrap")


@dataclass(frozen=True)
class Asked:
    """A model with what is needed to put a text to it.

    Attributes:
        model: A CircuitGPT, or a decoder of transformers that has rules.
        layers: How many layers it has.
        width: The width of its residual stream.
        vocabulary: How many token ids.
        context: The most tokens of a text.
        tokenizer: Its tokenizer; None where there is none.
        name: What results call it.
    """

    model: Any
    layers: int
    width: int
    vocabulary: int
    context: int
    tokenizer: Tokenizer | None
    name: str
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameter = next(iter(self.model.parameters()))
        if parameter.dtype not in (torch.float32, torch.float64):
            raise Refused(f"the model's weights are {parameter.dtype}; float32 or float64 are needed: model.float()")


def asked(model: Any) -> Asked:
    """Find what a user means: a model, the name, folder or hub id of a CircuitGPT, a folder of transformers, or a GGUF.

    Raises:
        CheckpointError: There is no such model, or it can't be read.
        Refused: The model has no rules.
    """
    if isinstance(model, Asked):
        return model
    if isinstance(model, (str, Path)):
        return _loaded(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; this experiment takes a CircuitGPT or a transformers model")
    model = stood_for(model)
    if isinstance(model, CircuitGPT):
        check_askable(model)
        config = model.config
        name = str(model.card.get("name", "unnamed"))
        sizes = config.n_layer, config.d_model, config.vocab_size, config.block_size
        return Asked(model, *sizes, model.tokenizer, name, dict(model.card))
    return _decoder(model, None, str(getattr(model, "name_or_path", "") or type(model).__name__))


def _loaded(name: str | Path) -> Asked:
    path = Path(name).expanduser()
    file = gguf_in(path)
    if file is not None:
        return _decoder(plain_model(file), gguf_tokenizer(file), file.stem)
    stored = path / "config.json"
    if not stored.is_file() or (path / CONFIG_FILES[0]).is_file():
        return asked(CircuitGPT.from_pretrained(str(name)))
    architecture = str((read_json(stored).get("architectures") or ["?"])[0])
    if "CircuitGPT" in architecture:
        return asked(CircuitGPT.from_pretrained(str(name)))
    if family_of(architecture) is None:
        raise CheckpointError(f"{path} holds a {architecture}; supported are CircuitGPT, {', '.join(supported())}")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(f"{path} needs transformers: pip install 'semigroup-scalpel[transformers]'") from error
    config, _ = config_in(path)
    auto: Any = AutoModelForCausalLM
    with torch.device("cpu"):  # transformers would use torch's default device
        model, info = auto.from_pretrained(
            path, trust_remote_code=False, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    check_loaded(info, architecture, path)
    check_plain(config, architecture, path)
    return _decoder(model, Tokenizer.from_folder(path, ""), path.resolve().name)


def _decoder(model: Any, tokenizer: Tokenizer | None, name: str) -> Asked:
    decoder = decoder_or_reason(model)
    if isinstance(decoder, str):
        raise Refused(f"the model has no rules, which this experiment needs: {decoder}")
    config = decoder.config
    model = model if not model.training else model.eval()
    return Asked(model, config.layers, config.width, config.vocab_size, config.max_length, tokenizer, name)


def texts_of(source: Asked, count: int, tokens: int, path: str, seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """``count`` pieces of a text, (1, tokens) each, that don't overlap, and what a result says of the text.

    Args:
        source: The model.
        count: How many.
        tokens: How long each of them is.
        path: A file in UTF-8. If it is empty, the text is the standard library's: Python's sources for a CircuitGPT,
            and the topics of Python's help, which are English prose, for other models. A model without a tokenizer gets
            random token ids.
        seed: Of the choice of pieces.

    Raises:
        Refused: The context is shorter than ``tokens``.
        ValueError: The text is too short, or there is no tokenizer to read it.
    """
    if tokens > source.context:
        raise Refused(f"the context holds {source.context} tokens, and option 'tokens' is {tokens}: give fewer")
    device = next(iter(source.model.parameters())).device
    rng = np.random.default_rng([seed, 90])
    if source.tokenizer is None:
        if path:
            raise ValueError(f"the model has no tokenizer, so {path!r} can't be read: leave option 'text' out")
        ids = rng.integers(source.vocabulary, size=(count, tokens))
        return [torch.tensor(row[None], device=device, dtype=torch.int64) for row in ids], {"text": "random token ids"}
    if path:
        text, name = Path(path).expanduser().read_text(encoding="utf-8"), Path(path).name
    elif isinstance(source.model, CircuitGPT):
        text = "\n".join(inspect.getsource(import_module(module)) for module in _SOURCES)
        name = "sources of Python's standard library"
    else:
        text, name = "\n\n".join(import_module("pydoc_data.topics").topics.values()), "topics of Python's help"
    encoded: Sequence[int] = source.tokenizer.encode(text)
    pieces = len(encoded) // tokens
    if pieces < count:
        raise ValueError(
            f"{name} has {len(encoded)} tokens, and {count} prompts of {tokens} need {count * tokens}: give a longer "
            "text, or smaller options 'prompts' or 'tokens'"
        )
    chosen = rng.choice(pieces, size=count, replace=False)
    rows = [encoded[piece * tokens : (piece + 1) * tokens] for piece in chosen]
    found = [torch.tensor([list(row)], device=device, dtype=torch.int64) for row in rows]
    return found, {"text": name, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
