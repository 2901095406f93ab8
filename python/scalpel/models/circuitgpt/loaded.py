"""A core together with what a checkpoint brings beside its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import CircuitGPTConfig
from .core import CircuitCore

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

__all__ = ["LoadedCore"]


class LoadedCore(CircuitCore):
    """The transformer with its tokenizer, its card, and the folder that it came from.

    ``tokenizer`` and ``folder`` are None, and ``card`` is empty, for a model that was built from a configuration.
    """

    tokenizer: "Tokenizer | None"
    card: dict[str, Any]
    folder: Path | None

    def __init__(
        self,
        config: CircuitGPTConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, seed=seed, device=device, dtype=dtype)
        self.tokenizer = None
        self.card = {}
        self.folder = None
