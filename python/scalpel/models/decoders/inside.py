"""A decoder of a family inside a user's model, and what its hooks are called there.

The model may be the decoder itself, with or without an output matrix, or a wrapper around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...hooks.modules import module_hooks
from ...hooks.names import FINAL, LOGITS, hook_named, hook_names, known_hook, module_path, with_patterns
from .decoder import Family

__all__ = ["DecoderInside"]


@dataclass(frozen=True)
class DecoderInside:
    """Where a decoder stands in a user's model, and the names of its hooks.

    Attributes:
        family: The decoder's family.
        architecture: The name of its class; of the class that adds an output matrix where it has none.
        module: The decoder.
        path: Its module path in the user's model; empty where it is the model.
        headless: Whether it has no output matrix, so that there are no logits.
        refusal: Why the names of hooks mean nothing in this model, or None if they do.
    """

    family: Family
    architecture: str
    module: Any
    path: str = ""
    headless: bool = False
    refusal: str | None = None

    @property
    def hooks(self) -> list[str]:
        """The decoder's hooks in the order of the forward pass, ``"final_resid"`` last."""
        config = self.module.config
        return hook_names(config.num_hidden_layers, getattr(config, "use_parallel_residual", False))

    @property
    def paths(self) -> dict[str, str]:
        """The module path of each hook in the user's model, with ``{i}`` for the layer."""
        return {hook: self._before + path for hook, path in self._own_paths.items()}

    def hook(self, name: str, as_source: bool) -> str | None:
        """Return our name of a hook or of attention weights, given any of its names; None for other names.

        A module path may be that in the decoder or that in the user's model. ``as_source`` is as for
        :func:`scalpel.hooks.names.hook_named`.
        """
        hooks, tables = with_patterns(self.hooks), (self._own_paths, self.paths)
        return next((hook for paths in tables if (hook := hook_named(name, paths, hooks, as_source))), None)

    def place(self, name: str, model: nn.Module, role: str, reason: str = "") -> str:
        """Return the module path in the user's model of the value that a name means.

        Args:
            name: Any name of a hook, the path of any module in the decoder or in the model, or "logits".
            model: The user's model.
            role: What the name is given as: "source", "target" or "hook". A source's value can be replaced at the path.
            reason: Why the rules can't be used. The error says so where only they know the value.

        Returns:
            The path; "logits" stays as it is where it is a target.

        Raises:
            ValueError: If the model has no such value.
            TypeError: If the name is not a string.
        """
        paths, kind, as_source = module_hooks(model), type(model).__name__, role == "source"
        if name == LOGITS and not as_source and name not in paths:
            if self.headless:
                raise ValueError(self._without_logits(kind, role))
            if role == "target":
                return name
        hook = self.hook(name, as_source) if isinstance(name, str) else None
        if name in paths and (hook is None or self.refusal is not None):
            return name
        within = f"{self._before}{name}"
        if hook is None and within not in paths:
            logits = [LOGITS] if role == "target" and not self.headless else []
            description = f"this {kind} (its hooks, or module paths with ':in' for an input)"
            known_hook(name, [*self.hooks, *logits, *paths], role, description)
        if self.refusal is not None:
            raise ValueError(f"the {role} is {name!r}, the name of a value of the decoder, but {self.refusal}")
        path = within if hook is None else module_path(hook, self.paths, self.hooks, as_source)
        if path not in paths:
            why = f", and the rules can't be used: {reason}" if reason else ""
            raise ValueError(f"the {role} {name!r} is no module's value in this {kind}{why}")
        return path

    @property
    def _before(self) -> str:
        return f"{self.path}." if self.path else ""

    @property
    def _own_paths(self) -> dict[str, str]:
        """The module paths of the hooks in the decoder itself, which lacks the first step if it is headless."""
        first = f"{self.family.PREFIX}." if self.headless else ""
        return {hook: path.removeprefix(first) for hook, path in self.family.PATHS.items()}

    def _without_logits(self, kind: str, role: str) -> str:
        norm = self.paths[FINAL].removesuffix(":in")
        return (
            f"the {role} is 'logits', and this {kind} has no output matrix to make them: load the model as a "
            f"{self.architecture}, or choose {FINAL!r}, or {norm!r}, which is the output of the last norm"
        )
