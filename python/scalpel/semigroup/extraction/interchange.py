"""Interchange: replace the whole cache of one prefix by another's, and continue.

After a prefix, the state of a causal transformer is its cache, that is the keys and values of every layer, together
with the position. So caches of prefixes of equal length are swapped, and the output after a continuation is read. For
two prefixes of one class it should stay the same; for prefixes of two classes it should become what the machine says of
the other prefix. Swapping all keys and values is a run of the other prefix, up to rounding: this tests congruence at
equal length, with real caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from .bounds import clopper_pearson
from .learning import Candidate
from .questions import ModelQuestions, Word, pad
from .trials import Sample, continuation

__all__ = ["Interchange", "after_swap", "interchange"]


@dataclass(frozen=True)
class Interchange:
    """Counts of swaps and of their outcomes.

    Attributes:
        same: Swaps within a class that left the output as it was.
        same_trials: Swaps within a class.
        other: Swaps between classes after which the output was the machine's for the other prefix.
        other_trials: Swaps between classes.
        flips: Swaps between classes that had to change the output, and did.
        flip_trials: Swaps between classes that had to change the output.
    """

    same: int
    same_trials: int
    other: int
    other_trials: int
    flips: int
    flip_trials: int

    def to_dict(self) -> dict[str, Any]:
        def share(hits: int, trials: int) -> dict[str, Any]:
            low, high = clopper_pearson(hits, trials, 0.05 / 3)
            return {"share": hits / trials if trials else None, "trials": trials, "low": low, "high": high}

        return {
            "one class, the output stays": share(self.same, self.same_trials),
            "two classes, the output is the machine's for the other": share(self.other, self.other_trials),
            "of these, it had to change and did": share(self.flips, self.flip_trials),
        }


def interchange(
    questions: ModelQuestions, candidate: Candidate, sample: Sample, pairs: int, horizon: int, rng: Generator
) -> Interchange:
    """Swap the caches of about ``pairs`` pairs within classes and as many between classes, of equal length in tokens.

    Continuations have up to ``horizon`` letters and are valid after both prefixes. If a suffix follows, which reads the
    cache, a third of the continuations are empty.
    """
    machine = candidate.machine
    groups: dict[int, list[tuple[Word, int]]] = {}
    for state, words in sample.words.items():
        for word in words:
            groups.setdefault(len(questions.ids(word, suffix=False)), []).append((word, state))
    # Disjoint pairs, so that trials are independent; a prefix may be in one pair of each kind.
    within: list[tuple[Word, Word, int, int]] = []
    between: list[tuple[Word, Word, int, int]] = []
    for members in groups.values():
        order = [members[i] for i in rng.permutation(len(members))]
        by_class = sorted(order, key=lambda member: member[1])
        half = len(by_class) // 2
        within += [(u, v, p, q) for (u, p), (v, q) in zip(by_class[::2], by_class[1::2], strict=False) if p == q]
        between += [(u, v, p, q) for (u, p), (v, q) in zip(by_class[:half], by_class[half:], strict=False) if p != q]
    kept = []
    for group in (within, between):
        for i in rng.permutation(len(group))[:pairs]:
            u, v, p, q = group[i]
            bare = bool(questions.suffix) and rng.random() < 1 / 3
            w = () if bare else continuation(questions, u, v, horizon, rng)
            if w or questions.suffix:  # another token must read the cache, because u's last token has read u's own
                kept.append((u, v, p, q, w))
    before = questions.ask([u + w for u, _, _, _, w in kept]).tolist()
    swapped = after_swap(questions, [(u, v, w) for u, v, _, _, w in kept])
    counts = dict.fromkeys(("same", "same_trials", "other", "other_trials", "flips", "flip_trials"), 0)
    for (_, _, p, q, w), was, now in zip(kept, before, swapped, strict=True):
        if p == q:
            counts["same_trials"] += 1
            counts["same"] += was == now
            continue
        expected = machine.outputs[machine.state(w, start=q)]
        right = questions.output(now) == expected
        counts["other_trials"] += 1
        counts["other"] += right
        if questions.output(was) != expected:
            counts["flip_trials"] += 1
            counts["flips"] += right
    return Interchange(**counts)


@torch.no_grad()
def after_swap(questions: ModelQuestions, triples: Sequence[tuple[Word, Word, Word]]) -> list[int]:
    """Return the output after u·w with the keys and values at u's positions replaced by v's, for each (u, v, w)."""
    answers = []
    step = 64
    for i in range(0, len(triples), step):
        part = triples[i : i + step]
        ids, last = pad([questions.ids(u + w) for u, _, w in part])
        donors, _ = pad([questions.ids(v, suffix=False) for _, v, _ in part])
        ends = torch.tensor([len(questions.ids(u, suffix=False)) for u, _, _ in part], dtype=torch.int64, device="cpu")
        _, cache = questions.model.run_with_cache(donors, names=r"\d+\.attn\.[kv]$")

        def put(value: Tensor, name: str, cache: dict[str, Tensor] = cache, ends: Tensor = ends) -> Tensor:
            donated = cache[name]
            at = torch.arange(donated.shape[1], device="cpu") < ends[:, None]
            value = value.clone()
            value[:, : donated.shape[1]][at] = donated[at]
            return value

        logits = questions.model.run_with_hooks(ids, [(name, put) for name in cache])
        answers += questions.choose(logits[torch.arange(len(part), device="cpu"), last])
    return answers
