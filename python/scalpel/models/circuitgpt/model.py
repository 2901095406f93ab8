"""CircuitGPT: the core of a weight-sparse transformer with everything that one does with such a model.

The forward pass stands in :mod:`.core`. Each method here is the short way to a function in a file of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from . import ablation, checkpoint, edges, generation, logit_attribution, recording
from .loaded import LoadedCore

__all__ = ["CircuitGPT"]


class CircuitGPT(LoadedCore):
    """A weight-sparse transformer.

    ``model(input_ids)`` gives the logits (B, L, vocab). Parameter names are those of the public checkpoints.
    Build an untrained one from a :class:`CircuitGPTConfig` and a seed, or load one with
    :meth:`from_pretrained`.

    ``device`` and ``dtype`` say where the weights are and in which floating-point dtype: on the CPU in float32 if not
    given, whatever torch's defaults are. ``torch.set_default_device``, ``torch.set_default_dtype`` and
    ``with torch.device(...)`` change nothing here, so that a program that uses them for its own tensors gets the same
    model. The weights of a seed are drawn on the CPU in float32 and then moved, so they are the same on every device
    and, to rounding, in every dtype. ``device="meta"`` gives the shapes alone: nothing is drawn, no memory is taken.
    """

    def run_with_cache(
        self, input_ids: Tensor, names: Any = ".*", stop_at: str | None = None, **inputs: Any
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits and the values at the hooks that ``names`` picks: a regex (re.match), a list, or a callable.

        ``stop_at``: a hook after which nothing more is computed; the logits are then None.
        """
        return recording.run_with_cache(self, input_ids, names, stop_at, **inputs)

    def run_with_hooks(
        self, input_ids: Tensor, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]], **inputs: Any
    ) -> Tensor:
        """Logits with ``fn(value, name) → value or None`` called at each named hook (None: unchanged)."""
        return recording.run_with_hooks(self, input_ids, fwd_hooks, **inputs)

    def ablate(self, nodes: str | Sequence[str], kind: str = "mean", **options: Any) -> "ablation.Ablation[Self]":
        """A context in which the named nodes (``2.attn.v:2012``) are replaced; see :mod:`.ablation`."""
        return ablation.ablate(self, nodes, kind, **options)

    def logit_attribution(self, input_ids: Tensor, tokens: Any, **inputs: Any) -> "logit_attribution.LogitAttribution":
        """What each head, MLP and node adds to the logits of ``tokens``; see :mod:`.logit_attribution`."""
        return logit_attribution.logit_attribution(self, input_ids, tokens, **inputs)

    def edges(self) -> "edges.EdgeTable":
        """The non-zero weights as a table with columns src, dst, weight, layer, param."""
        return edges.edges(self)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """``input_ids`` (B, L) continued by ``max_new_tokens`` tokens; see :mod:`.generation`."""
        return generation.generate(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a shipped model by name, a folder, or a hub id; see :mod:`.checkpoint`."""
        return checkpoint.from_pretrained(cls, source, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the public folder format (``beeg_config.json``, ``final_model.pt``), atomically."""
        checkpoint.save_pretrained(self, folder)
