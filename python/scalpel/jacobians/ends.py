"""The two ends of a Jacobian: a hook of a model at an input, and the value there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hooks.positions import Selected, describe
from .passes import Pass

__all__ = ["End", "check_floating", "check_numbers", "finished"]


@dataclass(frozen=True)
class End:
    """One end of an operator: a hook of a model at an input, with the value there."""

    run: Pass
    hook: str
    positions: Selected
    function: Callable[[Tensor], Tensor] | None
    value: Tensor

    def __str__(self) -> str:
        name = repr(self.hook) if self.function is None else f"a function of {self.hook!r}"
        return f"{name} at {describe(self.positions)}"

    def mismatch(self, other: "End") -> str | None:
        """Why ``other`` isn't the same space; None where it is."""
        if (self.hook, self.positions) != (other.hook, other.positions) or self.function is not other.function:
            return f"one ends at {self}, the other starts at {other}"
        return self.run.differs(other.run)


def finished(value: Tensor, function: Callable[[Tensor], Tensor] | None, name: str, dtype: torch.dtype) -> Tensor:
    """The target's value, from the value that its hook ``name`` recorded: ``function`` is applied to it, if given."""
    if function is not None:
        value = function(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"the target's function gave {type(value).__name__}; it must give a tensor")
    check_floating(value, name)
    return value.to(dtype)


def check_floating(value: Tensor, name: str) -> None:
    """TypeError where ``value``, at the hook ``name``, has no derivative."""
    if not value.dtype.is_floating_point:
        raise TypeError(f"the value at {name!r} is {value.dtype}; a Jacobian needs floating point there")


def check_numbers(value: Tensor, name: str) -> None:
    """ValueError where ``value``, at the hook ``name``, holds a NaN."""
    bad = value.isnan()
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"the primal holds {int(bad.sum())} NaN at {name!r}, the first at index {first}: a Jacobian "
            "there has no meaning. Look for NaN in the weights, the inputs or an intervention"
        )
