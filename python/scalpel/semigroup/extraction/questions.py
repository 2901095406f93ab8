"""Questions: what does a model answer after a word? Each word is asked only once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import START
from ...tasks.refused import Refused

__all__ = ["INVALID", "NOT_VALID", "FunctionQuestions", "ModelQuestions", "Questions", "Word"]

Word = tuple[int, ...]
INVALID = -1  # the number of the output after a word that is not valid, which is never asked


class _NotValid:
    """Stands for the output after a word that is not valid; it differs from every real output."""

    def __repr__(self) -> str:
        return "not valid"


NOT_VALID = _NotValid()
_TOKENS_AT_ONCE = 16_384


class Questions(ABC):
    """Numbers of ``outputs`` for words over ``letters``. Subclasses answer, and this class remembers the answers.

    ``valid`` says whether a word, given as names, may be asked at all. A word that continues one that is not valid is
    not valid, either.
    """

    def __init__(self, letters: Sequence[str], valid: Callable[[tuple[str, ...]], bool] | None) -> None:
        self.letters = tuple(letters)
        if not self.letters or len(set(self.letters)) != len(self.letters):
            raise ValueError(
                f"alphabet is {list(letters)}; it must hold at least one letter, and the names must differ"
            )
        self._valid = valid
        self._known: dict[Word, int] = {}
        self._validity: dict[Word, bool] = {(): True}
        self.outputs: list[Hashable] = []

    @property
    def asked(self) -> int:
        """The number of different words asked so far."""
        return len(self._known)

    def names(self, word: Word) -> tuple[str, ...]:
        return tuple(self.letters[letter] for letter in word)

    def is_valid(self, word: Word) -> bool:
        """Whether the word and all its prefixes are valid."""
        if self._valid is None:
            return True
        if word not in self._validity:
            self._validity[word] = self.is_valid(word[:-1]) and bool(self._valid(self.names(word)))
        return self._validity[word]

    def ask(self, words: Sequence[Word]) -> np.ndarray:
        """Return the numbers of the outputs after the words, int64 (words,); INVALID after a word that is not valid."""
        new = list(dict.fromkeys(w for w in words if w not in self._known))
        askable = [word for word in new if self.is_valid(word)]
        self._known.update((word, INVALID) for word in new if not self.is_valid(word))
        if askable:
            self._known.update(zip(askable, self._answers(askable), strict=True))
        return np.array([self._known[word] for word in words], dtype=np.int64)

    def output(self, number: int) -> Hashable:
        """Return the output with a number; NOT_VALID for INVALID."""
        return NOT_VALID if number == INVALID else self.outputs[number]

    def longest(self) -> int | None:
        """Return the length of the longest word that can be asked; None without a limit."""
        return None

    @abstractmethod
    def _answers(self, words: Sequence[Word]) -> list[int]:
        """Return the numbers of the outputs after valid words that were not asked before."""


class FunctionQuestions(Questions):
    """Questions to a function that takes a list of words (tuples of names) and returns as many hashable outputs."""

    def __init__(
        self,
        function: Callable[[list[tuple[str, ...]]], Sequence[Hashable]],
        letters: Sequence[str],
        valid: Callable[[tuple[str, ...]], bool] | None = None,
    ) -> None:
        super().__init__(letters, valid)
        self._function = function

    def _answers(self, words: Sequence[Word]) -> list[int]:
        outputs = list(self._function([self.names(word) for word in words]))
        if len(outputs) != len(words):
            raise ValueError(
                f"the function returned {len(outputs)} outputs for {len(words)} words; it must return one per word"
            )
        return [self._number(output) for output in outputs]

    def _number(self, output: Hashable) -> int:
        try:
            hash(output)
        except TypeError:
            raise TypeError(
                f"the function returned {output!r}, which cannot be hashed; return text, numbers or tuples"
            ) from None
        if output != output:
            raise ValueError(
                f"the function returned {output!r}, which is not equal to itself; outputs must be comparable"
            )
        if output not in self.outputs:
            self.outputs.append(output)
        return self.outputs.index(output)


class ModelQuestions(Questions):
    """Questions to a CircuitGPT: the most likely of the answer tokens after prefix, word and suffix.

    ``alphabet`` and ``answers`` map names to texts, or list texts, which are then their own names. Each answer is a
    single token. Letters are encoded one by one.

    Raises:
        Refused: If there is no tokenizer, or it splits an answer.
        ValueError: If there are fewer than two different answers, or a word could be an empty text.
    """

    outputs: list[Hashable]

    def __init__(
        self,
        model: CircuitGPT,
        alphabet: Mapping[str, str] | Sequence[str],
        answers: Mapping[str, str] | Sequence[str],
        *,
        prefix: str = "",
        suffix: str = "",
        valid: Callable[[tuple[str, ...]], bool] | None = None,
    ) -> None:
        texts = dict(alphabet) if isinstance(alphabet, Mapping) else {text: text for text in alphabet}
        super().__init__(list(texts), valid)
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise Refused("the model has no tokenizer; letters and answers are texts, which need one")
        named = dict(answers) if isinstance(answers, Mapping) else {text: text for text in answers}
        if len(named) < 2:
            raise ValueError(f"answers is {list(named)}; a choice needs at least two")
        ids = []
        for name, text in named.items():
            try:
                ids.append(tokenizer.single(text))
            except ValueError as error:
                raise Refused(f"this tokenizer splits the answer {name!r}: {error}") from error
        if len(set(ids)) != len(ids):
            raise ValueError(f"answers {list(named)} are not all different tokens")
        self.model = model
        self.outputs = list(named)
        self.answer_ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        self.shift: torch.Tensor | None = None  # added to the answers' logits before they are compared
        vocabulary = tokenizer.inner.get_vocab()
        start = [vocabulary[START]] if START in vocabulary else []
        self.prefix = [*start, *(tokenizer.encode(prefix) if prefix else [])]
        self.suffix = tokenizer.encode(suffix) if suffix else []
        empty = [name for name, text in texts.items() if not text]
        if empty:
            raise ValueError(f"the letter {empty[0]!r} has no text; every letter needs one")
        self.tokens = [tokenizer.encode(text) for text in texts.values()]
        if not self.prefix and not self.suffix:
            raise ValueError("the empty word would be an empty text; pass a prefix or a suffix")

    def longest(self) -> int:
        room = self.model.config.block_size - len(self.prefix) - len(self.suffix)
        return room // max(map(len, self.tokens))

    def ids(self, word: Word, suffix: bool = True) -> list[int]:
        """Return the word's tokens, including the prefix and the suffix."""
        inner = [token for letter in word for token in self.tokens[letter]]
        return [*self.prefix, *inner, *(self.suffix if suffix else [])]

    def choose(self, logits: torch.Tensor) -> list[int]:
        """Return the numbers of the most likely answers for logits (..., vocab)."""
        scores = logits[..., self.answer_ids].cpu()
        if not bool(torch.isfinite(scores).all()):
            raise Refused("the model's logits of the answers aren't finite, so it has no answer")
        chosen: list[int] = (scores if self.shift is None else scores + self.shift).argmax(-1).tolist()
        return chosen

    @torch.no_grad()
    def answer(self, ids: Sequence[int]) -> Hashable:
        """Return the most likely answer after the token ids of a whole prompt."""
        return self.outputs[
            self.choose(self.model(torch.tensor([list(ids)], dtype=torch.int64, device="cpu"))[:, -1])[0]
        ]

    @torch.no_grad()
    def _answers(self, words: Sequence[Word]) -> list[int]:
        if not self.suffix:
            return self._answers_along(words)
        rows = [self.ids(word) for word in words]
        answers = [0] * len(rows)
        for batch in batches([len(row) for row in rows]):
            padded, last = pad([rows[i] for i in batch])
            logits = self.model(padded)[torch.arange(len(batch), device="cpu"), last]
            for i, answer in zip(batch, self.choose(logits), strict=True):
                answers[i] = answer
        return answers

    def _answers_along(self, words: Sequence[Word]) -> list[int]:
        """Answer for all prefixes of a word in one pass, because without a suffix a causal model allows that."""
        single = all(len(tokens) == 1 for tokens in self.tokens)
        if not single:
            rows = [self.ids(word) for word in words]
            ends = [[len(row) - 1] for row in rows]
            prefixes = [[word] for word in words]
        else:
            inner = {word[:i] for word in words for i in range(len(word))}
            top = [word for word in words if word not in inner]
            rows = [self.ids(word) for word in top]
            ends = [list(range(len(self.prefix) - 1, len(row))) for row in rows]
            prefixes = [[word[:i] for i in range(len(word) + 1)] for word in top]
        answers: dict[Word, int] = {}
        for batch in batches([len(row) for row in rows]):
            padded, _ = pad([rows[i] for i in batch])
            chosen = torch.tensor(self.choose(self.model(padded)), dtype=torch.int64, device="cpu")
            for place, i in enumerate(batch):
                answers.update(zip(prefixes[i], chosen[place, ends[i]].tolist(), strict=True))
        return [answers[word] for word in words]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group the indices of rows of similar length into batches whose memory stays small."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * lengths[i] > _TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right with 0, which causality hides, and return them with each row's last position."""
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device="cpu")
    return padded, torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device="cpu")


def questions_of(
    model: CircuitGPT | Callable[..., Any],
    alphabet: Mapping[str, str] | Sequence[str],
    answers: Mapping[str, str] | Sequence[str] | None,
    prefix: str,
    suffix: str,
    valid: Callable[[tuple[str, ...]], bool] | None,
) -> Questions:
    """Make the questions for a CircuitGPT, or for a function of words."""
    if isinstance(model, CircuitGPT):
        if answers is None:
            raise ValueError("answers is missing: pass the texts, a token each, among which the model chooses")
        return ModelQuestions(model, alphabet, answers, prefix=prefix, suffix=suffix, valid=valid)
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}; it must be a CircuitGPT or a function of words")
    if answers is not None or prefix or suffix:
        raise ValueError("answers, prefix and suffix are for a CircuitGPT; a function returns its outputs itself")
    return FunctionQuestions(model, list(alphabet), valid)
