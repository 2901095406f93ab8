"""What the library needs from libsemigroups: enumeration, and its tables as arrays."""

from typing import Any, Literal

import numpy as np

__all__ = ["FroidurePin", "images_of", "word_graph"]


def _library() -> Any:
    try:
        import libsemigroups_pybind11
    except ModuleNotFoundError as missing:  # any other failure to import it says what it is
        raise ImportError(
            "finite semigroups are enumerated by libsemigroups, which is not installed: "
            "pip install libsemigroups_pybind11, or pip install 'semigroup-scalpel[algebra]'. "
            "It is an extra because it is under the GPL."
        ) from missing
    return libsemigroups_pybind11


class FroidurePin:
    """The enumeration, by libsemigroups, of the semigroup that maps (generators, states) generate."""

    def __init__(self, maps: np.ndarray) -> None:
        library = _library()
        self.maps = maps
        self._quiet = library.ReportGuard(False)
        self._semigroup = library.FroidurePin([library.Transf(row) for row in maps.tolist()])

    @property
    def finished(self) -> bool:
        return bool(self._semigroup.finished())

    @property
    def found(self) -> int:
        """The number of elements found so far."""
        return int(self._semigroup.current_size())

    @property
    def longest(self) -> int:
        """The length of the longest word so far."""
        return int(self._semigroup.current_max_word_length())

    def find(self, at_least: int) -> None:
        """Enumerate until at least this many elements, or all of them, have been found."""
        self._semigroup.enumerate(at_least)

    def graph(self, side: Literal["right", "left"]) -> Any:
        semigroup = self._semigroup
        return semigroup.right_cayley_graph() if side == "right" else semigroup.left_cayley_graph()

    def tree(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each element, the number of its word without the last letter (or -1), and that letter, int32."""
        generators = [self._semigroup.position_of_generator(g) for g in range(len(self.maps))]
        graph = word_graph(self, size, len(self.maps), side="right")
        prefix = np.full(size, -1, dtype=np.int32)
        letter = np.zeros(size, dtype=np.int32)
        # Elements are numbered in short-lex order, so the first place of an element in the graph, row by row, is that
        # of its shortest word: the row is the word without its last letter, and the column is that letter.
        targets, first = np.unique(graph, return_index=True)
        prefix[targets], letter[targets] = np.divmod(first, graph.shape[1])
        for g in reversed(range(len(generators))):
            prefix[generators[g]], letter[generators[g]] = -1, g
        return prefix, letter


def word_graph(enumerator: FroidurePin, size: int, generators: int, side: Literal["right", "left"]) -> np.ndarray:
    """Return a Cayley graph as int32 (size, generators)."""
    target = enumerator.graph(side).target
    flat = (target(node, g) for node in range(size) for g in range(generators))
    return np.fromiter(flat, dtype=np.int32, count=size * generators).reshape(size, generators)


def images_of(maps: np.ndarray, prefix: np.ndarray, letter: np.ndarray) -> np.ndarray:
    """Compute the maps (size, states) of words described by prefix and last letter; a prefix precedes its words."""
    width = maps.shape[1]
    dtype = np.uint8 if width <= 1 << 8 else np.uint16 if width <= 1 << 16 else maps.dtype
    images = np.empty((len(prefix), width), dtype=dtype)
    length = np.zeros(len(prefix), dtype=np.int32)
    ready = np.flatnonzero(prefix < 0)
    images[ready] = maps[letter[ready]]
    length[ready] = 1
    # All words of one length at a time. Numbers ascend with the length, so each length is a range of numbers.
    begin = 0
    while begin < len(prefix):
        level = np.arange(begin, len(prefix))
        before = prefix[level]
        known = (before < 0) | (before < begin)
        level = level[: int(np.argmin(known))] if not known.all() else level
        inner = level[prefix[level] >= 0]
        images[inner] = np.take_along_axis(maps[letter[inner]], images[prefix[inner]].astype(np.intp), axis=1)
        begin = int(level[-1]) + 1
    return images
