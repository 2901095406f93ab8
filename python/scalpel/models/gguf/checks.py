"""Checks that transformers reads everything that a GGUF file says.

Its reader silently drops a tensor that has no place and metadata that it does not know, such as a scaling of the
positions. The package gguf and the file's own header tell what there is.
"""

from __future__ import annotations

import math
from typing import Any

from ..decoders.decoder import DecoderConfig
from ..decoders.strict import Expected
from ..weight_files import CheckpointError, some
from .header import Header

# Metadata of an architecture that does not affect what a model computes, or that the tensors' shapes imply.
_HARMLESS = ("feed_forward_length", "rope.scaling.finetuned", "rope.scaling.original_context_length", "pooling_type")
_OTHERWISE = "The model would compute something else than it was made for"


def check_whole(header: Header) -> None:
    """Check that all tensors lie inside the file.

    Raises:
        CheckpointError: If the file is cut short, or a tensor is stored in an unknown way.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = header.path.stat().st_size
    for name, tensor in header.tensors.items():
        try:
            block, bytes_each = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{name!r} in {header.path} is stored in a way, number {tensor.kind}, that the installed package gguf "
                "does not know: install a newer one"
            ) from error
        end = header.begin + tensor.begin + math.prod(tensor.shape) // block * bytes_each
        if end > size:
            raise CheckpointError(f"{header.path} is cut short: {name!r} ends at byte {end} of {size}")


def check_metadata(header: Header, config: Any, shape: DecoderConfig) -> None:
    """Check that the metadata agree with the config that transformers made of them.

    Raises:
        CheckpointError: If they do not.
    """
    stored = header.of_architecture()
    windows = set(shape.windows) or {None}
    in_config: dict[str, Any] = {
        "block_count": shape.layers,
        "embedding_length": shape.width,
        "context_length": shape.max_length,
        "vocab_size": shape.vocab_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "attention.layer_norm_epsilon": shape.eps,
        "attention.causal": True,
        "attention.sliding_window": windows.pop() if len(windows) == 1 else "by layer",
        "rope.dimension_count": shape.head_dim,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scale_linear": 1.0,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    # What a file leaves out has llama.cpp's default.
    if shape.rotary is not None:
        in_config["rope.freq_base"] = config.rope_parameters["rope_theta"]
        stored.setdefault("rope.freq_base", 10000.0)
    stored.setdefault("attention.head_count_kv", stored.get("attention.head_count"))
    stored.setdefault("attention.key_length", shape.width // shape.heads)
    stored.setdefault("attention.sliding_window", None)
    eps = "attention.layer_norm_rms_epsilon" if shape.rms else "attention.layer_norm_epsilon"
    needed = ("block_count", "embedding_length", "context_length", "attention.head_count", eps)
    unknown = sorted(stored.keys() - in_config.keys() - set(_HARMLESS))
    faults = [
        f"{key} is {stored[key]!r} in the file and {in_config[key]!r} in the config"
        for key in stored.keys() & in_config.keys()
        if not _same(stored[key], in_config[key])
    ]
    lacking = [key for key in needed if key not in stored]
    faults += [f"{key} is not in the file, and {in_config[key]!r} in the config" for key in lacking]
    if unknown:
        faults.append(f"{some(unknown)} {'has' if len(unknown) == 1 else 'have'} no place in the config")
    if faults:
        raise CheckpointError(
            f"transformers does not read all that {header.path} says of its {header.architecture!r}: "
            f"{'; '.join(sorted(faults))}. {_advice(len(lacking) == len(faults))}"
        )


def _advice(lacking: bool) -> str:
    """Say what to do about a file that cannot be read exactly.

    If something is missing and nothing else is wrong (``lacking``), the file is probably damaged, and another download
    can help. It would not help with a complete file, because transformers' reader would ignore the same parts again.
    """
    if lacking:
        return f"{_OTHERWISE}: download the file again, or use the model's safetensors, if they are published"
    return (
        f"{_OTHERWISE}, since transformers' reader passes over what it does not know: use the model's safetensors, if "
        "they are published"
    )


def _same(stored: Any, configured: Any) -> bool:
    if isinstance(stored, float) and isinstance(configured, int | float) and not isinstance(configured, bool):
        return math.isclose(stored, configured, rel_tol=1e-6)  # the file holds float32
    return bool(stored == configured)


def check_tensors(header: Header, expected: Expected, shape: DecoderConfig) -> None:
    """Check that the file's tensors are those of the model.

    Raises:
        CheckpointError: If a tensor of the file has no place in the model, or the model needs one that is missing.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next((number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if kind is None:
        raise CheckpointError(f"the package gguf knows no architecture {header.architecture!r}: install a newer one")
    names = get_tensor_name_map(kind, shape.layers)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, size in expected.shapes.items():
        if name not in expected.tied:
            stem, _, end = name.rpartition(".")
            wanted[f"{names.get_name(stem) or stem}.{end}"] = size
    faults = []
    if lacking := sorted(wanted.keys() - header.tensors.keys()):
        faults.append(f"it lacks {some(lacking)}")
    if extra := sorted(header.tensors.keys() - wanted.keys()):
        faults.append(f"transformers would drop {some(extra)}")
    for name in sorted(wanted.keys() & header.tensors.keys()):
        shape_in_file = header.tensors[name].shape
        if shape_in_file not in (wanted[name], wanted[name][::-1]):  # GGUF files hold GPT-2's matrices transposed
            faults.append(f"{name!r} has shape {shape_in_file}, by the config {wanted[name]}")
    if faults:
        why = ""
        if "rope_freqs.weight" in extra:
            why = "rope_freqs.weight scales the positions (Llama 3 is made so), and without it they would be others. "
        raise CheckpointError(
            f"{header.path} is not the {expected.architecture} of its metadata: {'; '.join(faults)}. {why}"
            f"{_advice(not extra)}"
        )
