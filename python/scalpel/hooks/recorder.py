"""Recording the values of every CircuitGPT that runs inside a context, with the recorder of Gao et al. 2025."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["hook_recorder", "recorder_taps", "recording"]

Tap = Callable[[str, Tensor], Tensor]

_taps: ContextVar[tuple[Tap, ...]] = ContextVar("recorder_taps", default=())


@contextmanager
def hook_recorder(
    regex: str = ".*",
    interventions: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    save_grads: bool = False,
) -> Iterator[dict[str, Tensor]]:
    r"""Record, and change, the values at the hooks of every CircuitGPT that runs inside the context.

    It stands in for ``circuit_sparsity.hook_utils.hook_recorder``: the names and values are the same. For one call of
    one model, :meth:`scalpel.CircuitGPT.run_with_cache` and :meth:`scalpel.CircuitGPT.run_with_hooks` say more plainly
    what they do.

    Args:
        regex: Which hooks to record: a regular expression that is matched from the start of a name.
        interventions: From a hook's name to a function of its value, which returns the value to go on with. A value is
            recorded after it.
        save_grads: Whether to record gradients too. The gradient of a loss with respect to the value at a hook appears
            under the hook's name with ``.grad`` after it when ``backward`` reaches it, if the regular expression
            matches that name.

    Yields:
        {hook: value (B, L, width)}, filled while a model runs. A later pass overwrites the values of an earlier one.

    Raises:
        RuntimeError: A recorder is already in force in this thread.
        ValueError: ``regex`` is no regular expression.

    Example:
        >>> import scalpel
        >>> from scalpel.models import hook_recorder
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
        >>> with hook_recorder(regex=r"0\.attn\.[qv]") as recorded:
        ...     logits = model(ids)
        >>> {name: tuple(value.shape) for name, value in recorded.items()}
        {'0.attn.q': (1, 6, 128), '0.attn.v': (1, 6, 128)}
    """
    if _taps.get():
        raise RuntimeError("a hook_recorder is already in force: leave it first, or record both with one expression")
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ValueError(f"regex is {regex!r}, which is not a regular expression: {error}") from error
    recorded: dict[str, Tensor] = {}
    tap = _Recorder(recorded, pattern, dict(interventions or {}), save_grads)
    token = _taps.set((tap,))
    try:
        yield recorded
    finally:
        _taps.reset(token)
    tap.warn()


def recorder_taps() -> tuple[Tap, ...]:
    """The taps that a forward pass calls at every hook, after the model's own interventions."""
    return _taps.get()


def recording() -> bool:
    """Whether a recorder is in force in this thread."""
    return bool(_taps.get())


class _Recorder:
    """The tap of a recorder."""

    def __init__(
        self,
        recorded: dict[str, Tensor],
        pattern: re.Pattern[str],
        interventions: Mapping[str, Callable[[Tensor], Tensor]],
        save_grads: bool,
    ) -> None:
        self._recorded, self._pattern = recorded, pattern
        self._interventions, self._save_grads = interventions, save_grads
        self._met: dict[str, None] = {}

    def warn(self) -> None:
        """Warn of names that no model had while one ran."""
        for name in self._interventions.keys() - self._met.keys() if self._met else ():
            near = difflib.get_close_matches(name, self._met, n=3)
            also = f" Close: {', '.join(near)}." if near else ""
            warnings.warn(f"hook_recorder: nothing was changed at {name!r}, which is no hook.{also}", stacklevel=4)
        if self._met and not any(self._pattern.match(name) for name in self._met):
            expression = self._pattern.pattern
            warnings.warn(f"hook_recorder: regex {expression!r} matches no hook of what ran", stacklevel=4)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self._met[name] = None
        if name in self._interventions:
            value = self._interventions[name](value)
        if self._pattern.match(name):
            self._recorded[name] = value
        if self._save_grads and value.requires_grad and self._pattern.match(f"{name}.grad"):
            value = value.view_as(value)  # the recorded tensor itself may get gradients of the user's own
            value.register_hook(lambda gradient: self._recorded.__setitem__(f"{name}.grad", gradient))
        return value
