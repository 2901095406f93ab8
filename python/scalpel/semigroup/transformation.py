"""Finite semigroups of maps on states, enumerated by the Froidure-Pin algorithm of libsemigroups.

A word is read from left to right: ``("a", "b")`` is first a, then b, as for tokens. No identity is adjoined unless
requested. Elements are numbered in the short-lex order of their shortest words.

V. Froidure and J.-E. Pin, *Algorithms for computing finite semigroups*, 1997. libsemigroups is under the GPL, so it
is an extra: ``pip install 'semigroup-scalpel[algebra]'``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from .froidure_pin import FroidurePin, images_of, word_graph
from .orbits import distances, state_maps
from .periods import index_and_period
from .structure import Structure

__all__ = ["SemigroupTooLarge", "TransformationSemigroup"]

Word = Sequence[str]
IDENTITY = "1"
_BATCH = 1 << 20  # elements enumerated between two checks of the limit and of Ctrl-C


class SemigroupTooLarge(ValueError):
    """A semigroup has more elements than the limit allows.

    Args:
        limit: The limit.
        found: The number of elements found before the search stopped.
        longest: The length of the longest word tried.
    """

    def __init__(self, limit: int, found: int, longest: int) -> None:
        super().__init__(
            f"the semigroup has more than {limit} elements: {found} were found, by words of up to {longest} letters. "
            "Raise limit=, or use fewer generators or states."
        )
        self.limit, self.found, self.longest = limit, found, longest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.found, self.longest)


class TransformationSemigroup(Structure):
    """Enumerate the semigroup that maps on the states 0 … n - 1 generate under composition.

    Elements are enumerated when they are first needed, for example by :attr:`size`. Methods take an element as its
    number, its word (a sequence of names) or its images (integers).

    A copy and a pickle hold the generators and the limit, and enumerate the elements anew when they are needed. A
    pickle has no ``progress``, which belongs to the process that shows it.

    Args:
        generators: For each generator's name, the images of the n states.
        identity: Whether to adjoin the identity map as a generator named "1".
        limit: The largest number of elements to enumerate.
        progress: A function that is called from time to time with the number of elements found so far.

    Raises:
        TypeError: If generators is not a mapping from names to integers.
        ValueError: If the generators are not maps on the same states, a generator has the name of the identity, or
            limit is below 1.
        ImportError: If libsemigroups is not installed; the message says how to install it.

    Example:
        >>> S = scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0], "hold": [0, 1]})
        >>> S.size
        3
        >>> S.words()
        [('set',), ('reset',), ('hold',)]
        >>> S.is_aperiodic()
        True
    """

    def __init__(
        self,
        generators: Mapping[str, Sequence[int]],
        *,
        identity: bool = False,
        limit: int = 20_000_000,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._maps = _checked(generators)
        self.names: tuple[str, ...] = tuple(generators)
        if identity:
            if IDENTITY in self.names:
                raise ValueError(
                    f"a generator is named {IDENTITY!r}, which is the name of the adjoined identity; rename it"
                )
            self._maps = np.concatenate([self._maps, np.arange(self.degree, dtype=self._maps.dtype)[None]])
            self.names += (IDENTITY,)
        if limit < 1:
            raise ValueError(f"limit is {limit}; it must be 1 or more")
        self.limit = limit
        self._progress = progress
        self._enumerator = FroidurePin(self._maps)

    def __getstate__(self) -> dict[str, Any]:
        return {"_maps": self._maps, "names": self.names, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._progress = None
        self._enumerator = FroidurePin(self._maps)

    def __copy__(self) -> "TransformationSemigroup":
        twin = TransformationSemigroup.__new__(TransformationSemigroup)
        twin.__setstate__(self.__getstate__() | {"_maps": self._maps.copy()})
        twin._progress = self._progress
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "TransformationSemigroup":
        return self.__copy__()

    @property
    def degree(self) -> int:
        """The number of states."""
        return int(self._maps.shape[1])

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        """The images of each generator, by name."""
        return dict(zip(self.names, map(tuple, self._maps.tolist()), strict=True))

    def __repr__(self) -> str:
        found = self._enumerator.found
        size = str(found) if self._enumerator.finished else "not yet counted"
        return f"TransformationSemigroup({', '.join(self.names)}; {self.degree} states, size {size})"

    @property
    def size(self) -> int:
        """The number of elements, which enumerates them.

        Raises:
            SemigroupTooLarge: If there are more than ``limit``.
        """
        enumerator = self._enumerator
        while not enumerator.finished:
            enumerator.find(min(enumerator.found + _BATCH, self.limit + 1))
            if self._progress is not None:
                self._progress(enumerator.found)
            if enumerator.found > self.limit:
                raise SemigroupTooLarge(self.limit, enumerator.found, enumerator.longest)
        return enumerator.found

    def __len__(self) -> int:
        return self.size

    # Tables, each computed once from the enumeration.

    @cached_property
    def right_cayley_graph(self) -> np.ndarray:
        """The number of x·g for each element x and generator g, int32 (size, generators)."""
        return word_graph(self._enumerator, self.size, len(self.names), side="right")

    @cached_property
    def left_cayley_graph(self) -> np.ndarray:
        """The number of g·x for each element x and generator g, int32 (size, generators)."""
        return word_graph(self._enumerator, self.size, len(self.names), side="left")

    @cached_property
    def _tree(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of each word without its last letter (-1 for a single letter), and that letter, int32 (size,)."""
        return self._enumerator.tree(self.size)

    @cached_property
    def images(self) -> np.ndarray:
        """The elements as maps, images (size, degree), in the order of their numbers."""
        return images_of(self._maps, *self._tree)

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {row.tobytes(): i for i, row in enumerate(self.images)}

    # Elements and words.

    def number(self, element: int | Word | Sequence[int]) -> int:
        """Look up the number of an element.

        Args:
            element: The element, as its number, its word or its images.

        Returns:
            Its number, from 0 to size - 1.

        Raises:
            ValueError: If it is not in the semigroup.

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]})
            >>> S.number([0, 1]), S.number(("swap", "swap"))
            (1, 1)
        """
        if isinstance(element, int | np.integer):
            if not 0 <= element < self.size:
                raise ValueError(f"there is no element {element}; they are numbered 0 to {self.size - 1}")
            return int(element)
        images = self.evaluate(element) if _is_word(element) else np.asarray(element)
        if images.shape != (self.degree,):
            raise ValueError(f"images have shape {images.shape}; an element is a map on the {self.degree} states")
        number = self._numbers.get(images.astype(self.images.dtype).tobytes())
        if number is None or not np.array_equal(self.images[number], images):
            raise ValueError(f"{images.tolist()} is not in the semigroup")
        return number

    def __contains__(self, element: Any) -> bool:
        try:
            self.number(element)
        except ValueError:
            return False
        return True

    def evaluate(self, word: Word) -> np.ndarray:
        """Compute the map of a word.

        Args:
            word: Names of generators, applied from left to right. The empty word is the identity map.

        Returns:
            The state to which each state is led, (degree,).

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 0]})
            >>> S.evaluate(("next", "next"))
            array([2, 0, 1], dtype=int32)
        """
        images = np.arange(self.degree, dtype=self._maps.dtype)
        for name in [word] if isinstance(word, str) else word:
            images = self._maps[self._letter(name)][images]
        return images

    def word(self, element: int | Word | Sequence[int]) -> tuple[str, ...]:
        """Find the shortest word of an element; among equals, the first in the order of the generators.

        Args:
            element: The element, as its number, its word or its images.

        Returns:
            The names of its letters.

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 0]})
            >>> S.word([2, 0, 1])
            ('next', 'next')
        """
        prefix, letter = self._tree
        at, letters = self.number(element), []
        while at >= 0:
            letters.append(self.names[letter[at]])
            at = int(prefix[at])
        return tuple(reversed(letters))

    def words(self) -> list[tuple[str, ...]]:
        """List the shortest word of every element, in the order of their numbers.

        Returns:
            A list of tuples of names.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]}).words()
            [('swap',), ('swap', 'swap')]
        """
        words: list[tuple[str, ...]] = []
        for prefix, letter in zip(*(column.tolist() for column in self._tree), strict=True):
            words.append((*(words[prefix] if prefix >= 0 else ()), self.names[letter]))
        return words

    def _letter(self, name: str) -> int:
        try:
            return self.names.index(name)
        except ValueError:
            raise ValueError(f"there is no generator {name!r}; there are {', '.join(map(repr, self.names))}") from None

    def index_and_period(self, element: int | Word | Sequence[int]) -> tuple[int, int]:
        """Compute index and period of an element's powers.

        Args:
            element: The element, as its number, its word or its images.

        Returns:
            The smallest (m, p), both at least 1, with xᵐ⁺ᵖ = xᵐ.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 1]}).index_and_period("next")
            (1, 2)
        """
        images = self.images[self.number(element)] if not _is_word(element) else self.evaluate(element)
        return index_and_period(images)

    def subsemigroup(self, elements: Iterable[int | Word | Sequence[int]]) -> "TransformationSemigroup":
        """Build the subsemigroup that some elements generate.

        Args:
            elements: Its generators, as numbers, words or images.

        Returns:
            A semigroup whose generators are named by their shortest words, with the letters separated by blanks.

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 3, 0]})
            >>> S.subsemigroup([("next", "next")])
            TransformationSemigroup(next next; 4 states, size not yet counted)
        """
        numbers = [self.number(element) for element in elements]
        named = {" ".join(self.word(number)): self.images[number].tolist() for number in numbers}
        return TransformationSemigroup(named, limit=self.limit, progress=self._progress)

    # The action on the states.

    def orbit(self, state: int) -> np.ndarray:
        """List the states to which words lead from a state.

        Args:
            state: The state.

        Returns:
            The states, itself included, int64: nearest first, and ascending at equal distance.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 2, 0]}).orbit(3)
            array([3, 0, 1, 2])
        """
        steps = distances(self._maps, state)
        states = np.flatnonzero(steps >= 0)
        return states[np.argsort(steps[states], kind="stable")]

    def reachable(self, starts: Any) -> np.ndarray:
        """Find the states to which some word, the empty one included, leads from a start.

        Args:
            starts: One state, several, or a bool for each state.

        Returns:
            A bool array (degree,).

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 2, 0]}).reachable(0)
            array([ True,  True,  True, False])
        """
        return distances(self._maps, starts) >= 0

    def unreachable(self, starts: Any) -> np.ndarray:
        """Find the holes: the states to which no word leads from the starts.

        Args:
            starts: One state, several, or a bool for each state.

        Returns:
            The states, ascending.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 2, 0]}).unreachable(0)
            array([3])
        """
        return np.flatnonzero(~self.reachable(starts))


def _is_word(element: Any) -> TypeGuard[Word]:
    if isinstance(element, str):
        return True
    return isinstance(element, Sequence) and all(isinstance(letter, str) for letter in element)


def _checked(generators: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Check the generators and return their images as integers (generators, states)."""
    if not isinstance(generators, Mapping):
        raise TypeError(f"generators is {type(generators).__name__}; it must map names to images")
    if not generators:
        raise ValueError("generators is empty; a semigroup needs at least one")
    rows: list[np.ndarray] = []
    for name, images in generators.items():
        if not isinstance(name, str):
            raise TypeError(f"the generator {name!r} has a name of type {type(name).__name__}; names are str")
        row = np.asarray(images)
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            kind = f"{row.dtype} of shape {row.shape}"
            raise TypeError(f"generator {name!r} is {kind}; it must list the image of every state, as integers")
        if rows and row.size != rows[0].size:
            first = next(iter(generators))
            raise ValueError(
                f"generator {name!r} has images of {row.size} states and {first!r} of {rows[0].size}; "
                "all must act on the same states"
            )
        if row.min() < 0 or row.max() >= row.size:
            state = int(np.flatnonzero((row < 0) | (row >= row.size))[0])
            raise ValueError(
                f"generator {name!r} sends state {state} to {row[state]}; the states are 0 to {row.size - 1}. "
                "Give a partial map an extra state for what is undefined."
            )
        rows.append(row)
    return state_maps(np.stack(rows))
