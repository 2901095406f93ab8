"""The configuration of a CircuitGPT as transformers keeps it: the model's own fields beside those of every config."""

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import PretrainedConfig

from ..circuitgpt.checkpoint import CONFIG_FILES
from ..circuitgpt.config import HUB_FIELDS, CircuitGPTConfig
from ..weight_files import read_json

__all__ = ["CircuitGPTHubConfig", "public_fields_in"]

# Arguments of every config that are stored under another name.
_ARGUMENTS = ("attn_implementation", "experts_implementation", "name_or_path", "num_labels")


class CircuitGPTHubConfig(PretrainedConfig):
    """The configuration of a :class:`.modeling.CircuitGPTForCausalLM`.

    It has the fields of :class:`scalpel.CircuitGPTConfig` as attributes and checks them as strictly, transformers' own
    names for the sizes (``hidden_size``, ``num_hidden_layers``), and transformers' own fields.

    Args:
        **fields: The fields of a ``beeg_config.json``, or of the ``config.json`` of the hub's layout.

    Raises:
        ValueError: A field is unknown and could change what the model computes, or has a value outside its range.

    Example:
        >>> from scalpel.models.transformers_classes.configuration import CircuitGPTHubConfig
        >>> config = CircuitGPTHubConfig(n_layer=2, n_head=4, d_model=32)
        >>> config.hidden_size, config.num_hidden_layers, config.d_mlp, config.circuitgpt().d_mlp
        (32, 2, 128, 128)
    """

    model_type = "circuitgpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "head_dim": "d_head",
        "intermediate_size": "d_mlp",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, **fields: Any) -> None:
        fields = {self.attribute_map.get(name, name): value for name, value in fields.items()}
        of_transformers = {name: fields.pop(name) for name in list(fields) if _is_of_transformers(name)}
        config = CircuitGPTConfig.from_dict(fields)
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self._own_fields = tuple(config.to_dict())
        self.use_cache = bool(of_transformers.pop("use_cache", True))
        of_transformers.pop("tie_word_embeddings", None)  # tied_unembed says it
        super().__init__(**of_transformers)
        self.tie_word_embeddings = config.tied_unembed

    def circuitgpt(self) -> CircuitGPTConfig:
        """Return the configuration as Scalpel's own class."""
        return CircuitGPTConfig.from_dict({name: getattr(self, name) for name in self._own_fields})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, as every config of transformers does."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("_own_fields", None)
        return fields


def _is_of_transformers(name: str) -> bool:
    """Whether a field of a config.json is transformers' own, and none of the model."""
    return name.startswith("_") or name in HUB_FIELDS or name in _ARGUMENTS or hasattr(PretrainedConfig, name)


def public_fields_in(folder: Any, subfolder: str = "") -> dict[str, Any] | None:
    """Read the configuration of a CircuitGPT that transformers would not recognise as one.

    That is a folder in the public layout, which has a ``beeg_config.json`` and no ``config.json``, or one whose
    ``config.json`` names a CircuitGPT among its architectures but no model type.

    Args:
        folder: What was given to ``from_pretrained``.
        subfolder: The folder in it that holds the model.

    Returns:
        The fields; None if this is no such folder.

    Raises:
        scalpel.models.weight_files.CheckpointError: The ``beeg_config.json`` is damaged.
    """
    try:
        path = Path(folder) / (subfolder or "")
        if (path / CONFIG_FILES[1]).is_file():
            fields = json.loads((path / CONFIG_FILES[1]).read_text(encoding="utf-8"))
            nameless = "model_type" not in fields and "CircuitGPT" in str(fields.get("architectures"))
            return fields if nameless else None
    except (TypeError, ValueError, AttributeError, OSError):
        return None  # whatever this is, transformers says what is wrong with it
    if not (path / CONFIG_FILES[0]).is_file():
        return None
    return {"architectures": ["CircuitGPTForCausalLM"]} | read_json(path / CONFIG_FILES[0])
