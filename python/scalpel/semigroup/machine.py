"""Moore machines: states, a transition for every letter, and an output for every state."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .transformation import TransformationSemigroup

__all__ = ["MooreMachine"]


@dataclass(frozen=True)
class MooreMachine:
    """A Moore machine (Q, δ, o) with a start state, whose states are 0 … n - 1.

    Attributes:
        letters: The names of the letters.
        transitions: δ, (states, letters): the state to which each letter leads from each state.
        outputs: o, (states,): any hashable values.
        start: The start state.

    Raises:
        ValueError: If the lengths do not fit, or a transition or the start is not one of the states.

    Example:
        >>> parity = scalpel.semigroup.MooreMachine(("a", "b"), ((1, 0), (0, 1)), ("even", "odd"))
        >>> parity.states, parity.state([0, 0, 0]), parity.output([0, 1, 0, 0])
        (2, 1, 'odd')
        >>> parity.equivalent(parity.minimized())
        True
    """

    letters: tuple[str, ...]
    transitions: tuple[tuple[int, ...], ...]
    outputs: tuple[Hashable, ...]
    start: int = 0

    def __post_init__(self) -> None:
        count = len(self.outputs)
        table = np.asarray(self.transitions)
        if table.shape != (count, len(self.letters)) or count == 0:
            raise ValueError(
                f"transitions have shape {table.shape} for {count} outputs and {len(self.letters)} letters; "
                "there must be a row for each state and a column for each letter"
            )
        if not (table >= 0).all() or not (table < count).all() or not 0 <= self.start < count:
            raise ValueError(f"a transition or the start is not one of the states, which are 0 to {count - 1}")

    @property
    def states(self) -> int:
        """The number of states."""
        return len(self.outputs)

    def state(self, word: Sequence[int], start: int | None = None) -> int:
        """Find the state to which a word leads.

        Args:
            word: The numbers of its letters.
            start: The state to begin from; None means the start state.

        Returns:
            The state.
        """
        at = self.start if start is None else start
        for letter in word:
            at = self.transitions[at][letter]
        return at

    def output(self, word: Sequence[int]) -> Hashable:
        """Find the machine's output after a word.

        Args:
            word: The numbers of its letters.

        Returns:
            The output of the state to which the word leads.
        """
        return self.outputs[self.state(word)]

    def semigroup(self, letters: Sequence[str] | None = None) -> TransformationSemigroup:
        """Build the semigroup of the letters' actions on the states, which needs libsemigroups.

        Args:
            letters: The names of some letters; None means all.

        Returns:
            The semigroup that they generate.

        Raises:
            ValueError: If there is no such letter.

        Example:
            >>> parity = scalpel.semigroup.MooreMachine(("a", "b"), ((1, 0), (0, 1)), ("even", "odd"))
            >>> parity.semigroup().groups()[0].name
            'Z_2'
        """
        chosen = self.letters if letters is None else tuple(letters)
        unknown = [name for name in chosen if name not in self.letters]
        if unknown:
            raise ValueError(f"there is no letter {unknown[0]!r}; there are {', '.join(map(repr, self.letters))}")
        return TransformationSemigroup(
            {name: [row[self.letters.index(name)] for row in self.transitions] for name in chosen}
        )

    def minimized(self) -> "MooreMachine":
        """Build the smallest machine with the same output after every word.

        Moore's algorithm: begin with classes of equal output, and split a class as long as a letter distinguishes two
        of its states.

        Returns:
            The machine, whose states are numbered in breadth-first order from the start.

        Example:
            >>> twice = scalpel.semigroup.MooreMachine(("a",), ((1,), (2,), (3,), (0,)), ("even", "odd", "even", "odd"))
            >>> twice.minimized().states
            2
        """
        names: dict[Hashable, int] = {}
        classes = [names.setdefault(output, len(names)) for output in self.outputs]
        while True:
            keys: dict[Any, int] = {}
            finer = [
                keys.setdefault((classes[q], *(classes[t] for t in row)), len(keys))
                for q, row in enumerate(self.transitions)
            ]
            if len(keys) == len(set(classes)):
                break
            classes = finer
        first = {c: classes.index(c) for c in set(classes)}
        order = [classes[self.start]]
        for c in order:
            order += [n for n in dict.fromkeys(classes[t] for t in self.transitions[first[c]]) if n not in order]
        number = {c: i for i, c in enumerate(order)}
        return MooreMachine(
            self.letters,
            tuple(tuple(number[classes[t]] for t in self.transitions[first[c]]) for c in order),
            tuple(self.outputs[first[c]] for c in order),
        )

    def equivalent(self, other: "MooreMachine") -> bool:
        """Decide whether two machines have the same output after every word.

        Args:
            other: A machine; its letters and outputs are compared by name.

        Returns:
            True if they do.
        """
        if set(self.letters) != set(other.letters):
            return False
        mine = self.minimized()
        columns = [other.letters.index(name) for name in self.letters]
        table = tuple(tuple(row[i] for i in columns) for row in other.transitions)
        theirs = MooreMachine(self.letters, table, other.outputs, other.start).minimized()
        return mine.transitions == theirs.transitions and mine.outputs == theirs.outputs

    def to_dict(self) -> dict[str, Any]:
        """Return letters, transitions, outputs and start as plain data.

        Returns:
            A dict that JSON can hold; outputs are strings.

        Example:
            >>> scalpel.semigroup.MooreMachine(("a",), ((0,),), ("yes",)).to_dict()
            {'letters': ['a'], 'transitions': [[0]], 'outputs': ['yes'], 'start': 0}
        """
        return {
            "letters": list(self.letters),
            "transitions": [list(row) for row in self.transitions],
            "outputs": [str(output) for output in self.outputs],
            "start": self.start,
        }
