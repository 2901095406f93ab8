"""A safeguard: how far a prompt is from where a law says that the answer fails, and a stop before it gets there.

A law of the bracket circuit (:class:`scalpel.semigroup.ThresholdCounter`, or any object with ``tokens_left``) foretells
from a prompt's tokens how many more may follow until "]]" is no longer said at the end of a nested list. How well it
foretells that is measured by the experiment ``guard``; a guard is as good as its law.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..models.tokenizer import Tokenizer
from ..semigroup.threshold import ThresholdCounter
from ..tasks.brackets import START
from .crossings import Crossings

__all__ = ["Distance", "FailureLaw", "HoleGuard", "HoleReached", "open_lists"]

LEAST_DEPTH = 2  # a list that one bracket closes has nothing that could be diluted away
_PAIRS = {")": "(", "]": "[", "}": "{"}
# Strings, comments, brackets. A string that isn't closed goes on to the end of its line, a long one to the text's.
_LEXEMES = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\\?\Z)|\'\'\'(?:[^\\]|\\.)*?(?:\'\'\'|\\?\Z)'
    r'|"(?:[^"\\\n]|\\.)*"?|\'(?:[^\'\\\n]|\\.)*\'?|\#[^\n]*|[\[\](){}]',
    re.DOTALL,
)


@runtime_checkable
class FailureLaw(Protocol):
    """What a guard asks of a law."""

    def tokens_left(self, ids: Sequence[int]) -> float:
        """How many tokens may follow ``ids`` (start token included) before the answer fails.

        0 or less where it fails already, infinity where it never will.
        """


@dataclass(frozen=True)
class Distance:
    """A prompt's distance to the predicted failure region, in tokens.

    ``k``: its "[", all of them or the open ones as the guard was told to count; ``n``: attended keys,
    start token included; ``tokens_left``: what may follow before the answer fails, 0 or less where it fails already,
    infinity where no nested list is open or the law foretells no failure; ``failing``: tokens_left <= 0.
    """

    k: int
    n: int
    tokens_left: float
    failing: bool

    @property
    def critical_length(self) -> float:
        """The length n from which on the answer is predicted to fail, if what follows brings no more evidence."""
        return self.n + self.tokens_left

    def __str__(self) -> str:
        if math.isinf(self.tokens_left):
            return f"k = {self.k}, n = {self.n}: no failure is predicted"
        where = "is reached" if self.failing else f"is {self.tokens_left:.0f} tokens away"
        return f"k = {self.k}, n = {self.n}: the predicted critical length {self.critical_length:.0f} {where}"


class HoleReached(RuntimeError):
    """A prompt came within the margin of the predicted failure region, and nothing else could stop it.

    ``distance`` says where, ``row`` which prompt of the batch.
    """

    def __init__(self, distance: Distance, row: int) -> None:
        self.distance, self.row = distance, row
        super().__init__(
            f"row {row}: {distance}. From there on the model is expected to close the list wrongly. Close it earlier, "
            "or split it; give eos_token_id to end such rows instead, or on_failure='warn' to go on."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.distance, self.row)


def open_lists(text: str) -> int:
    """How many "[" of Python text are open at its end; those in strings and comments don't count.

    A bracket of another kind that was never closed is dropped when one around it is. A text that begins inside a long
    string is misread.
    """
    stack: list[str] = []
    for lexeme in _LEXEMES.findall(text):
        if lexeme in _PAIRS.values():
            stack.append(lexeme)
        elif _PAIRS.get(lexeme) in stack:
            while stack.pop() != _PAIRS[lexeme]:
                pass
    return stack.count("[")


class HoleGuard:
    """Watches a generation, as a logits processor of transformers does: ``guard(input_ids, scores) → scores``.

    ``model``: a CircuitGPT or a transformers model; only its tokenizer and special tokens are read. ``law``: a
    ThresholdCounter or a :class:`FailureLaw`. ``margin``: tokens before the predicted failure at which the guard acts.
    ``on_failure``: "warn" warns once a crossing; a function is called with the :class:`Distance`, once a crossing;
    "stop" ends a row that is within the margin by leaving it nothing but the end-of-text token, or raises
    :class:`HoleReached` where there is none.

    A *crossing* is where a sequence comes within the margin, having been outside without its last token; a prompt that
    is within it crosses there. A sequence is its tokens: rows that are still equal, as those that one prompt is
    repeated in for beams or ``num_return_sequences``, are one sequence; once they differ, each is its own, beams too.
    A sequence that leaves the margin and comes back has crossed twice. A prompt that is asked about again begins a new
    generation, in which its crossings are told again.

    Assisted and prompt-lookup decoding ask about candidate tokens before they are kept, more than once; that is still
    one crossing. Candidates of the first round are told of at once, since nothing tells them from ordinary decoding;
    later ones when they are checked, if the scores say that they are kept, or else when the next round shows it. What
    takes a rejected candidate's place isn't told of again.

    ``evidence``: which "[" a ThresholdCounter's k counts. "open": those of the lists that are open; "all": closed
    rows' and comments' too, as the seed's law has it. Real nested lists have a "[" a row, so by "all" they hardly ever
    fail; the experiment ``guard`` measures which of the two foretells a model's failures. Where two lists are open, as
    nearly always, "open" goes by the length alone.
    ``tokenizer``: a scalpel Tokenizer or a fast one of transformers; a transformers model has none of its own.
    ``eos_token_id``, ``pad_token_id``: by default what the model's configuration says. ``attention_mask`` (B, L) of
    the prompts tells the padding on the left exactly; without it, leading ``pad_token_id`` are padding.

    Only a nested list can fail, so a prompt in which fewer than two "[" are open has distance infinity.
    A guard can be pickled if its law and its function can, and goes on with what it has told.
    ValueError for an unknown ``on_failure`` or ``evidence``, a margin that isn't a number, or no tokenizer; TypeError
    for a law that is none, or token ids that aren't integers.
    """

    supports_continuous_batching = False  # rows keep a state from one call to the next

    def __init__(
        self,
        model: Any,
        law: ThresholdCounter | FailureLaw,
        *,
        margin: float = 0,
        on_failure: str | Callable[[Distance], Any] = "warn",
        evidence: str = "open",
        tokenizer: Any = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        if isinstance(law, type) or not isinstance(law, ThresholdCounter | FailureLaw):
            raise TypeError(f"law is {law!r}; give a ThresholdCounter or an object with tokens_left(ids)")
        if not callable(on_failure) and on_failure not in ("warn", "stop"):
            raise ValueError(f"on_failure is {on_failure!r}; allowed: 'warn', 'stop', or a function of the distance")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"margin is {margin!r}; it must be a finite number of tokens")
        if evidence not in ("all", "open"):
            raise ValueError(f"evidence is {evidence!r}; allowed: 'all', 'open'")
        self.law, self.margin, self.on_failure, self.evidence = law, margin, on_failure, evidence
        self.tokenizer = _tokenizer_of(model, tokenizer)
        self.eos = [eos_token_id] if eos_token_id is not None else _special(model, "eos_token_id")
        self.pad = [pad_token_id] if pad_token_id is not None else _special(model, "pad_token_id")
        self.attention_mask = attention_mask
        self.distances: list[Distance | None] = []
        """Each row's distance at the last call; None for a row that is done, or has no token yet."""
        self._crossings = Crossings()
        self._evidence: dict[int, int] = {}

    def distance(self, prompt: str | Sequence[int] | Tensor) -> Distance:
        """The distance of one prompt: text, to which the model's start token is added, or ids as the model gets them.

        ValueError for an empty prompt, or ids of more than one row.
        """
        ids = self._ids(prompt)
        k = sum(self._evidence_of(token) for token in ids)
        left, depth = math.inf, open_lists(self.tokenizer.decode(ids)) if k else 0
        k = depth if self.evidence == "open" else k
        if depth >= LEAST_DEPTH:
            if isinstance(self.law, ThresholdCounter):
                left = float(self.law.critical_length(k) - len(ids))
            else:
                left = float(self.law.tokens_left(ids))
        if math.isnan(left):
            raise ValueError(f"the law gives NaN at k = {k}, n = {len(ids)}; tokens_left must be a number or infinity")
        return Distance(k, len(ids), left, left <= 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, vocabulary) for prompts (B, L): as they are, or with nothing but the end at rows to be stopped."""
        if input_ids.dim() != 2 or scores.dim() != 2 or len(scores) != len(input_ids):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and scores {tuple(scores.shape)}; they must be (B, L) "
                "and (B, vocabulary)"
            )
        starts = self._starts(input_ids)
        rows = [row[start:] for row, start in zip(input_ids.tolist(), starts, strict=True)]
        self.distances = [self.distance(row) if row and not self._done(row) else None for row in rows]
        inside = [found is not None and found.tokens_left <= self.margin for found in self.distances]
        new = self._crossings.new(rows, inside, input_ids, scores)
        for row, found in enumerate(self.distances):
            if found is not None and new[row] and self.on_failure != "stop":
                self._tell(row, found)
        stopped = [row for row, within in enumerate(inside) if within and self.on_failure == "stop"]
        if not stopped or (not self.eos and self._crossings.guessing):
            return scores
        if not self.eos:
            found = self.distances[stopped[0]]
            assert found is not None
            raise HoleReached(found, stopped[0])
        ended = torch.full_like(scores, -math.inf)
        ended[:, self.eos] = 0.0
        which = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
        which[stopped] = True
        return torch.where(which, ended, scores)

    def _tell(self, row: int, found: Distance) -> None:
        if callable(self.on_failure):
            self.on_failure(found)
        else:
            warnings.warn(f"row {row}: {found}; the list may be closed wrongly from there on", stacklevel=3)

    def _ids(self, prompt: str | Sequence[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            vocabulary = self.tokenizer.inner.get_vocab()
            start = [vocabulary[START]] if START in vocabulary else []
            return [*start, *self.tokenizer.encode(prompt)]
        if isinstance(prompt, Tensor) and prompt.dim() != 1:
            raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; give one row at a time")
        try:
            ids = [index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
        except TypeError as error:
            raise TypeError(f"token ids must be integers: {error}") from error
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        return ids

    def _evidence_of(self, token: int) -> int:
        """The "[" in a token; a tokenizer of the bracket task has at most one in each."""
        if token not in self._evidence:
            self._evidence[token] = self.tokenizer.decode([token]).count("[")
        return self._evidence[token]

    def _starts(self, input_ids: Tensor) -> list[int]:
        """Tokens of padding on the left of each row."""
        padding = torch.isin(input_ids, torch.tensor(self.pad, dtype=input_ids.dtype, device=input_ids.device))
        if self.attention_mask is not None:
            mask = self.attention_mask.to(input_ids.device)
            if mask.dim() != 2 or len(input_ids) % len(mask) or mask.shape[1] > input_ids.shape[1]:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; for input_ids of shape {tuple(input_ids.shape)} it "
                    "must have the prompts' rows and length"
                )
            padding = (mask == 0).repeat_interleave(len(input_ids) // len(mask), dim=0)
        return [int(n) for n in padding.long().cumprod(-1).sum(-1)]

    def _done(self, row: Sequence[int]) -> bool:
        return len(row) > 1 and row[-1] in (*self.eos, *self.pad)


def _tokenizer_of(model: Any, given: Any) -> Tokenizer:
    found = given if given is not None else getattr(model, "tokenizer", None)
    found = getattr(found, "backend_tokenizer", found)  # a fast tokenizer of transformers holds a tokenizers.Tokenizer
    if isinstance(found, Tokenizer):
        return found
    if found is not None and hasattr(found, "get_vocab") and hasattr(found, "encode"):
        return Tokenizer(found)
    raise ValueError("the guard counts brackets in text, and the model has no tokenizer; give tokenizer=")


def _special(model: Any, name: str) -> list[int]:
    """A special token's ids by the model's own word; none where it doesn't say."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(holder, name, None)
        if value is None:
            value = getattr(holder, "extra", {}).get(name)
        if value is not None:
            return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return []
