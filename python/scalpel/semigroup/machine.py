"""Moore machines: states, a transition for every letter, an output at every state."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .transformation import TransformationSemigroup

__all__ = ["MooreMachine"]


@dataclass(frozen=True)
class MooreMachine:
    """(Q, δ, o) with a start state. States are 0 … n - 1.

    ``letters``: names; ``transitions`` (states, letters): δ; ``outputs`` (states,): o, any hashable values. ValueError
    where the transitions are no maps on the states or lengths don't fit.
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
                "give a row a state and a column a letter"
            )
        if not (table >= 0).all() or not (table < count).all() or not 0 <= self.start < count:
            raise ValueError(f"a transition or the start leads out of the states, which are 0 to {count - 1}")

    @property
    def states(self) -> int:
        return len(self.outputs)

    def state(self, word: Sequence[int], start: int | None = None) -> int:
        """The state that a word, numbers of letters, leads to."""
        at = self.start if start is None else start
        for letter in word:
            at = self.transitions[at][letter]
        return at

    def output(self, word: Sequence[int]) -> Hashable:
        """What the machine says after a word, numbers of letters."""
        return self.outputs[self.state(word)]

    def semigroup(self, letters: Sequence[str] | None = None) -> TransformationSemigroup:
        """The semigroup of the letters' actions on the states, or of some of the letters'. Needs libsemigroups."""
        chosen = self.letters if letters is None else tuple(letters)
        unknown = [name for name in chosen if name not in self.letters]
        if unknown:
            raise ValueError(f"there is no letter {unknown[0]!r}; there are {', '.join(map(repr, self.letters))}")
        return TransformationSemigroup(
            {name: [row[self.letters.index(name)] for row in self.transitions] for name in chosen}
        )

    def minimized(self) -> "MooreMachine":
        """The smallest machine with the same outputs after every word, numbered as a breadth-first walk meets states.

        Moore's algorithm: begin with classes by output, and split as long as a letter tells two of one class apart.
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
        """Whether both say the same after every word; letters and outputs are compared by name."""
        if set(self.letters) != set(other.letters):
            return False
        mine = self.minimized()
        columns = [other.letters.index(name) for name in self.letters]
        table = tuple(tuple(row[i] for i in columns) for row in other.transitions)
        theirs = MooreMachine(self.letters, table, other.outputs, other.start).minimized()
        return mine.transitions == theirs.transitions and mine.outputs == theirs.outputs

    def to_dict(self) -> dict[str, Any]:
        """Plain data: letters, transitions, outputs, start."""
        return {
            "letters": list(self.letters),
            "transitions": [list(row) for row in self.transitions],
            "outputs": [str(output) for output in self.outputs],
            "start": self.start,
        }
