"""Green's relations of a finite semigroup, computed from its two Cayley graphs.

Two elements are R-related if they are equal or each is the other times something on the right, and L-related likewise
on the left. H is the intersection of R and L, and D is their join. The R-classes are the strongly connected components
of the right Cayley graph.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["EggBox", "Greens", "Group"]


@dataclass(frozen=True)
class EggBox:
    """The egg-box picture of a D-class: its rows are R-classes, its columns L-classes, and its cells H-classes.

    Attributes:
        elements: The numbers of the elements, (rows, columns, elements of an H-class), ascending in each cell.
        group: Whether each cell is a group, that is, holds an idempotent: bool (rows, columns).
        above: The D-classes directly above this one in the order of ideals, as positions in the list of D-classes.
    """

    elements: np.ndarray
    group: np.ndarray
    above: tuple[int, ...]

    @property
    def regular(self) -> bool:
        """Whether some cell is a group; then every row and every column has one."""
        return bool(self.group.any())


@dataclass(frozen=True)
class Group:
    """A maximal subgroup of a semigroup.

    Attributes:
        elements: The numbers of its elements, the identity first.
        name: Z_n, S_n or A_n, or a description where the group is none of these.
        cyclic: Whether it is cyclic.
        commutative: Whether it is commutative.
    """

    elements: np.ndarray
    name: str
    cyclic: bool
    commutative: bool

    @property
    def order(self) -> int:
        """The number of elements."""
        return len(self.elements)


@dataclass(frozen=True)
class Greens:
    """The classes of each element under Green's relations, and what follows from them.

    Classes are numbered in the order of their first elements.

    Attributes:
        r: The R-class of each element, int32 (size,).
        l: The L-class of each element, int32 (size,).
        h: The H-class of each element, int32 (size,).
        d: The D-class of each element, int32 (size,).
        right_cayley_graph: The right Cayley graph, (size, generators).
        left_cayley_graph: The left Cayley graph, (size, generators).
        idempotents: The numbers of the idempotents.

    Example:
        >>> S = scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0], "hold": [0, 1]})
        >>> greens = S.greens()
        >>> greens.largest_h_class(), greens.counts()["D"], greens.minimal_ideal().tolist()
        (1, 2, [0, 1])
        >>> [group.name for group in greens.groups(S.images)]
        ['trivial', 'trivial']
    """

    r: np.ndarray
    l: np.ndarray  # noqa: E741 - the relation's name
    h: np.ndarray
    d: np.ndarray
    right_cayley_graph: np.ndarray
    left_cayley_graph: np.ndarray
    idempotents: np.ndarray

    @classmethod
    def of(cls, right: np.ndarray, left: np.ndarray, idempotents: np.ndarray) -> "Greens":
        """Compute the relations from the Cayley graphs.

        Args:
            right: The right Cayley graph, (size, generators).
            left: The left Cayley graph, (size, generators).
            idempotents: The numbers of the idempotents.

        Returns:
            The relations.

        Example:
            >>> from scalpel.semigroup.greens import Greens
            >>> Greens.of(np.array([[0]]), np.array([[0]]), np.array([0])).counts()
            {'R': 1, 'L': 1, 'H': 1, 'D': 1}
        """
        r = _components(right, "strong")
        l = _components(left, "strong")  # noqa: E741
        h = _numbered(r.astype(np.int64) * len(l) + l)
        # D joins R-classes and L-classes that share an element.
        rows = int(r.max()) + 1
        joint = _bipartite(r, l + rows, rows + int(l.max()) + 1)
        return cls(r, l, h, _numbered(joint[r]), right, left, idempotents)

    def largest_h_class(self) -> int:
        """Count the elements of the largest H-class.

        Returns:
            Their number.
        """
        return int(np.bincount(self.h).max())

    def counts(self) -> dict[str, int]:
        """Count the classes of each relation.

        Returns:
            The numbers of R-, L-, H- and D-classes, by letter.
        """
        return {name: int(getattr(self, name.lower()).max()) + 1 for name in "RLHD"}

    @cached_property
    def egg_boxes(self) -> list[EggBox]:
        """The egg-box picture of every D-class, in the order of their first elements."""
        idempotent = np.zeros(len(self.d), dtype=bool)
        idempotent[self.idempotents] = True
        order = np.lexsort((np.arange(len(self.d)), self.l, self.r, self.d))
        starts = np.flatnonzero(np.r_[True, np.diff(self.d[order]) > 0])
        above = self._above()
        boxes = []
        for number, members in enumerate(np.split(order, starts[1:])):
            rows = len(np.unique(self.r[members]))
            columns = len(np.unique(self.l[members]))
            elements = members.reshape(rows, columns, -1)
            boxes.append(EggBox(elements, np.asarray(idempotent[elements].any(-1)), above[number]))
        return boxes

    @cached_property
    def _edges(self) -> np.ndarray:
        """The distinct pairs of a D-class and another one into which its multiples fall, (edges, 2)."""
        count = int(self.d.max()) + 1
        graphs = (self.right_cayley_graph, self.left_cayley_graph)
        pairs = [(self.d[:, None].astype(np.int64) * count + self.d[g]).ravel() for g in graphs]
        edges = np.stack(np.divmod(np.unique(np.concatenate([np.unique(p) for p in pairs])), count), 1)
        return edges[edges[:, 0] != edges[:, 1]]

    def _above(self) -> list[tuple[int, ...]]:
        """List, for each D-class, those directly above it, with no other in between."""
        count = int(self.d.max()) + 1
        parents: list[set[int]] = [set() for _ in range(count)]
        for upper, lower in self._edges.tolist():
            parents[lower].add(upper)
        ancestors: dict[int, set[int]] = {}

        def climb(at: int) -> set[int]:
            stack = [at]
            while stack:
                top = stack[-1]
                waiting = [p for p in parents[top] if p not in ancestors]
                if waiting:
                    stack += waiting
                    continue
                ancestors[top] = set().union(parents[top], *(ancestors[p] for p in parents[top]))
                stack.pop()
            return ancestors[at]

        above = []
        for at in range(count):
            climb(at)
            higher = set().union(*(ancestors[p] for p in parents[at])) if parents[at] else set()
            above.append(tuple(sorted(parents[at] - higher)))
        return above

    def minimal_ideal(self) -> np.ndarray:
        """Find the smallest two-sided ideal: the D-class that multiplication never leaves.

        Returns:
            The numbers of its elements, ascending.
        """
        leaving = np.unique(self._edges[:, 0])
        kernel = np.setdiff1d(np.arange(int(self.d.max()) + 1), leaving)
        return np.flatnonzero(self.d == kernel[0])

    def groups(self, images: np.ndarray) -> list[Group]:
        """Find the group at the first idempotent of each regular D-class.

        Args:
            images: The images of all elements, (size, states).

        Returns:
            The groups, in the order of these idempotents.
        """
        _, first = np.unique(self.d[self.idempotents], return_index=True)
        groups = []
        for identity in self.idempotents[np.sort(first)]:
            members = np.flatnonzero(self.h == self.h[identity])
            groups.append(_group(int(identity), members, images))
        return groups


def _group(identity: int, members: np.ndarray, images: np.ndarray) -> Group:
    maps = images[members].astype(np.intp)
    order = len(members)
    # On the identity's own image the group acts faithfully, by permutations.
    points = np.unique(images[identity])
    orders = np.array([_order(row, points) for row in maps])
    cyclic = bool((orders == order).any())
    commutative = cyclic or all(np.array_equal(maps[:, a[points]], a[maps[:, points]]) for a in maps)
    name = "trivial" if order == 1 else f"Z_{order}" if cyclic else _name(order, commutative, len(points))
    return Group(np.r_[identity, members[members != identity]], name, cyclic, commutative)


def _name(order: int, commutative: bool, points: int) -> str:
    factorial = int(np.prod(np.arange(1, min(points, 20) + 1, dtype=object)))
    if order == factorial:
        return f"S_{points}"
    if order * 2 == factorial and points > 2:
        return f"A_{points}"
    return f"{'commutative' if commutative else 'non-commutative'} of order {order}"


def _order(images: np.ndarray, points: np.ndarray) -> int:
    power, count = images[points], 1
    while not np.array_equal(power, points):
        power, count = images[power], count + 1
    return count


def _components(graph: np.ndarray, connection: str) -> np.ndarray:
    size, generators = graph.shape
    source = np.repeat(np.arange(size), generators)
    ones = np.ones(graph.size, dtype=np.int8)
    matrix = coo_array((ones, (source, graph.ravel())), shape=(size, size)).tocsr()
    return _numbered(connected_components(matrix, directed=True, connection=connection)[1])


def _bipartite(left: np.ndarray, right: np.ndarray, size: int) -> np.ndarray:
    matrix = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size)).tocsr()
    labels: np.ndarray = connected_components(matrix, directed=False)[1]
    return labels


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Number classes by their first element, int32."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]
