"""A Jacobian lens."""

from __future__ import annotations

from typing import Any

from .folder import sums_in
from .sums import Means


class JacobianLens:
    """Placeholder until the object is merged."""

    def __init__(self, J, n_prompts, *, error=None, about=None, sums=None, model=None, tokenizer=None):
        self.J, self.n_prompts, self.error, self.about, self.sums = J, n_prompts, error, about, sums
        self.source_layers = list(J)

    @classmethod
    def from_sums(cls, sums: Any, about: Any, model: Any = None, tokenizer: Any = None) -> JacobianLens:
        return cls(Means(sums), sums.n, error=sums.errors(), about=about, sums=sums, model=model, tokenizer=tokenizer)

    @classmethod
    def from_folder(cls, folder: Any) -> JacobianLens:
        return cls.from_sums(*sums_in(folder))
