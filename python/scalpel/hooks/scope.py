"""A setting that holds inside ``with``, and can be entered again."""

from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")


class Scope(ContextDecorator, Generic[T]):
    """Inside, ``value`` is the last of ``variable``'s tuple; afterwards that is as before.

    It may be entered again, inside itself and in several threads and tasks at once: each has a tuple of its own.
    """

    def __init__(self, variable: ContextVar[tuple[T, ...]], value: T) -> None:
        self._variable, self._value = variable, value

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a context of {self._variable.name} can't be copied or pickled: it holds in this process alone. Make it "
            "where it is entered"
        )

    def __enter__(self) -> None:
        self._variable.set((*self._variable.get(), self._value))

    def __exit__(self, *raised: object) -> None:
        self._variable.set(self._variable.get()[:-1])
