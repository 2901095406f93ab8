"""What a finite semigroup is like: Green's relations, idempotents, ideals and groups, as methods."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .greens import Greens, Group
from .periods import index_and_period


class Structure:
    """The methods of a TransformationSemigroup that ask about its structure."""

    if TYPE_CHECKING:
        size: Any
        degree: Any
        images: Any
        right_cayley_graph: Any
        left_cayley_graph: Any
        _maps: Any

    @cached_property
    def _greens(self) -> Greens:
        return Greens.of(self.right_cayley_graph, self.left_cayley_graph, self.idempotents())

    def greens(self) -> Greens:
        """Compute Green's relations R, L, H and D, and the egg-box picture of each D-class.

        Returns:
            The relations; see :class:`.greens.Greens`.

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0], "hold": [0, 1]})
            >>> S.greens().counts()
            {'R': 2, 'L': 3, 'H': 3, 'D': 2}
        """
        return self._greens

    @cached_property
    def _idempotents(self) -> np.ndarray:
        step = max(1, (1 << 24) // self.degree)
        parts = [self.images[i : i + step].astype(np.intp) for i in range(0, self.size, step)]
        equal = [(np.take_along_axis(part, part, axis=1) == part).all(1) for part in parts]
        return np.flatnonzero(np.concatenate(equal))

    def idempotents(self) -> np.ndarray:
        """Find the elements e with e·e = e.

        Returns:
            Their numbers, ascending.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]}).idempotents()
            array([1])
        """
        return self._idempotents

    def minimal_ideal(self) -> np.ndarray:
        """Find the smallest two-sided ideal, which is called the kernel.

        Returns:
            The numbers of its elements, ascending.

        Example:
            >>> S = scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0], "hold": [0, 1]})
            >>> S.minimal_ideal()
            array([0, 1])
        """
        return self.greens().minimal_ideal()

    def groups(self) -> list[Group]:
        """Find the maximal subgroups, one for each regular D-class; those of one D-class are isomorphic.

        Returns:
            The subgroups, in the order of their D-classes.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"next": [1, 2, 0]}).groups()[0].name
            'Z_3'
        """
        return self.greens().groups(self.images)

    def is_aperiodic(self) -> bool:
        """Decide whether all subgroups are trivial, so that no element's powers have a period.

        Schützenberger showed that these are the semigroups of star-free languages.

        Returns:
            True if they are.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]}).is_aperiodic()
            False
        """
        return self.periodic_element() is None

    def periodic_element(self) -> int | None:
        """Find an element that proves that the semigroup is not aperiodic.

        Returns:
            The number of the first element whose period is above 1, which has the shortest word of all of them; None if
            the semigroup is aperiodic.

        Raises:
            AssertionError: Never, unless the enumeration is wrong.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]}).periodic_element()
            0
        """
        greens = self.greens()
        if greens.largest_h_class() == 1:
            return None
        for number in range(self.size):
            if index_and_period(self.images[number])[1] > 1:
                return number
        raise AssertionError("a finite semigroup whose H-classes are not all trivial has a group that is not trivial")

    def is_commutative(self) -> bool:
        """Decide whether x·y = y·x for all elements, by comparing the generators.

        Returns:
            True if they commute.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"set": [1, 1], "reset": [0, 0]}).is_commutative()
            False
        """
        maps = self._maps
        return all(np.array_equal(b[a], a[b]) for i, a in enumerate(maps) for b in maps[:i])

    def is_group(self) -> bool:
        """Decide whether the semigroup is a group, that is a single H-class.

        Returns:
            True if it is.

        Example:
            >>> scalpel.semigroup.TransformationSemigroup({"swap": [1, 0]}).is_group()
            True
        """
        return self.greens().largest_h_class() == self.size
