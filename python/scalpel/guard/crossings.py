"""Decide which crossings are new, so that each is reported once, in whatever order and however often calls repeat it.

Ordinary decoding asks a logits processor about each prefix of a sequence once, and beams that change rows keep their
beginnings. Assisted and prompt-lookup decoding ask about one row, in rounds: candidate tokens are proposed, with a
question after each of them; then the model checks all of them, which asks again, and continues from those it keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from torch import Tensor

__all__ = ["Crossings"]

Asker = Literal["model", "lookup"]

_KEPT = 1 << 12  # how many prefixes are remembered at least; with many rows, 64 for each row


@dataclass
class _Generation:
    """All sequences that grow from one prompt.

    Attributes:
        prompt: The key of the prompt.
        reported: The greatest length at which a crossing was reported, 0 before the first.
        proposes: Who proposes candidates, a model or a lookup; None until the first ones are checked.
        round: The largest number of candidates that were checked in one round.
    """

    prompt: bytes
    reported: int = 0
    proposes: Asker | None = None
    round: int = 0


@dataclass
class _Prefix:
    """A sequence that was asked about.

    Attributes:
        generation: The generation to which it belongs.
        since: The length at which it came within the margin, 0 if it is outside.
        reported: Whether nothing remains to be reported of it.
        asker: Who asked; None once it was checked as a candidate.
    """

    generation: _Generation
    since: int
    reported: bool
    asker: Asker | None


class Crossings:
    """What a guard has been asked about, and what it has reported.

    Attributes:
        guessing: Whether the last call asked about a candidate that is still to be checked or, as far as can be seen,
            is rejected. If it is kept, it will be asked about again.
    """

    def __init__(self) -> None:
        self.guessing = False
        self._seen: dict[bytes, _Prefix] = {}
        self._last: bytes | None = None  # the last call's sequence, unless it was the last of a round
        self._run = 0  # how many calls before it continued the call before them
        self._checking = self._rejected = False

    def new(
        self, rows: Sequence[Sequence[int]], inside: Sequence[bool], input_ids: Tensor, scores: Tensor
    ) -> list[bool]:
        """Decide which rows have a crossing to report.

        A sequence crosses where it is within the margin and was not without its last token, and where it is a prompt. A
        crossing is reported if it is not a guess, no equal row of this call is reported, and no earlier call reported
        one of the same length or longer in the same generation, which would be a candidate that this row has replaced.

        Args:
            rows: Token ids without padding.
            inside: Whether each row is within the margin.
            input_ids: The ids as the guard receives them.
            scores: The scores as the guard receives them.

        Returns:
            Whether to report each row.
        """
        candidate = _following(input_ids)
        asker = None if candidate is not None else _asker(scores)
        prefixes: dict[bytes, _Prefix] = {}
        fresh = []
        for row, within in zip(rows, inside, strict=True):
            key, stem = _key(row), _key(row[:-1])
            if not row or key in prefixes:
                fresh.append(False)
                continue
            row_prefix, stem_prefix = self._seen.get(key), self._seen.get(stem)
            generation = (
                stem_prefix.generation if stem_prefix is not None else self._of_prompt(key, row_prefix, candidate)
            )
            if row_prefix is not None and row_prefix.generation is not generation:
                row_prefix = None
            self.guessing = len(rows) == 1 and self._guesses(
                key, stem, row_prefix, generation, asker, candidate, scores
            )
            known = stem_prefix or row_prefix
            since = (known.since if known is not None and known.since else len(row)) if within else 0
            reported = within and known is not None and known.reported
            fresh.append(within and not reported and not self.guessing and since > generation.reported)
            prefixes[key] = _Prefix(generation, since, reported or (within and not self.guessing), asker)
        # Only now, because rows of one call do not replace each other.
        for key, prefix in prefixes.items():
            if prefix.reported:
                prefix.generation.reported = max(prefix.generation.reported, prefix.since)
            self._seen.pop(key, None)  # so that it becomes the most recent entry
            self._seen[key] = prefix
        while len(self._seen) > max(_KEPT, 64 * len(rows)):
            del self._seen[next(iter(self._seen))]
        return fresh

    def _of_prompt(self, key: bytes, row_prefix: _Prefix | None, candidate: int | None) -> _Generation:
        """Find the generation of a row that does not continue another.

        A prompt that was asked about before begins a new generation, unless tokens proposed after it are being checked
        now.
        """
        if (
            row_prefix is not None
            and row_prefix.generation.prompt == key
            and row_prefix.asker is not None
            and candidate is not None
        ):
            return row_prefix.generation
        return _Generation(key)

    def _guesses(
        self,
        key: bytes,
        stem: bytes,
        row_prefix: _Prefix | None,
        generation: _Generation,
        asker: Asker | None,
        candidate: int | None,
        scores: Tensor,
    ) -> bool:
        """Whether the only row of a call ends in a token that is a guess; see ``guessing``."""
        continues, self._last = stem == self._last, key
        self._run = self._run + 1 if continues else 0
        if continues and self._checking:
            guess = self._rejected
            generation.round = max(generation.round, self._run)
            if candidate is None:  # all are checked, so the next call begins a round
                self._checking, self._last = False, None
        elif candidate is not None and row_prefix is not None and row_prefix.asker is not None:
            self._checking, self._rejected, guess = True, False, False
            generation.proposes = row_prefix.asker
        else:
            self._checking = False
            # A round may propose two candidates more than the last; a longer run is not a proposal.
            proposed = asker is not None and asker == generation.proposes and self._run <= generation.round + 2
            guess = continues and proposed
        if self._checking and candidate != int(scores.argmax()):
            self._rejected = True
        return guess


def _following(input_ids: Tensor) -> int | None:
    """Return the candidate that follows the only row, or None.

    Candidates are checked by passing the front part of a row that holds all of them, so the next candidate is in
    memory.
    """
    length, (across, along) = input_ids.shape[1], input_ids.stride()
    place = input_ids.storage_offset() + length
    if len(input_ids) != 1 or across <= length or along != 1:
        return None
    if place >= input_ids.untyped_storage().nbytes() // input_ids.element_size():
        return None
    return int(input_ids.as_strided((1,), (1,), place))


def _asker(scores: Tensor) -> Asker:
    """Tell who asks: the scores of prompt lookup are all equal, except where other processors have changed them."""
    sample = scores[0, :: max(1, scores.shape[1] // 64)]
    return "lookup" if sample.unique().numel() <= 16 else "model"


def _key(row: Sequence[int]) -> bytes:
    return blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest()
