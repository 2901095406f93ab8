"""Which crossings are new: each is told once, however often and in whichever order a sequence is asked about.

Ordinary decoding asks a logits processor about each prefix of a sequence once, and beams that change rows keep what
they begin with. Assisted and prompt-lookup decoding ask in rounds, about one row: something proposes candidate tokens
and asks after each of them; then the model checks them all, asking again, and goes on from those that it keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from torch import Tensor

__all__ = ["Crossings"]

Asker = Literal["model", "lookup"]

_KEPT = 1 << 12  # prefixes that are remembered at least, and 64 for each row


@dataclass
class _Generation:
    """What grows out of one prompt.

    ``prompt``: its key. ``told``: the greatest length at which a crossing was told of, 0 before the first.
    ``proposes``: who proposes candidates, a model or a lookup; None until the first ones are checked. ``round``: the
    most candidates that were checked in one round.
    """

    prompt: bytes
    told: int = 0
    proposes: Asker | None = None
    round: int = 0


@dataclass
class _Prefix:
    """A sequence that was asked about.

    ``since``: the length at which it came within the margin, 0 where it is outside; ``told``: nothing remains to be
    told of that. ``asker``: who asked; None once it was checked as a candidate.
    """

    generation: _Generation
    since: int
    told: bool
    asker: Asker | None


class Crossings:
    """What a guard has been asked about, and what it has told.

    ``guessing``: whether the last call asked about a candidate that is rejected, as far as can be seen, or is still to
    be checked. It is asked about again if it is kept.
    """

    def __init__(self) -> None:
        self.guessing = False
        self._seen: dict[bytes, _Prefix] = {}
        self._last: bytes | None = None  # the last call's sequence, unless it was the last of a round
        self._run = 0  # calls before it that each went on from the one before
        self._checking = self._rejected = False

    def new(
        self, rows: Sequence[Sequence[int]], inside: Sequence[bool], input_ids: Tensor, scores: Tensor
    ) -> list[bool]:
        """Which of ``rows``, token ids without padding, are to be told of.

        ``inside``: whether each row is within the margin; ``input_ids`` and ``scores`` as the guard gets them. A
        sequence crosses where it is within the margin and was not without its last token, and where it is a prompt.
        A crossing is told of when it is no guess, unless an equal row of this call is told of, or an earlier call told
        of one in the same generation that was as long or longer: of a candidate, in whose place this row has come.
        """
        candidate = _following(input_ids)
        asker = None if candidate is not None else _asker(scores)
        found: dict[bytes, _Prefix] = {}
        fresh = []
        for row, within in zip(rows, inside, strict=True):
            key, stem = _key(row), _key(row[:-1])
            if not row or key in found:
                fresh.append(False)
                continue
            own, before = self._seen.get(key), self._seen.get(stem)
            generation = before.generation if before is not None else self._of_prompt(key, own, candidate)
            if own is not None and own.generation is not generation:
                own = None
            self.guessing = len(rows) == 1 and self._guesses(key, stem, own, generation, asker, candidate, scores)
            known = before or own
            since = (known.since if known is not None and known.since else len(row)) if within else 0
            told = within and known is not None and known.told
            fresh.append(within and not told and not self.guessing and since > generation.told)
            found[key] = _Prefix(generation, since, told or (within and not self.guessing), asker)
        # Only now: the rows of one call don't stand in each other's place.
        for key, prefix in found.items():
            if prefix.told:
                prefix.generation.told = max(prefix.generation.told, prefix.since)
            self._seen.pop(key, None)  # so that it counts as the youngest
            self._seen[key] = prefix
        while len(self._seen) > max(_KEPT, 64 * len(rows)):
            del self._seen[next(iter(self._seen))]
        return fresh

    def _of_prompt(self, key: bytes, own: _Prefix | None, candidate: int | None) -> _Generation:
        """The generation of a row that goes on from no other.

        A prompt that was asked about before begins a new one, unless what was proposed after it is checked now.
        """
        if own is not None and own.generation.prompt == key and own.asker is not None and candidate is not None:
            return own.generation
        return _Generation(key)

    def _guesses(
        self,
        key: bytes,
        stem: bytes,
        own: _Prefix | None,
        generation: _Generation,
        asker: Asker | None,
        candidate: int | None,
        scores: Tensor,
    ) -> bool:
        """Whether the only row of a call ends in a token that is a guess; see ``guessing``."""
        goes_on, self._last = stem == self._last, key
        self._run = self._run + 1 if goes_on else 0
        if goes_on and self._checking:
            guess = self._rejected
            generation.round = max(generation.round, self._run)
            if candidate is None:  # all are checked: what comes next begins a round
                self._checking, self._last = False, None
        elif candidate is not None and own is not None and own.asker is not None:
            self._checking, self._rejected, guess = True, False, False
            generation.proposes = own.asker
        else:
            self._checking = False
            # A round may propose two candidates more than the last; a longer run is no proposal.
            proposed = asker is not None and asker == generation.proposes and self._run <= generation.round + 2
            guess = goes_on and proposed
        if self._checking and candidate != int(scores.argmax()):
            self._rejected = True
        return guess


def _following(input_ids: Tensor) -> int | None:
    """The candidate that follows the only row; None where none does.

    Candidates are checked by handing over the front of a row that holds them all, so the next one is there.
    """
    length, (across, along) = input_ids.shape[1], input_ids.stride()
    place = input_ids.storage_offset() + length
    if len(input_ids) != 1 or across <= length or along != 1:
        return None
    if place >= input_ids.untyped_storage().nbytes() // input_ids.element_size():
        return None
    return int(input_ids.as_strided((1,), (1,), place))


def _asker(scores: Tensor) -> Asker:
    """Prompt lookup asks with scores of its own, all the same but for what other processors have made of some."""
    some = scores[0, :: max(1, scores.shape[1] // 64)]
    return "lookup" if some.unique().numel() <= 16 else "model"


def _key(row: Sequence[int]) -> bytes:
    return blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest()
