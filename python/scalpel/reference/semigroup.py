"""Slow, obvious twins of the semigroup functions: sets of tuples, and definitions taken literally."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

__all__ = ["closure", "distances", "greens_classes", "idempotents", "index_and_period", "minimal_ideal", "orbit_shape"]

Map = tuple[int, ...]


def compose(first: Map, then: Map) -> Map:
    """Apply ``first``, and then ``then``."""
    return tuple(then[state] for state in first)


def closure(generators: Mapping[str, Sequence[int]]) -> dict[Map, tuple[str, ...]]:
    """Enumerate all elements with their shortest words, in the short-lex order of these words."""
    words: dict[Map, tuple[str, ...]] = {}
    level: list[tuple[Map, tuple[str, ...]]] = [(tuple(images), (name,)) for name, images in generators.items()]
    while level:
        new = []
        for element, word in level:
            if element not in words:
                words[element] = word
                new.append((element, word))
        level = [
            (compose(element, tuple(images)), (*word, name))
            for element, word in new
            for name, images in generators.items()
        ]
    return words


def idempotents(elements: Iterable[Map]) -> set[Map]:
    """Find the elements that are equal to their square."""
    return {e for e in elements if compose(e, e) == e}


def greens_classes(elements: Iterable[Map], relation: str) -> set[frozenset[Map]]:
    """Group elements by the right ("R"), left ("L"), both ("H") or two-sided ("J") ideals that they generate.

    "D" is computed as "J", which it equals in a finite semigroup.
    """
    elements = list(elements)

    def right(x: Map) -> frozenset[Map]:
        return frozenset([x, *(compose(x, s) for s in elements)])

    def left(x: Map) -> frozenset[Map]:
        return frozenset([x, *(compose(s, x) for s in elements)])

    def both(x: Map) -> frozenset[Map]:
        return right(x) | left(x) | {compose(compose(s, x), t) for s, t in product(elements, repeat=2)}

    ideal = {
        "R": right,
        "L": left,
        "H": lambda x: (right(x), left(x)),
        "D": both,
        "J": both,
    }[relation]
    classes: dict[object, set[Map]] = {}
    for x in elements:
        classes.setdefault(ideal(x), set()).add(x)
    return {frozenset(members) for members in classes.values()}


def minimal_ideal(elements: Iterable[Map]) -> set[Map]:
    """Intersect all two-sided ideals S¹xS¹."""
    elements = list(elements)
    kernel = set(elements)
    for x in elements:
        inner = {x, *(compose(x, s) for s in elements)}
        kernel &= inner | {compose(s, y) for s in elements for y in inner}
    return kernel


def index_and_period(element: Map) -> tuple[int, int]:
    """Compute the smallest m and p, both at least 1, for which the powers m + p and m are equal."""
    powers = [element]
    while True:
        after = compose(powers[-1], element)
        if after in powers:
            at = powers.index(after)
            return at + 1, len(powers) - at
        powers.append(after)


def distances(images: Sequence[Sequence[int]], starts: Iterable[int]) -> list[int]:
    """Compute the length of the shortest word from a start to each state, -1 where there is none."""
    steps = dict.fromkeys(starts, 0)
    queue = list(steps)
    for state in queue:
        for generator in images:
            if generator[state] not in steps:
                steps[generator[state]] = steps[state] + 1
                queue.append(generator[state])
    states = len(images[0])
    return [steps.get(state, -1) for state in range(states)]


def orbit_shape(image: Sequence[int], state: int) -> tuple[int, int]:
    """Compute (index, period) by walking until a state repeats."""
    walk: list[int] = []
    while state not in walk:
        walk.append(state)
        state = image[state]
    at = walk.index(state)
    return at, len(walk) - at
