"""The configuration of a weight-sparse transformer; fields that could change the mathematics unnoticed are refused.

Fields and defaults follow the public inference code of Gao et al. 2025 (arXiv 2511.13653).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ABS_TOPK_LOCATIONS = (
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_attn",
    "resid_post_mlp",
)

# Switches of the published class for training or speed. They do not change what the model computes in evaluation.
_SWITCHES = frozenset(
    {
        "dropout",
        "dropout_cat_pos_emb",
        "enable_sparse_kernels",
        "flash",
        "grad_checkpointing",
        "debug_nans",
        "learnable_bigram_table",
    }
)

# Fields that transformers adds to the model's own.
HUB_FIELDS = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "is_decoder",
        "max_position_embeddings",
        "tie_word_embeddings",
    }
)

# Fields of checkpoints whose code was never published. At the values listed here they change nothing, and the model is
# one that the published code can express.
_ONLY_AT: dict[str, tuple[Any, ...]] = {
    "unembed_rank": (None,),
    "bigram_table_rank": (None,),
    "mup_width_multiplier": (None,),
    "afrac_ste": (None, False),
    "afrac_ste_only_non_neurons": (None, False),
    "afrac_approx": (None, False),
    "rtopk": (None, False),
    "mup": (None, False),
    "enable_fp8_linear": (None, False),
    "scale_invariance": (None, False),
    "use_tied_aux_matrix": (None, False),
}


@dataclass
class CircuitGPTConfig:
    """Describe the shape and the variant of a :class:`scalpel.CircuitGPT`.

    Attributes:
        block_size: The largest number of tokens that a text may have.
        vocab_size: The number of token ids.
        n_layer: The number of layers; 0 is allowed.
        n_head: The number of attention heads of a layer.
        d_head: The width of one head, d_model / n_head by default.
        d_model: The width of the residual stream.
        d_mlp: The number of neurons of an MLP, 4 · d_model by default.
        bias: Whether linear layers have biases.
        ln_bias: Whether LayerNorms have biases. RMSNorms never do.
        rms_norm: Whether the norms are RMSNorms instead of LayerNorms.
        residual_activation_type: What is applied to the residual stream after each block: "identity" or "relu".
        activation_type: The activation of the neurons: "gelu" (the exact one) or "relu".
        afrac: The fraction that AbsTopK keeps at each location of ``afrac_loctypes``: k = int(afrac · width). None
            means that there is no AbsTopK.
        afrac_loctypes: The locations of AbsTopK, names of ``ABS_TOPK_LOCATIONS`` with commas between them.
        tied_unembed: Whether the output matrix is the embedding.
        tokenizer_name: The name of the tokenizer that the model was trained with.
        enable_bigram_table: Whether each token adds its own row of a table (vocab_size, vocab_size) to its logits.
        d_pos_emb: The width of the position embeddings if these are concatenated to the inputs of attention and MLP, or
            None if they are added to the token embeddings.
        sinusoidal_cat_pos_emb: Whether concatenated position embeddings are fixed sinusoids instead of learned.
        sink: Whether each head has an attention sink: a learned logit that takes part in the softmax and has no value.
        extra: Fields that were read and do not change the mathematics. They are kept so that saving gives them back.

    Raises:
        ValueError: If a field is outside its range. The message names the field and the allowed values.

    Example:
        >>> from scalpel import CircuitGPTConfig
        >>> config = CircuitGPTConfig(n_layer=2, n_head=4, d_model=32, afrac=0.25, afrac_loctypes="attn_in,mlp_neuron")
        >>> config.d_mlp, config.k_at("mlp_neuron", config.d_mlp), config.k_at("mlp_out", 32)
        (128, 32, None)
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    d_head: int | None = None
    d_model: int = 768
    d_mlp: int | None = None
    bias: bool = True
    ln_bias: bool = True
    rms_norm: bool = False
    residual_activation_type: str = "identity"
    activation_type: str = "gelu"
    afrac: float | None = None
    afrac_loctypes: str = "attn_in,attn_out,mlp_in,mlp_out"
    tied_unembed: bool = True
    tokenizer_name: str = "tinypython_2k"
    enable_bigram_table: bool = False
    d_pos_emb: int | None = None
    sinusoidal_cat_pos_emb: bool = False
    sink: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "vocab_size",
            "n_layer",
            "n_head",
            "d_model",
            "d_head",
            "d_mlp",
            "d_pos_emb",
        ):
            value = getattr(self, name)
            if value is None and name in ("d_head", "d_mlp", "d_pos_emb"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "n_layer" else 1):
                raise ValueError(f"config field {name!r} is {value!r}; it must be a positive integer")
        for name in ("bias", "ln_bias", "rms_norm", "tied_unembed", "enable_bigram_table", "sink"):
            _one_of(name, getattr(self, name), (True, False))
        _one_of("sinusoidal_cat_pos_emb", self.sinusoidal_cat_pos_emb, (True, False))
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise ValueError(
                    f"d_model {self.d_model} is not a multiple of n_head {self.n_head}; give d_head explicitly"
                )
            self.d_head = self.d_model // self.n_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        _one_of("residual_activation_type", self.residual_activation_type, ("identity", "relu"))
        _one_of("activation_type", self.activation_type, ("gelu", "relu"))
        number = isinstance(self.afrac, int | float) and not isinstance(self.afrac, bool)
        if self.afrac is not None and not (number and 0 <= self.afrac <= 1):
            raise ValueError(f"config field 'afrac' is {self.afrac!r}; it is a fraction from 0 to 1, or null")
        if self.afrac is not None and not isinstance(self.afrac_loctypes, str):
            raise ValueError(
                f"config field 'afrac_loctypes' is {self.afrac_loctypes!r}; it is a text, with commas between locations"
            )
        for location in self.topk_locations:
            _one_of("afrac_loctypes", location, ABS_TOPK_LOCATIONS)
        if self.sinusoidal_cat_pos_emb and self.d_pos_emb is None:
            raise ValueError("sinusoidal_cat_pos_emb needs d_pos_emb: it concerns concatenated positions only")

    @property
    def topk_locations(self) -> tuple[str, ...]:
        """The locations at which AbsTopK is applied; none if ``afrac`` is None."""
        if self.afrac is None:
            return ()
        return tuple(part.strip() for part in self.afrac_loctypes.split(",") if part.strip())

    @property
    def d_attn(self) -> int:
        """The width of q, of k and of v, with all heads side by side."""
        assert self.d_head is not None
        return self.n_head * self.d_head

    @property
    def d_in(self) -> int:
        """The width of the inputs of attention and MLP: the residual, and the position embeddings if concatenated."""
        return self.d_model + (self.d_pos_emb or 0)

    def k_at(self, location: str, width: int) -> int | None:
        """Compute how many entries AbsTopK keeps at a location.

        Args:
            location: One of ``ABS_TOPK_LOCATIONS``.
            width: The number of entries that a token has there.

        Returns:
            int(afrac · width), or None if AbsTopK is not applied there.
        """
        if location not in self.topk_locations:
            return None
        assert self.afrac is not None
        return int(self.afrac * width)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "CircuitGPTConfig":
        """Read the fields of a ``beeg_config.json``.

        Args:
            stored: The fields as they stand in the file. ``n_mlp`` is read as ``d_mlp``.

        Returns:
            The configuration. Switches for training and fields of the hub's format are kept in ``extra``.

        Raises:
            ValueError: If a field is unknown and could change the mathematics, or has a value outside its range.

        Example:
            >>> config = scalpel.CircuitGPTConfig.from_dict({"d_model": 32, "n_head": 4, "n_mlp": 64, "flash": True})
            >>> config.d_mlp, config.extra
            (64, {'flash': True})
        """
        own_fields = {entry.name for entry in fields(cls)} - {"extra"}
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in stored.items():
            name = "d_mlp" if key == "n_mlp" else key
            if name in own_fields:
                if name in known and known[name] != value:
                    raise ValueError(f"config gives {name!r} twice: {known[name]!r} and {value!r} (as {key!r})")
                known[name] = value
            elif name in _SWITCHES or name in HUB_FIELDS:
                extra[name] = value
            elif name in _ONLY_AT:
                if not any(value is allowed for allowed in _ONLY_AT[name]):
                    raise ValueError(
                        f"config field {name!r} is {value!r}, which the published model cannot express; "
                        f"allowed: {', '.join(map(repr, _ONLY_AT[name]))}"
                    )
                extra[name] = value
            elif value is None or value is False:
                extra[name] = value  # a switch that is off changes nothing, even if its name is unknown
            else:
                raise ValueError(
                    f"unknown config field {name!r} = {value!r}: it may change what the model computes, so the "
                    "checkpoint is refused. Remove the field if you know that it is harmless."
                )
        return cls(**known, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, including those in ``extra``.

        Returns:
            Plain data that :meth:`from_dict` reads.

        Example:
            >>> config = scalpel.CircuitGPTConfig.from_dict({"d_model": 32, "n_head": 4, "flash": True})
            >>> config.to_dict()["flash"], scalpel.CircuitGPTConfig.from_dict(config.to_dict()) == config
            (True, True)
        """
        own_fields = asdict(self)
        return {**own_fields.pop("extra"), **own_fields}

    def to_public_dict(self) -> dict[str, Any]:
        """Return the fields for ``beeg_config.json``, which are those that the published class accepts.

        Returns:
            Plain data, without the fields that the hub's format adds.

        Example:
            >>> config = scalpel.CircuitGPTConfig.from_dict({"d_model": 32, "n_head": 4, "use_cache": True})
            >>> "use_cache" in config.to_dict(), "use_cache" in config.to_public_dict()
            (True, False)
        """
        return {name: value for name, value in self.to_dict().items() if name not in self.extra or name in _SWITCHES}

    def unknown_fields(self) -> dict[str, Any]:
        """Return the extra fields that no published code has.

        Returns:
            The fields by name. They were accepted because they are off.

        Example:
            >>> config = scalpel.CircuitGPTConfig.from_dict({"d_model": 32, "n_head": 4, "new_switch": False})
            >>> config.unknown_fields()
            {'new_switch': False}
        """
        return {
            name: value
            for name, value in self.extra.items()
            if name not in _SWITCHES and name not in HUB_FIELDS and name not in _ONLY_AT
        }


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ValueError(f"config field {name!r} has {value!r}; allowed: {', '.join(map(str, allowed))}")
