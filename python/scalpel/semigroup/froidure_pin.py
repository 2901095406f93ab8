"""What is asked of libsemigroups: enumerate, and hand over its tables as arrays."""

from typing import Any, Literal

import numpy as np

__all__ = ["FroidurePin", "images_of", "word_graph"]


def _library() -> Any:
    try:
        import libsemigroups_pybind11
    except ImportError as missing:
        raise ImportError(
            "finite semigroups are enumerated by libsemigroups, which isn't installed: "
            "pip install libsemigroups_pybind11, or pip install 'semigroup-scalpel[algebra]'. "
            "It is an extra because it is under the GPL."
        ) from missing
    return libsemigroups_pybind11


class FroidurePin:
    """libsemigroups' enumeration of the semigroup of some maps, (generators, states)."""

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
        """Elements found so far."""
        return int(self._semigroup.current_size())

    @property
    def longest(self) -> int:
        """Letters of the longest word so far."""
        return int(self._semigroup.current_max_word_length())

    def find(self, at_least: int) -> None:
        """Enumerate until so many elements are there, or all."""
        self._semigroup.enumerate(at_least)

    def graph(self, side: Literal["right", "left"]) -> Any:
        semigroup = self._semigroup
        return semigroup.right_cayley_graph() if side == "right" else semigroup.left_cayley_graph()

    def tree(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the word without its last letter, or -1, and the last letter) of each element, int32."""
        one = [self._semigroup.position_of_generator(g) for g in range(len(self.maps))]
        graph = word_graph(self, size, len(self.maps), side="right")
        prefix = np.full(size, -1, dtype=np.int32)
        letter = np.zeros(size, dtype=np.int32)
        # Elements are numbered in short-lex order, so where an element first stands in the graph, row by row, is its
        # shortest word less the last letter.
        targets, first = np.unique(graph, return_index=True)
        prefix[targets], letter[targets] = np.divmod(first, graph.shape[1])
        for g in reversed(range(len(one))):
            prefix[one[g]], letter[one[g]] = -1, g
        return prefix, letter


def word_graph(enumerator: FroidurePin, size: int, generators: int, side: Literal["right", "left"]) -> np.ndarray:
    """A Cayley graph as int32 (size, generators)."""
    target = enumerator.graph(side).target
    flat = (target(node, g) for node in range(size) for g in range(generators))
    return np.fromiter(flat, dtype=np.int32, count=size * generators).reshape(size, generators)


def images_of(maps: np.ndarray, prefix: np.ndarray, letter: np.ndarray) -> np.ndarray:
    """The maps (size, states) of words given by prefix and last letter; a prefix stands before its words."""
    width = maps.shape[1]
    dtype = np.uint8 if width <= 1 << 8 else np.uint16 if width <= 1 << 16 else maps.dtype
    images = np.empty((len(prefix), width), dtype=dtype)
    length = np.zeros(len(prefix), dtype=np.int32)
    ready = np.flatnonzero(prefix < 0)
    images[ready] = maps[letter[ready]]
    length[ready] = 1
    # All words of one length at once; numbers ascend with the length, so each level is one stretch.
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
