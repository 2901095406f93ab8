"""How a forward pass is left once the hook has been reached after which nothing is needed."""

from types import TracebackType
from typing import Any, NoReturn

__all__ = ["Reached", "Stop"]


class Reached(Exception):
    """Leaves a forward pass at the hook where it ends. Raised by calling a :class:`Stop`, which also catches it."""

    def __init__(self, stop: "Stop", value: Any) -> None:
        super().__init__("a forward pass was stopped on purpose, outside the context that stops it")
        self.stop = stop
        self.value = value


class Stop:
    """A context that code inside leaves early by calling it with the value that was wanted.

    Several may be open at once, as when a model runs another model inside its forward pass: each catches only the
    exception that was raised through it.

    Attributes:
        reached: Whether it was called.
        value: What it was called with.

    Example:
        >>> from scalpel.hooks.stopping import Stop
        >>> with Stop() as stop:
        ...     for layer in range(100):
        ...         if layer == 3:
        ...             stop(layer)
        >>> stop.reached, stop.value
        (True, 3)
    """

    def __init__(self) -> None:
        self.reached = False
        self.value: Any = None

    def __call__(self, value: Any = None) -> NoReturn:
        raise Reached(self, value)

    def __enter__(self) -> "Stop":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Reached) or error.stop is not self:
            return False
        self.reached, self.value = True, error.value
        return True
