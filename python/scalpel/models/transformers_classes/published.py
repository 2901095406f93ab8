"""A CircuitGPT that is called as the published class of Gao et al. 2025 is: it gives logits, loss and state."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..circuitgpt.layers import Tap
from ..circuitgpt.model import CircuitGPT

__all__ = ["PublishedGPT"]


class PublishedGPT(nn.Module):
    """The same weights as a :class:`scalpel.CircuitGPT`, with the signature of the published class.

    Modules, parameters and buffers are registered here and in ``core`` alike, as the very same objects, so that neither
    can be moved, cast, loaded or trained without the other. Any attribute that this class lacks is that of ``core``.

    Args:
        core: The model.

    Example:
        >>> import scalpel
        >>> from scalpel.models.transformers_classes import PublishedGPT
        >>> core = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids, _ = core.tokenizer.batch(["[[1,2]"])
        >>> logits, loss, state = PublishedGPT(core)(ids)
        >>> logits.shape, loss, len(state)
        (torch.Size([1, 6, 512]), tensor([0.]), 2)
    """

    core: CircuitGPT

    def __init__(self, core: CircuitGPT) -> None:
        super().__init__()
        # Stored past nn.Module's __setattr__, which would register the core as a part of itself.
        self.__dict__["core"] = core
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = core.__dict__[registry]
        self.training = core.training

    def train(self, mode: bool = True) -> Self:
        """Switch training on or off, here and in ``core`` alike."""
        self.core.training = mode
        return super().train(mode)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        include_resid_mid: bool = False,
        *,
        keep: Any = slice(None),
        tap: Tap | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute logits, loss and state.

        Args:
            idx: Token ids (B, L).
            targets: The token that should follow at each place, (B, L), with -1 where none counts.
            include_resid_mid: Whether the state has the residual stream between attention and MLP too.
            keep: The tokens whose logits are wanted, as an index of their columns; all by default.
            tap: As for :meth:`scalpel.CircuitGPT.forward`.
            **inputs: ``attention_mask``, ``position_ids``, ``past`` and ``patterns``, as for
                :meth:`scalpel.CircuitGPT.forward`.

        Returns:
            The logits (B, L, vocab); the mean cross-entropy in nats, or zeros(1) without targets; and the residual
            stream (B, L, d_model) before each layer, or before each attention and each MLP.

        Example:
            >>> import scalpel, torch
            >>> from scalpel.models.transformers_classes import PublishedGPT
            >>> published = PublishedGPT(scalpel.CircuitGPT.from_pretrained("bracket-mini"))
            >>> ids, _ = published.tokenizer.batch(["[[1,2]"])
            >>> _, loss, state = published(ids[:, :-1], ids[:, 1:], include_resid_mid=True)
            >>> loss.dim(), len(state)
            (0, 4)
        """
        ends = (".resid_in", ".resid_mid") if include_resid_mid else (".resid_in",)
        state: list[Tensor] = []

        def watch(name: str, value: Tensor) -> Tensor:
            value = value if tap is None else tap(name, value)
            if name.endswith(ends):
                state.append(value)
            return value

        residual = self.core.residual(idx, tap=watch, **inputs)
        logits = self.core.unembed(residual[:, keep], idx.to(residual.device)[:, keep])
        if targets is None:
            return logits, torch.zeros(1, dtype=logits.dtype, device=logits.device), state
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), ignore_index=-1)
        return logits, loss, state

    @property
    def scalpel_model(self) -> CircuitGPT:
        """What Scalpel's functions analyse in this module's place."""
        return self.core

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "core" not in self.__dict__:  # a copy in the making
                raise
            return getattr(self.core, name)
