"""CircuitGPT for TransformerLens's bridge, which finds this adapter among the entry points of installed packages.

The bridge puts a component of its own in the place of each module and calls the module through it. A CircuitGPT shows
its values to a tap, so a component hands on a tap that also passes them through the bridge's hook points.
"""

from typing import Any, ClassVar

from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import BlockBridge, EmbeddingBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..circuitgpt.layers import LayerInputs

__all__ = ["CircuitGPTAdapter"]

_STREAM = "circuit_model.transformer"


class CircuitGPTAdapter(ArchitectureAdapter):
    """The parts of a CircuitGPT by TransformerLens's names.

    ``hook_q``, ``hook_k``, ``hook_v``, ``hook_z`` and ``hook_pattern`` hold what
    :meth:`scalpel.CircuitGPT.run_with_cache` gives, after AbsTopK, with an axis for the heads. Weights keep their own
    layout: folding norms and centring have no meaning around AbsTopK, so TransformerLens's compatibility mode is off.

    Example:
        >>> import scalpel
        >>> from transformer_lens.model_bridge import TransformerBridge
        >>> folder = scalpel.CircuitGPT.from_pretrained("bracket-mini").folder
        >>> bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
        >>> _, cache = bridge.run_with_cache("[[1,2]")
        >>> cache["blocks.0.attn.hook_q"].shape
        torch.Size([1, 6, 8, 16])
    """

    supports_compatibility_mode = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.positional_embedding_type = "standard"
        self.cfg.gated_mlp = False
        self.cfg.attn_only = False
        self.cfg.default_prepend_bos = False
        self.cfg.tokenizer_name = None  # a checkpoint's name for its tokenizer says nowhere where one is found
        self.weight_processing_conversions: dict[str, Any] = {}
        self.component_mapping = {
            "embed": EmbeddingBridge(name=f"{_STREAM}.wte"),
            "blocks": _CircuitBlockBridge(
                name=f"{_STREAM}.h",
                config=self.cfg,
                submodules={
                    "ln1": GeneralizedComponent(name="ln_1"),
                    "attn": _AttentionBridge(name="attn", config=self.cfg),
                    "ln2": GeneralizedComponent(name="ln_2"),
                    "mlp": _MLPBridge(name="mlp", config=self.cfg),
                },
            ),
            "ln_final": GeneralizedComponent(name=f"{_STREAM}.ln_f"),
            "unembed": UnembeddingBridge(name="circuit_model.lm_head"),
        }


class _CircuitBlockBridge(BlockBridge):
    """A layer. ``hook_resid_mid`` is the residual stream itself, so that a change there reaches all that follows."""

    hook_aliases: ClassVar[dict[str, str]] = {
        "hook_resid_pre": "hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_out": "attn.hook_out",
        "hook_mlp_out": "mlp.hook_out",
    }

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.hook_resid_mid = HookPoint()

    def forward(self, x: Tensor, layer: LayerInputs) -> Tensor:
        """Run the layer, with the residual between attention and MLP passed through its hook point."""

        def tap(name: str, value: Tensor) -> Tensor:
            value = layer.tap(name, value)
            return self.hook_resid_mid(value) if name.endswith(".resid_mid") else value

        result: Tensor = super().forward(x, layer._replace(tap=tap))
        return result


class _Tapped(GeneralizedComponent):
    """A component whose values on the way are those that the module shows to its tap, by the end of their names."""

    pattern = False

    @property
    def points(self) -> dict[str, HookPoint]:
        """The hook point of each value that a tap sees, by the end of its name."""
        raise NotImplementedError

    def forward(self, x: Tensor, layer: LayerInputs) -> Tensor:
        """Run the module, with the values on its way passed through the hook points."""

        def tap(name: str, value: Tensor) -> Tensor:
            value = layer.tap(name, value)
            point = self.points.get(name.rpartition(".")[2])
            return value if point is None else self._through(point, value)

        run: Any = self.original_component
        return self.hook_out(run(self.hook_in(x), layer._replace(tap=tap, pattern=self.pattern)))

    def _through(self, point: HookPoint, value: Tensor) -> Tensor:
        return point(value)


class _AttentionBridge(_Tapped):
    """Attention. The hook points have an axis for the heads, as TransformerLens's have."""

    pattern = True

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.heads = int(config.n_heads)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_pattern, self.hook_z = HookPoint(), HookPoint()

    @property
    def points(self) -> dict[str, HookPoint]:
        """The hook point of each value that a tap sees."""
        return {"q": self.hook_q, "k": self.hook_k, "v": self.hook_v, "pattern": self.hook_pattern, "y": self.hook_z}

    def _through(self, point: HookPoint, value: Tensor) -> Tensor:
        apart = value.unflatten(-1, (self.heads, -1))  # (B, L, heads, d_head), or (B, L, heads, keys)
        if point is self.hook_pattern:
            return point(apart.transpose(1, 2)).transpose(1, 2).flatten(-2)
        return point(apart).flatten(-2)


class _MLPBridge(_Tapped):
    """The MLP."""

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.hook_post = HookPoint()

    @property
    def points(self) -> dict[str, HookPoint]:
        """The hook point of each value that a tap sees."""
        return {"post_act": self.hook_post}
