"""The nulls of all experiments by name: measurements that show what a figure is where there is nothing to find.

``untrained`` is the same measurement on an untrained model of the same shape and density. ``rotated`` turns the
measured direction (or basis) at random and keeps everything else. ``shuffled`` exchanges what is measured, or what it
is compared with, between prompts, tokens or cells. Each experiment says what exactly it exchanges. If a null has no
meaning in an experiment, the experiment lists it among what it left out.
"""

from collections.abc import Sequence

from .result import Verdict

__all__ = ["NULLS", "check_nulls", "only_beside"]

NULLS = ("untrained", "rotated", "shuffled")


def check_nulls(nulls: Sequence[str]) -> tuple[str, ...]:
    """The nulls in their fixed order, each once. ValueError for an unknown name."""
    unknown = [name for name in nulls if name not in NULLS]
    if unknown:
        raise ValueError(f"unknown null {unknown[0]!r}; there are {', '.join(NULLS)}")
    return tuple(name for name in NULLS if name in nulls)


def only_beside(deciding: Sequence[str], asked: Sequence[str], verdict: Verdict) -> Verdict:
    """The verdict, unless it is "reproduced" and a null on which the rule depends was not asked for.

    Args:
        deciding: The nulls on which the rule depends.
        asked: The nulls that were measured.
        verdict: The verdict by the rule.

    Returns:
        ``verdict``, or "not testable here" in that case.
    """
    return "not testable here" if verdict == "reproduced" and set(deciding) - set(asked) else verdict
