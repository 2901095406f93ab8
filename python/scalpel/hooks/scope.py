"""Settings that hold inside a ``with`` block, which can be entered more than once."""

from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")


class Scope(ContextDecorator, Generic[T]):
    """A context inside which ``value`` is the last entry of ``variable``'s tuple; afterwards the tuple is as before.

    It may be entered again inside itself, and in several threads and tasks at once, since each has its own tuple.
    """

    def __init__(self, variable: ContextVar[tuple[T, ...]], value: T) -> None:
        self._variable, self._value = variable, value

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a context of {self._variable.name} can't be copied or pickled, because it holds only in this process: "
            "make it where it is entered"
        )

    def __enter__(self) -> None:
        self._variable.set((*self._variable.get(), self._value))

    def __exit__(self, *raised: object) -> None:
        self._variable.set(self._variable.get()[:-1])
