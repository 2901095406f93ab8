"""Finite semigroups of maps on states, by the Froidure-Pin algorithm of libsemigroups.

A word is read from left to right: ``("a", "b")`` is first a, then b, as tokens are. No identity is adjoined unless it
is asked for. Elements are numbered in short-lex order of their shortest words.

V. Froidure and J.-E. Pin, *Algorithms for computing finite semigroups*, 1997. libsemigroups is under the GPL, so it
is an extra: ``pip install 'semigroup-scalpel[algebra]'``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from .froidure_pin import FroidurePin, images_of, word_graph
from .greens import Greens, Group
from .orbits import distances, state_maps
from .periods import index_and_period

__all__ = ["SemigroupTooLarge", "TransformationSemigroup"]

Word = Sequence[str]
IDENTITY = "1"
_BATCH = 1 << 20  # elements found between two looks at the limit and at Ctrl-C


class SemigroupTooLarge(ValueError):
    """The semigroup has more than ``limit`` elements. ``found`` and ``longest``: elements and letters so far."""

    def __init__(self, limit: int, found: int, longest: int) -> None:
        super().__init__(
            f"the semigroup has more than {limit} elements: {found} were found, by words of up to {longest} letters. "
            "Raise limit=, or give fewer generators or states."
        )
        self.limit, self.found, self.longest = limit, found, longest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.found, self.longest)


class TransformationSemigroup:
    """The semigroup that maps on the states 0 … n - 1 generate under composition.

    ``generators``: name → the images of the states, n integers each. ``identity``: adjoin the identity map as a
    generator named "1". ``limit``: the most elements to enumerate; SemigroupTooLarge beyond it, with what was found.
    ``progress(found)`` is called now and then while elements are being found.

    Elements are found when they are first needed, :attr:`size` among others. An element is given to the methods as
    its number, its word (a sequence of names), or its images (integers). TypeError or ValueError for generators that
    aren't maps on the same states; ImportError, which says how to get it, where libsemigroups is missing.

    A copy and a pickle hold the generators and the limit; elements are found anew there when they are needed. A pickle
    has no ``progress``, which belongs to the process that watches it.
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
                raise ValueError(f"a generator is named {IDENTITY!r}, which is the adjoined identity's name; rename it")
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
        """Name → images of each generator."""
        return dict(zip(self.names, map(tuple, self._maps.tolist()), strict=True))

    def __repr__(self) -> str:
        found = self._enumerator.found
        size = str(found) if self._enumerator.finished else "not yet counted"
        return f"TransformationSemigroup({', '.join(self.names)}; {self.degree} states, size {size})"

    @property
    def size(self) -> int:
        """The number of elements. SemigroupTooLarge where there are more than ``limit``."""
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

    # The tables, each made once from the enumeration.

    @cached_property
    def right_cayley_graph(self) -> np.ndarray:
        """int32 (size, generators): the number of x·g for element x and generator g."""
        return word_graph(self._enumerator, self.size, len(self.names), side="right")

    @cached_property
    def left_cayley_graph(self) -> np.ndarray:
        """int32 (size, generators): the number of g·x for element x and generator g."""
        return word_graph(self._enumerator, self.size, len(self.names), side="left")

    @cached_property
    def _tree(self) -> tuple[np.ndarray, np.ndarray]:
        """(prefix, last letter) of every element's word, int32 (size,); prefix -1 where the word is one letter."""
        return self._enumerator.tree(self.size)

    @cached_property
    def images(self) -> np.ndarray:
        """The elements as maps: images (size, degree), element i first found by the i-th word in short-lex order."""
        return images_of(self._maps, *self._tree)

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {row.tobytes(): i for i, row in enumerate(self.images)}

    # Elements and words.

    def number(self, element: int | Word | Sequence[int]) -> int:
        """The number of an element given as a number, a word or its images. ValueError if it isn't in the semigroup."""
        if isinstance(element, int | np.integer):
            if not 0 <= element < self.size:
                raise ValueError(f"there is no element {element}; they are numbered 0 to {self.size - 1}")
            return int(element)
        images = self.evaluate(element) if _is_word(element) else np.asarray(element)
        if images.shape != (self.degree,):
            raise ValueError(f"images have shape {images.shape}; an element is a map on the {self.degree} states")
        found = self._numbers.get(images.astype(self.images.dtype).tobytes())
        if found is None or not np.array_equal(self.images[found], images):
            raise ValueError(f"{images.tolist()} is not in the semigroup")
        return found

    def __contains__(self, element: Any) -> bool:
        try:
            self.number(element)
        except ValueError:
            return False
        return True

    def evaluate(self, word: Word) -> np.ndarray:
        """The map of a word, (degree,): the state that each state is led to. The empty word is the identity map."""
        images = np.arange(self.degree, dtype=self._maps.dtype)
        for name in [word] if isinstance(word, str) else word:
            images = self._maps[self._letter(name)][images]
        return images

    def word(self, element: int | Word | Sequence[int]) -> tuple[str, ...]:
        """The shortest word of an element, the first of them in the order of the generators."""
        prefix, letter = self._tree
        at, letters = self.number(element), []
        while at >= 0:
            letters.append(self.names[letter[at]])
            at = int(prefix[at])
        return tuple(reversed(letters))

    def words(self) -> list[tuple[str, ...]]:
        """The shortest word of every element, in the order of their numbers."""
        found: list[tuple[str, ...]] = []
        for prefix, letter in zip(*(part.tolist() for part in self._tree), strict=True):
            found.append((*(found[prefix] if prefix >= 0 else ()), self.names[letter]))
        return found

    def _letter(self, name: str) -> int:
        try:
            return self.names.index(name)
        except ValueError:
            raise ValueError(f"there is no generator {name!r}; there are {', '.join(map(repr, self.names))}") from None

    # Structure.

    @cached_property
    def _greens(self) -> Greens:
        return Greens.of(self.right_cayley_graph, self.left_cayley_graph, self.idempotents())

    def greens(self) -> Greens:
        """Green's relations R, L, H, D and the egg-box picture of each D-class; see :class:`.greens.Greens`."""
        return self._greens

    @cached_property
    def _idempotents(self) -> np.ndarray:
        step = max(1, (1 << 24) // self.degree)
        parts = [self.images[i : i + step].astype(np.intp) for i in range(0, self.size, step)]
        equal = [(np.take_along_axis(part, part, axis=1) == part).all(1) for part in parts]
        return np.flatnonzero(np.concatenate(equal))

    def idempotents(self) -> np.ndarray:
        """Numbers of the elements e with e·e = e, ascending."""
        return self._idempotents

    def minimal_ideal(self) -> np.ndarray:
        """Numbers of the elements of the least two-sided ideal (the kernel), ascending."""
        return self.greens().minimal_ideal()

    def groups(self) -> list[Group]:
        """The maximal subgroups, one for each regular D-class: those of one D-class are isomorphic."""
        return self.greens().groups(self.images)

    def is_aperiodic(self) -> bool:
        """Whether no element's powers have a period: all subgroups are trivial (Schützenberger's star-free case)."""
        return self.periodic_element() is None

    def periodic_element(self) -> int | None:
        """The first element whose period is above 1, the witness that the semigroup isn't aperiodic; else None.

        It has the shortest word of all such elements.
        """
        greens = self.greens()
        if greens.largest_h_class() == 1:
            return None
        for number in range(self.size):
            if index_and_period(self.images[number])[1] > 1:
                return number
        raise AssertionError("a finite semigroup whose H-classes aren't all trivial has a group that isn't")

    def index_and_period(self, element: int | Word | Sequence[int]) -> tuple[int, int]:
        """The least (m, p), both 1 or more, with xᵐ⁺ᵖ = xᵐ."""
        images = self.images[self.number(element)] if not _is_word(element) else self.evaluate(element)
        return index_and_period(images)

    def is_commutative(self) -> bool:
        """Whether x·y = y·x for all elements; the generators decide."""
        maps = self._maps
        return all(np.array_equal(b[a], a[b]) for i, a in enumerate(maps) for b in maps[:i])

    def is_group(self) -> bool:
        """Whether the semigroup is a group: a single H-class."""
        return self.greens().largest_h_class() == self.size

    def subsemigroup(self, elements: Iterable[int | Word | Sequence[int]]) -> "TransformationSemigroup":
        """The subsemigroup that some elements generate, each named by its shortest word joined with blanks."""
        numbers = [self.number(element) for element in elements]
        named = {" ".join(self.word(number)): self.images[number].tolist() for number in numbers}
        return TransformationSemigroup(named, limit=self.limit, progress=self._progress)

    # The action on the states.

    def orbit(self, state: int) -> np.ndarray:
        """The states that words lead to from ``state``, itself included, nearest first, then ascending; int64."""
        steps = distances(self._maps, state)
        found = np.flatnonzero(steps >= 0)
        return found[np.argsort(steps[found], kind="stable")]

    def reachable(self, starts: Any) -> np.ndarray:
        """Whether some word, the empty one included, leads from a start to each state: bool (degree,)."""
        return distances(self._maps, starts) >= 0

    def unreachable(self, starts: Any) -> np.ndarray:
        """The states that no word reaches from the starts, ascending: the holes."""
        return np.flatnonzero(~self.reachable(starts))


def _is_word(element: Any) -> TypeGuard[Word]:
    if isinstance(element, str):
        return True
    return isinstance(element, Sequence) and all(isinstance(letter, str) for letter in element)


def _checked(generators: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The generators' images as integers (generators, states)."""
    if not isinstance(generators, Mapping):
        raise TypeError(f"generators is {type(generators).__name__}; it must map names to images")
    if not generators:
        raise ValueError("generators is empty; a semigroup needs at least one")
    rows: list[np.ndarray] = []
    for name, images in generators.items():
        if not isinstance(name, str):
            raise TypeError(f"the generator {name!r} is named by {type(name).__name__}; names are str")
        row = np.asarray(images)
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            given = f"{row.dtype} of shape {row.shape}"
            raise TypeError(f"generator {name!r} is {given}; give the image of every state, a list of integers")
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
                "A partial map needs a state of its own for what is undefined."
            )
        rows.append(row)
    return state_maps(np.stack(rows))
