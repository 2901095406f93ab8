"""A safeguard: how far a prompt is from where a law predicts that the answer fails, and a stop before it gets there.

A law of the bracket circuit (:class:`scalpel.semigroup.ThresholdCounter`, or any object with ``tokens_left``) predicts
from a prompt's tokens how many more may follow before the model stops closing a nested list with "]]". The experiment
``guard`` measures how well it predicts that; a guard is as good as its law.
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

from ..hooks.standing import stood_for
from ..models.tokenizer import Tokenizer
from ..semigroup.threshold import ThresholdCounter
from ..tasks.brackets import START
from .crossings import Crossings

__all__ = ["Distance", "FailureLaw", "HoleGuard", "HoleReached", "open_lists"]

LEAST_DEPTH = 2  # a list that a single bracket closes has no evidence that could be diluted
_PAIRS = {")": "(", "]": "[", "}": "{"}
# Strings, comments, brackets. An unclosed string extends to the end of its line, a long one to the end of the text.
_LEXEMES = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\\?\Z)|\'\'\'(?:[^\\]|\\.)*?(?:\'\'\'|\\?\Z)'
    r'|"(?:[^"\\\n]|\\.)*"?|\'(?:[^\'\\\n]|\\.)*\'?|\#[^\n]*|[\[\](){}]',
    re.DOTALL,
)


@runtime_checkable
class FailureLaw(Protocol):
    """Predict how many tokens may follow a prompt before the model's answer fails.

    Any object with this method can serve as the law of a guard.

    Example:
        >>> class ShortContexts:
        ...     def tokens_left(self, ids):
        ...         return 20 - len(ids)
        >>> isinstance(ShortContexts(), scalpel.guard.FailureLaw)
        True
        >>> ShortContexts().tokens_left([0, 65, 221])
        17
    """

    def tokens_left(self, ids: Sequence[int]) -> float:
        """Predict how many tokens may follow a prompt before the answer fails.

        Args:
            ids: The token ids of the prompt, including the start token.

        Returns:
            The number of tokens: 0 or less if the answer fails already, infinity if it never will.
        """


@dataclass(frozen=True)
class Distance:
    """A prompt's distance to the predicted failure region, in tokens.

    Attributes:
        k: The number of "[" that count as evidence, either all or the open ones, as the guard's ``evidence`` says.
        n: The number of keys that are attended to, including the start token.
        tokens_left: How many tokens may follow before the answer fails: 0 or less if it fails already, infinity if no
            nested list is open or the law predicts no failure.
        failing: Whether tokens_left <= 0.
    """

    k: int
    n: int
    tokens_left: float
    failing: bool

    @property
    def critical_length(self) -> float:
        """The length n from which the answer is predicted to fail, if no further evidence follows."""
        return self.n + self.tokens_left

    def __str__(self) -> str:
        if math.isinf(self.tokens_left):
            return f"k = {self.k}, n = {self.n}: no failure is predicted"
        where = "is reached" if self.failing else f"is {self.tokens_left:.0f} tokens away"
        return f"k = {self.k}, n = {self.n}: the predicted critical length {self.critical_length:.0f} {where}"


class HoleReached(RuntimeError):
    """A prompt came within the margin of the predicted failure region, and the row could not be ended otherwise.

    Args:
        distance: The prompt's distance.
        row: The number of the prompt in the batch.
    """

    def __init__(self, distance: Distance, row: int) -> None:
        self.distance, self.row = distance, row
        super().__init__(
            f"row {row}: {distance}. From there on the model is expected to close the list wrongly. Close it earlier "
            "or split it. Pass eos_token_id to end such rows instead, or on_failure='warn' to continue."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.distance, self.row)


def open_lists(text: str) -> int:
    """Count the "[" that are open at the end of Python text, ignoring those in strings and comments.

    A bracket of another kind that is never closed is dropped when a bracket around it is closed. A text that begins
    inside a long string is misread.

    Args:
        text: The text.

    Returns:
        The number of open lists.

    Example:
        >>> scalpel.guard.open_lists("x = [[1, '[', (2")
        2
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
    """Watch a generation for a predicted failure: warn of it, or stop before it.

    A guard is a logits processor of transformers, ``guard(input_ids, scores) → scores``, and can also be passed to
    ``CircuitGPT.generate``. Only a nested list can fail, so a prompt with fewer than two open "[" has an infinite
    distance.

    **Crossings.** A sequence *crosses* where it comes within the margin and was outside without its last token; a
    prompt that is within the margin crosses at once. A sequence is its tokens: equal rows, such as those of one prompt
    repeated for beams or ``num_return_sequences``, are one sequence until they differ. A sequence that leaves the
    margin and comes back has crossed twice. A prompt that appears again begins a new generation, whose crossings are
    reported again.

    **Candidates.** Assisted and prompt-lookup decoding ask about candidate tokens, more than once, before they are
    kept; that still counts as one crossing. Candidates of the first round are reported at once, because nothing
    distinguishes them from ordinary decoding. Later ones are reported when they are checked, if the scores show that
    they are kept, or else when the next round shows it. A token that replaces a rejected candidate is not reported
    again.

    A guard can be pickled if its law and its function can be, and it then remembers what it has reported.

    Args:
        model: A CircuitGPT or a model of transformers, of which only the tokenizer and the special tokens are used.
        law: A ThresholdCounter or a :class:`FailureLaw`.
        margin: How many tokens before the predicted failure the guard acts.
        on_failure: "warn" gives a warning at each crossing. A function is called with the :class:`Distance` at each
            crossing. "stop" ends a row within the margin by allowing only the end-of-text token, and raises
            :class:`HoleReached` if there is no such token.
        evidence: Which "[" are the k of a ThresholdCounter. "open" counts the lists that are open. "all" also counts
            closed rows and comments, as the seed's law does; real nested lists have a "[" per row, so by "all" they
            hardly ever fail. The experiment ``guard`` measures which of the two predicts a model's failures. Two lists
            are open in nearly all cases, so that "open" depends on the length alone.
        tokenizer: A scalpel Tokenizer or a fast tokenizer of transformers, for a model that does not carry one.
        eos_token_id: The end-of-text token; by default that of the model's configuration.
        pad_token_id: The padding token; by default that of the model's configuration.
        attention_mask: The mask (B, L) of the prompts, which identifies padding on the left exactly. Without it,
            leading ``pad_token_id`` count as padding.

    Raises:
        ValueError: If on_failure or evidence is unknown, margin is not a finite number, or there is no tokenizer.
        TypeError: If law is not a law.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> reports = []
        >>> law = scalpel.semigroup.ThresholdCounter("1/8")
        >>> guard = scalpel.HoleGuard(model, law, margin=2, on_failure=reports.append)
        >>> print(guard.distance("x = [[1, 2, 3"))
        k = 2, n = 12: the predicted critical length 16 is 4 tokens away
        >>> ids, mask = model.tokenizer.batch(["x = [[1, 2, 3, 4, 5, 6"])
        >>> out = model.generate(ids, 1, processors=[guard])
        >>> [distance.failing for distance in reports]
        [True]
    """

    supports_continuous_batching = False  # rows carry a state from one call to the next

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
            raise TypeError(f"law is {law!r}; it must be a ThresholdCounter or an object with tokens_left(ids)")
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
        """Each row's distance at the last call; None for a row that has ended, or has no token yet."""
        self._crossings = Crossings()
        self._evidence: dict[int, int] = {}

    def distance(self, prompt: str | Sequence[int] | Tensor) -> Distance:
        """Measure one prompt's distance to the predicted failure region.

        Args:
            prompt: Text, to which the model's start token is added, or token ids as the model receives them.

        Returns:
            The distance.

        Raises:
            ValueError: If the prompt is empty or has more than one row, or the law returns NaN.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> guard = scalpel.HoleGuard(model, scalpel.semigroup.ThresholdCounter("1/8"))
            >>> guard.distance("x = [[1, 2, 3")
            Distance(k=2, n=12, tokens_left=4.0, failing=False)
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
        """Return the scores (B, vocabulary) for prompts (B, L); rows to be stopped can only end."""
        if input_ids.dim() != 2 or scores.dim() != 2 or len(scores) != len(input_ids):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and scores {tuple(scores.shape)}; they must be (B, L) "
                "and (B, vocabulary)"
            )
        starts = self._starts(input_ids)
        rows = [row[start:] for row, start in zip(input_ids.tolist(), starts, strict=True)]
        self.distances = [self.distance(row) if row and not self._done(row) else None for row in rows]
        inside = [distance is not None and distance.tokens_left <= self.margin for distance in self.distances]
        new = self._crossings.new(rows, inside, input_ids, scores)
        for row, distance in enumerate(self.distances):
            if distance is not None and new[row] and self.on_failure != "stop":
                self._report(row, distance)
        stopped = [row for row, within in enumerate(inside) if within and self.on_failure == "stop"]
        if not stopped or (not self.eos and self._crossings.guessing):
            return scores
        if not self.eos:
            distance = self.distances[stopped[0]]
            assert distance is not None
            raise HoleReached(distance, stopped[0])
        ended = torch.full_like(scores, -math.inf)
        ended[:, self.eos] = 0.0
        which = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
        which[stopped] = True
        return torch.where(which, ended, scores)

    def _report(self, row: int, distance: Distance) -> None:
        if callable(self.on_failure):
            self.on_failure(distance)
        else:
            warnings.warn(f"row {row}: {distance}; the list may be closed wrongly from there on", stacklevel=3)

    def _ids(self, prompt: str | Sequence[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            vocabulary = self.tokenizer.inner.get_vocab()
            start = [vocabulary[START]] if START in vocabulary else []
            return [*start, *self.tokenizer.encode(prompt)]
        if isinstance(prompt, Tensor) and prompt.dim() != 1:
            raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; pass one row at a time")
        try:
            ids = [index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
        except TypeError as error:
            raise TypeError(f"token ids must be integers: {error}") from error
        if not ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        return ids

    def _evidence_of(self, token: int) -> int:
        """Count the "[" in a token; a tokenizer of the bracket task has at most one in each."""
        if token not in self._evidence:
            self._evidence[token] = self.tokenizer.decode([token]).count("[")
        return self._evidence[token]

    def _starts(self, input_ids: Tensor) -> list[int]:
        """Count the padding tokens on the left of each row."""
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


def _tokenizer_of(model: Any, tokenizer: Any) -> Tokenizer:
    inner = tokenizer if tokenizer is not None else getattr(stood_for(model), "tokenizer", None)
    inner = getattr(inner, "backend_tokenizer", inner)  # a fast tokenizer of transformers holds a tokenizers.Tokenizer
    if isinstance(inner, Tokenizer):
        return inner
    if inner is not None and hasattr(inner, "get_vocab") and hasattr(inner, "encode"):
        return Tokenizer(inner)
    raise ValueError("the guard counts brackets in text, and the model has no tokenizer; pass tokenizer=")


def _special(model: Any, name: str) -> list[int]:
    """Return the ids of a special token that the model's configuration names, or none."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(holder, name, None)
        if value is None:
            value = getattr(holder, "extra", {}).get(name)
        if value is not None:
            return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return []
