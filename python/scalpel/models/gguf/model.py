"""Models in GGUF files, the format of llama.cpp, dequantised into plain models of transformers.

transformers' own reader reads the file. What it would silently ignore (a tensor that has no place, a scaling of the
positions) is detected here and refused. This needs the extra ``gguf``. To keep a model as safetensors, which can be
streamed::

    from scalpel.models.gguf import plain_model, tokenizer

    plain_model("model.gguf").save_pretrained(folder)
    tokenizer("model.gguf").save(folder)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..conventions import Conventions
from ..decoders.families import config_of
from ..decoders.strict import Expected, check_loaded, expected_by
from ..gguf_files import HOW_TO_JOIN, gguf_in
from ..tokenizer import Tokenizer
from ..weight_files import CheckpointError
from .checks import check_metadata, check_tensors, check_whole
from .header import Header, read_header

__all__ = ["conventions", "plain_model", "stored_as", "tokenizer"]

_NAME = "model.gguf"

# How text is split before tokens are merged, by llama.cpp's names. transformers would always split it as GPT-2 does.
_CUT_AS_GPT2 = ("gpt-2", "gpt2", "jais", "mpt", "olmo")
# These split off each digit first, and then split the rest as GPT-2 does.
_CUT_AT_DIGITS = ("codeshell", "command-r", "exaone", "refact", "smollm", "starcoder")


def plain_model(path: str | Path) -> Any:
    """Read the model in a GGUF file as transformers' plain class in float32, in evaluation mode.

    What transformers itself returns for such a file counts as quantised and cannot be saved. This is the same model
    without that mark: ``save_pretrained`` writes it, and it can be used wherever a model of transformers can.

    Args:
        path: A GGUF file, or a folder with one.

    Returns:
        A ``LlamaForCausalLM`` or another class that :func:`scalpel.jacobian` has rules for.

    Raises:
        CheckpointError: If there is no such file, it is damaged, or its model cannot be read exactly.
        ImportError: If transformers, gguf or accelerate is missing.

    Example:
        >>> from scalpel.models.gguf import plain_model
        >>> model = plain_model("model.gguf")
        >>> type(model).__name__, model.dtype
        ('Qwen2ForCausalLM', torch.float32)
    """
    file = _file(path)
    header = read_header(file)
    _check_packages()
    check_whole(header)
    with _alone(file) as folder, torch.device("cpu"):
        expected = _expected(header, folder)
        model = _read(file, folder, expected)
        return _without_quantisation(model, file.name)


def tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer in a GGUF file.

    Args:
        path: A GGUF file, or a folder with one.

    Returns:
        The tokenizer; its ``save(folder)`` writes a tokenizer.json.

    Raises:
        CheckpointError: If there is no such file, it has no tokenizer, or it does not name a known way to split text.
        ImportError: If transformers or gguf is missing.

    Example:
        >>> from scalpel.models.gguf import tokenizer
        >>> reader = tokenizer("model.gguf")
        >>> reader.decode(reader.encode("abba"))
        'abba'
    """
    file = _file(path)
    header = read_header(file)
    kind, cut = (header.facts.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind is None:
        raise CheckpointError(f"{file} holds no tokenizer")
    inner = _read_tokenizer(file).backend_tokenizer
    if kind == "gpt2":
        _set_cut(inner, cut, file)
    return Tokenizer(inner)


def conventions(path: str | Path) -> Conventions:
    """Read which token begins a text, and the chat template, as the metadata of a GGUF file say.

    Args:
        path: A GGUF file, or a folder with one.

    Returns:
        The conventions of its tokenizer.

    Raises:
        CheckpointError: If there is no such file, or it has no tokenizer.
        ImportError: If transformers or gguf is missing.

    Example:
        >>> from scalpel.models.gguf import conventions
        >>> conventions("model.gguf").bos is None
        True
    """
    file = _file(path)
    return Conventions(_read_tokenizer(file), str(file))


def stored_as(path: str | Path) -> str:
    """Summarize how the tensors of a GGUF file are stored.

    Args:
        path: A GGUF file, or a folder with one.

    Returns:
        The counts, the most frequent kind first, such as "210 Q4_1, 61 F32, 1 Q8_0".

    Raises:
        CheckpointError: If there is no such file, or it is damaged.

    Example:
        >>> from scalpel.models.gguf import stored_as
        >>> stored_as("model.gguf")
        '27 F32'
    """
    from gguf import GGMLQuantizationType

    kinds = read_header(_file(path)).kinds().most_common()
    return ", ".join(f"{count} {GGMLQuantizationType(kind).name}" for kind, count in kinds)


# ---- reading -------------------------------------------------------------------------------------


def _file(path: str | Path) -> Path:
    file = gguf_in(path)
    if file is None:
        raise CheckpointError(f"{path} is neither a GGUF file nor a folder with one and no other weights")
    return file


def _check_packages() -> None:
    lacking = []
    for name in ("transformers", "gguf", "accelerate"):
        try:
            __import__(name)
        except ImportError:
            lacking.append(name)
    if lacking:
        raise ImportError(f"a GGUF file needs {' and '.join(lacking)}: pip install 'semigroup-scalpel[gguf]'")


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Give a folder that holds only the file, as _NAME, because transformers would also read an adapter beside it."""
    with tempfile.TemporaryDirectory(prefix="scalpel-gguf-") as folder:
        os.symlink(file.resolve(), Path(folder) / _NAME)
        yield Path(folder)


def _expected(header: Header, folder: Path) -> Expected:
    """Find what the model's class expects with transformers' config, and check that the file's metadata agree."""
    from transformers import AutoConfig

    file = header.path
    parts = header.facts.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{file} is one of {parts} parts of a model. {HOW_TO_JOIN}")
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=_NAME, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds here, too
        raise CheckpointError(
            f"transformers can't read the {header.architecture!r} in {file}: {type(error).__name__}: {error}"
        ) from error
    expected = expected_by(config, None, file)
    shape = config_of(expected.family, config, expected.architecture)
    if isinstance(shape, str):
        raise CheckpointError(f"{file} can't be read: {shape}")
    check_metadata(header, config, shape)
    check_tensors(header, expected, shape)
    return expected


def _read(file: Path, folder: Path, expected: Expected) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig  # newer releases of transformers would leave the weights quantised

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(
            folder,
            gguf_file=_NAME,
            config=expected.config,  # already read; reading it again takes seconds because of the vocabulary
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # transformers raises errors of many kinds here, too
        raise CheckpointError(
            f"transformers can't read the weights in {file}: {type(error).__name__}: {error}"
        ) from error
    check_loaded(info, expected.architecture, file)
    return model


def _without_quantisation(model: Any, name: str) -> Any:
    """Move the weights into a new model of the same class whose config does not say that it was quantised."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = name
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    for path, buffer in model.named_buffers():  # the rotary angles, which are not in the state dict
        owner, _, leaf = path.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, buffer)
    return plain.eval()


# ---- text ----------------------------------------------------------------------------------------


def _read_tokenizer(file: Path) -> Any:
    """Read the tokenizer of a GGUF file by transformers."""
    _check_packages()
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        with _alone(file) as folder:
            return auto.from_pretrained(folder, gguf_file=_NAME, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds; each means that the file can't be read
        raise CheckpointError(
            f"transformers can't read the tokenizer in {file}: {type(error).__name__}: {error}"
        ) from error


def _set_cut(inner: Any, cut: Any, file: Path) -> None:
    """Make the tokenizer ``inner`` split text before merging as ``cut``, the name in the file, says."""
    from tokenizers import pre_tokenizers

    if cut in _CUT_AT_DIGITS:
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif cut not in _CUT_AS_GPT2 and not isinstance(inner.pre_tokenizer, pre_tokenizers.Sequence):
        raise CheckpointError(
            f"{file} says that text is cut as {cut!r} before merging, which neither transformers nor scalpel knows, so "
            "its tokens would be others"
        )
