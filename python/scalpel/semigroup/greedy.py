"""Greedy decoding as a map on finitely many states, and how its orbits end: index and period.

The state is the window of the last W tokens, read with positions counted from 0 at its first token. One step appends
the most likely token (of equals, the lowest id) and drops what leaves the window on the left. There are finitely many
windows, so every orbit ends in a cycle. With the real context, which grows, no state ever returns: what repeats is the
text, and its period is only *apparent* (:func:`apparent_period`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.circuitgpt.model import CircuitGPT

__all__ = ["GreedyOrbits", "apparent_period", "brent", "decode", "greedy_orbits"]

NOT_CLOSED = -1
_ROWS = 64  # prompts in one forward pass
_FIRST_LOOK = 16  # steps before the first search for a cycle; their number doubles each time
_REPEATS = 3  # a text repeats if it ends in so many copies of a piece, which are at least half of it


@dataclass(frozen=True)
class GreedyOrbits:
    """How greedy decoding over a sliding window ends, for each prompt.

    Attributes:
        index: int64 (prompts,): the number of steps before the first window that returns, -1 if none did within
            ``steps``.
        period: int64 (prompts,): the number of steps between returns, 0 if it is not known.
        cycles: The tokens that repeat, rotated to the smallest sequence, so that two prompts end in the same cycle iff
            these are equal; empty if the orbit was not seen to return.
        window: The number of tokens in the state.
        steps: The largest number of tokens that were decoded.
    """

    index: np.ndarray
    period: np.ndarray
    cycles: tuple[tuple[int, ...], ...]
    window: int
    steps: int

    @property
    def closed(self) -> np.ndarray:
        """Whether each prompt's orbit was seen to return, bool (prompts,)."""
        closed: np.ndarray = self.period > 0
        return closed

    @property
    def distinct(self) -> int:
        """The number of different cycles in which orbits end."""
        return len({cycle for cycle in self.cycles if cycle})


def brent(state: Callable[[int], Hashable], limit: int) -> tuple[int, int] | None:
    """Find index and period of an orbit: the smallest μ ≥ 0 and λ ≥ 1 with state(μ) = state(μ + λ).

    Brent 1980, "An improved Monte Carlo factorization algorithm", section 2. ``state(t)`` is called for t up to
    ``limit``; if that is not enough, the result is None. 3 · max(μ, λ) ≤ limit always suffices.
    """
    power = period = 1
    slow, fast = 0, 1
    while True:
        if fast > limit:
            return None
        if state(slow) == state(fast):
            break
        if power == period:
            slow, power, period = fast, 2 * power, 0
        fast += 1
        period += 1
    index = 0
    while state(index) != state(index + period):
        index += 1
    return index, period


def greedy_orbits(
    model: CircuitGPT, prompts: Sequence[Sequence[int]], window: int, *, steps: int = 256
) -> GreedyOrbits:
    """Find index and period of greedy decoding over a window of ``window`` tokens, from each prompt (token ids).

    A prompt longer than the window starts with its last ``window`` tokens. A shorter one fills the window first, and
    those steps count in the index. All prompts are decoded together until their orbits are known.

    Raises:
        ValueError: If a prompt is empty or holds an unknown id, or the window exceeds the model's context.
    """
    rows = _checked(model, prompts, window)
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more")
    texts = [row[-window:] for row in rows]
    starts = [len(text) for text in texts]
    ends: list[tuple[int, int] | None] = [None] * len(texts)
    done, look = 0, min(_FIRST_LOOK, steps)
    while done < steps and any(end is None for end in ends):
        still = [i for i, end in enumerate(ends) if end is None]
        for i, text in zip(still, decode(model, [texts[i] for i in still], window, look - done), strict=True):
            texts[i] = text
            ends[i] = brent(_states(text, starts[i], window), look)
        done, look = look, min(2 * look, steps)
    cycles = [
        _least_rotation(text[start + end[0] : start + end[0] + end[1]]) if end else ()
        for text, start, end in zip(texts, starts, ends, strict=True)
    ]
    return GreedyOrbits(
        np.array([end[0] if end else NOT_CLOSED for end in ends], dtype=np.int64),
        np.array([end[1] if end else 0 for end in ends], dtype=np.int64),
        tuple(cycles),
        window,
        steps,
    )


@torch.no_grad()
def decode(model: CircuitGPT, prompts: Sequence[Sequence[int]], window: int, steps: int) -> list[list[int]]:
    """Append ``steps`` tokens to each prompt, each of them the most likely after the last ``window`` tokens.

    If ``window`` is the model's ``block_size`` and the prompts leave room for ``steps``, this decodes with the whole
    context.
    """
    rows = _checked(model, prompts, window)
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS]
        for _ in range(steps):
            for row, token in zip(part, _next(model, [row[-window:] for row in part]), strict=True):
                row.append(token)
    return rows


def apparent_period(text: Sequence[int]) -> tuple[int, int] | None:
    """Find where a text begins to repeat itself up to its end, and the length of the piece; None if it does not.

    The piece is the shortest with at least three copies that make up at least half of the text. The next token could
    still end the repetition: in a context that grows, nothing more can be known.
    """
    tokens = np.asarray(text)
    for period in range(1, len(tokens) // _REPEATS + 1):
        same = tokens[period:] == tokens[:-period]
        differs = np.flatnonzero(~same)
        run = len(tokens) - (int(differs[-1]) + 1 if differs.size else 0)
        if run >= max(_REPEATS * period, len(tokens) / 2):
            return len(tokens) - run, period
    return None


def _next(model: CircuitGPT, rows: list[list[int]]) -> list[int]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows], batch_first=True
    )
    # Causality hides the padding on the right, and without a mask positions count from 0.
    logits: Tensor = model(ids.to(model.device))[torch.arange(len(rows), device="cpu"), lengths - 1]
    likeliest: list[int] = logits.float().cpu().numpy().argmax(-1).tolist()  # numpy takes the first of equal values
    return likeliest


def _states(text: list[int], start: int, window: int) -> Callable[[int], tuple[int, ...]]:
    """Return a function that gives the window after t steps from a prompt of ``start`` tokens."""
    return lambda t: tuple(text[max(0, start + t - window) : start + t])


def _least_rotation(cycle: list[int]) -> tuple[int, ...]:
    return min(tuple(cycle[i:] + cycle[:i]) for i in range(len(cycle)))


def _checked(model: CircuitGPT, prompts: Sequence[Sequence[int]], window: int) -> list[list[int]]:
    if not 1 <= window <= model.config.block_size:
        raise ValueError(f"window is {window}; the model's context holds 1 to {model.config.block_size} tokens")
    rows = [[int(token) for token in prompt] for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("prompts must be one or more, each of at least one token id")
    largest = model.config.vocab_size - 1
    wrong = [token for row in rows for token in row if not 0 <= token <= largest]
    if wrong:
        raise ValueError(f"a prompt holds {wrong[0]}; ids run from 0 to {largest}")
    return rows
