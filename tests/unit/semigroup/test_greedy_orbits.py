"""Greedy decoding on models with a table of next tokens, for which index and period are known."""

import numpy as np
import pytest
import torch

from scalpel import CircuitGPT
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.semigroup.greedy import apparent_period, brent, decode, greedy_orbits


def follows(successor, block_size=16, **options):
    """A model in which ``successor[i]`` always follows token i."""
    config = CircuitGPTConfig(
        block_size=block_size,
        vocab_size=len(successor),
        n_layer=1,
        n_head=1,
        d_head=4,
        d_model=4,
        d_mlp=4,
        enable_bigram_table=True,
        tied_unembed=False,
        **options,
    )
    model = CircuitGPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.bigram_table[torch.arange(len(successor)), torch.tensor(successor)] = 1.0
    return model


# 0 → 1 → 2 → 3 → 4 → 2 has a tail of two and a cycle of three; 5 → 5; 6 → 7 → 6.
SUCCESSOR = [1, 2, 3, 4, 2, 5, 7, 6]


@pytest.mark.parametrize(("index", "period"), [(0, 1), (0, 7), (5, 1), (3, 4), (40, 9), (9, 40)])
def test_brent_on_a_known_orbit(index, period):
    asked = []

    def state(t):
        asked.append(t)
        return t if t < index else index + (t - index) % period

    limit = 3 * max(index, period, 1)
    assert brent(state, limit) == (index, period)
    assert max(asked) <= limit
    assert brent(state, index + period - 1) is None  # no state has repeated yet


def test_index_and_period_of_a_table():
    found = greedy_orbits(follows(SUCCESSOR), [[0], [5], [6], [3, 5], [7]], window=1)
    assert found.index.tolist() == [2, 0, 0, 0, 0]
    assert found.period.tolist() == [3, 1, 2, 1, 2]
    assert found.cycles == ((2, 3, 4), (5,), (6, 7), (5,), (6, 7))
    assert found.distinct == 3 and found.closed.all()


def test_a_longer_window_first_has_to_forget():
    # The window contains the prompt until it has moved out, which takes four more steps than the tokens alone.
    found = greedy_orbits(follows(SUCCESSOR), [[0], [0, 0, 0, 0, 0]], window=5)
    assert found.index.tolist() == [6, 6] and found.period.tolist() == [3, 3]


def test_no_cycle_within_the_steps_is_said():
    ring = [(i + 1) % 40 for i in range(40)]
    found = greedy_orbits(follows(ring), [[0], [7]], window=1, steps=39)
    assert found.index.tolist() == [-1, -1] and found.period.tolist() == [0, 0]
    assert found.distinct == 0 and not found.closed.any()
    assert greedy_orbits(follows(ring), [[0]], window=1, steps=120).period.tolist() == [40]


def test_the_window_is_read_with_positions_from_zero():
    torch.manual_seed(0)
    model = follows(SUCCESSOR, block_size=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0)
    text = decode(model, [[1, 2, 3]], window=4, steps=9)[0]
    assert len(text) == 12  # longer than the context of 8
    for t in range(3, 12):
        window = torch.tensor([text[max(0, t - 4) : t]])
        assert text[t] == int(model(window)[0, -1].argmax())


def test_ragged_prompts_are_decoded_as_alone():
    torch.manual_seed(1)
    model = follows(list(range(8)), block_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0)
    prompts = [[1], [2, 3, 4, 5], [6, 7]]
    assert decode(model, prompts, 6, 8) == [decode(model, [prompt], 6, 8)[0] for prompt in prompts]
    assert prompts == [[1], [2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([9, 8] + [1, 2, 3] * 4, (2, 3)),
        ([5] * 12, (0, 1)),
        (list(range(20)), None),
        (list(range(20)) + [1, 2] * 3, None),  # repeats in too little of the text
        ([1, 2, 3] * 4 + [9], None),  # the repetition has ended
    ],
)
def test_apparent_period(text, expected):
    assert apparent_period(text) == expected


@pytest.mark.parametrize(
    ("prompts", "window", "words"),
    [([[0]], 17, "context holds"), ([[0]], 0, "context"), ([[]], 4, "at least one"), ([[99]], 4, "ids run")],
)
def test_bad_input(prompts, window, words):
    with pytest.raises(ValueError, match=words):
        greedy_orbits(follows(SUCCESSOR), prompts, window)


def test_types():
    found = greedy_orbits(follows(SUCCESSOR), [[0]], window=2)
    assert found.index.dtype == np.int64 and found.period.dtype == np.int64
