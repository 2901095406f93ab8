"""The nulls that every analysis takes by name: what is left of a finding where there is nothing to find.

``untrained``: the same measurement on an untrained model of the same shape and density. ``rotated``: the measured
direction (or basis) turned at random, all else equal. ``shuffled``: what is measured, or what it is compared with,
exchanged between prompts, tokens or cells. What each exchanges exactly is said where it is used; an analysis in which
one of them has no meaning names it among what it left out.
"""

from collections.abc import Sequence

from .result import Verdict

__all__ = ["NULLS", "check_nulls", "only_beside"]

NULLS = ("untrained", "rotated", "shuffled")


def check_nulls(nulls: Sequence[str]) -> tuple[str, ...]:
    """``nulls`` in the fixed order, each once. ValueError for one that there isn't."""
    unknown = [name for name in nulls if name not in NULLS]
    if unknown:
        raise ValueError(f"there is no null {unknown[0]!r}; there are {', '.join(NULLS)}")
    return tuple(name for name in NULLS if name in nulls)


def only_beside(deciding: Sequence[str], asked: Sequence[str], verdict: Verdict) -> Verdict:
    """``verdict``, but "not testable here" for a claim said to be reproduced without a null that its rule needs."""
    return "not testable here" if verdict == "reproduced" and set(deciding) - set(asked) else verdict
