"""HoleGuard with every generation method: it reports each crossing of a sequence once, and "stop" ends at that
place.
"""

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bracket_fixtures import small_tokenizer
from circuitgpt_cases import one_thread
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.guard.crossings import Crossings
from scalpel.guard.hole_guard import Distance, HoleGuard, HoleReached, open_lists
from scalpel.semigroup import ThresholdCounter

transformers = pytest.importorskip("transformers")

__all__ = ["one_thread"]

LAW = ThresholdCounter("1/10")  # two brackets suffice for up to 19 tokens
END, PAD = "~", "^"
PROMPT = "x = [[a, a, a, b, a, a"  # 17 tokens
LENGTH = 24


@cache
def llama(seed: int, layers: int = 1) -> Any:
    tokenizer = small_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.single(END),
        pad_token_id=tokenizer.single(PAD),
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


@cache
def without_brackets() -> list[int]:
    """The tokens that change what is open or end a text. Without them, a text is inside the hole from 20 tokens on."""
    tokenizer = small_tokenizer()
    marks = set("[](){}\"'#\n") | {END, PAD}
    return [i for i in range(tokenizer.vocab_size) if marks & set(tokenizer.decode([i]))]


def batch_of(*texts: str) -> tuple[Tensor, Tensor]:
    ids, mask = small_tokenizer().batch(list(texts), side="left")
    return torch.where(mask == 1, ids, small_tokenizer().single(PAD)), mask


def say(watch: HoleGuard, *texts: str, first: tuple[Any, ...] = (), seed: int = 0, **options: Any) -> Tensor:
    ids, mask = batch_of(*texts)
    options = {"do_sample": False, "suppress_tokens": without_brackets()} | options
    torch.manual_seed(seed)
    return llama(0).generate(
        ids, attention_mask=mask, max_new_tokens=LENGTH, logits_processor=[*first, watch], **options
    )


def guarding(told: list[Distance]) -> HoleGuard:
    return HoleGuard(llama(0), LAW, tokenizer=small_tokenizer(), on_failure=told.append)


def crossings(row: Tensor, prompt: int) -> list[int]:
    """The lengths from ``prompt`` on at which the counter starts to answer no; the guard is never asked about the
    full text.
    """
    inside = [False]
    for n in range(prompt, len(row)):
        k = open_lists(small_tokenizer().decode(row[:n].tolist()))
        inside.append(k >= 2 and not LAW.decide(k, n))
    return [prompt + i for i, (before, now) in enumerate(pairwise(inside)) if now and not before]


SPECULATIVE = {
    "an assistant": lambda: {"assistant_model": llama(1)},
    "an assistant that is always right": lambda: {"assistant_model": copy.deepcopy(llama(0))},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4},
}
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampled": lambda: {"do_sample": True},
    **SPECULATIVE,
    **{f"{name}, sampled": (lambda way=way: way() | {"do_sample": True}) for name, way in SPECULATIVE.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_one_crossing_is_told_once_and_again_in_the_next_generation(way: str) -> None:
    told: list[Distance] = []
    watch = guarding(told)
    prompt = batch_of(PROMPT)[0].shape[1]
    assert prompt < 20
    for count in (1, 2):
        (row,) = say(watch, PROMPT, **WAYS[way]())
        assert crossings(row, prompt) == [20]
        # A sampled candidate that is not the most likely token counts once the next round shows that it was kept.
        assert len(told) == count and {one.n for one in told} <= set(range(20, 26 if "," in way else 21))


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_is_inside_is_told_once(way: str) -> None:
    told: list[Distance] = []
    watch = guarding(told)
    text = PROMPT + ", a, a, a"
    prompt = batch_of(text)[0].shape[1]
    assert prompt > 20
    for count in (1, 2):
        say(watch, text, **WAYS[way]())
        assert [one.n for one in told] == [prompt] * count


@pytest.mark.parametrize("way", WAYS)
def test_stop_ends_where_ordinary_decoding_ends(way: str) -> None:
    watch = HoleGuard(llama(0), LAW, tokenizer=small_tokenizer(), on_failure="stop", margin=1)
    (row,) = say(watch, PROMPT, **WAYS[way]())
    assert row.tolist().index(small_tokenizer().single(END)) == 19 == len(row) - 1
    if "sampled" not in way:
        assert row.equal(say(watch, PROMPT)[0])


@pytest.mark.parametrize("way", WAYS)
def test_stop_without_an_end_token_raises(way: str) -> None:
    watch = HoleGuard(llama(0), LAW, tokenizer=small_tokenizer(), on_failure="stop")
    watch.eos = []
    with pytest.raises(HoleReached, match=r"n = 2[0-5]" if "," in way else "n = 20"):
        say(watch, PROMPT, **WAYS[way]())


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"num_beams": 3}, 3),
        ({"num_beams": 3, "num_return_sequences": 3}, 3),
        ({"num_beams": 3, "do_sample": True}, 3),
        ({"do_sample": True, "num_return_sequences": 4}, 4),
    ],
)
def test_rows_of_one_prompt(options: dict[str, Any], sequences: int) -> None:
    """Sequences that differ are reported separately, and sequences that are still equal once."""
    for text, expected in ((PROMPT, [20] * sequences), (PROMPT + ", a, a, a", [len(batch_of(PROMPT)[0][0]) + 6])):
        told: list[Distance] = []
        watch = guarding(told)
        for count in (1, 2):
            say(watch, text, **options)
            assert [one.n for one in told] == expected * count


def test_prompts_of_several_lengths_cross_each_in_its_time() -> None:
    told: list[Distance] = []
    texts = ("x = [[a, a, a, b, a", "x = [[a", PROMPT + ", a, a, a", "x = [a, a")
    out = say(guarding(told), *texts)
    lengths = batch_of(*texts)[1].sum(1).tolist()
    # The second is 10 tokens behind the first, the third is inside from the start, and the last is not a nested list.
    found = [crossings(row[len(row) - n - LENGTH :], n) for row, n in zip(out, lengths, strict=True)]
    assert found == [[20], [20], [lengths[2]], []]
    assert sorted(one.n for one in told) == [20, 20, lengths[2]]


class Script:
    """A logits processor that makes the model generate a given text after its prompt."""

    def __init__(self, prompt: str, text: str) -> None:
        self.ids = batch_of(prompt + text)[0][0].tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1]
        if bool((scores == 1).all()):
            return scores  # from prompt lookup itself: accept any candidates
        out = torch.full_like(scores, -10.0)
        out[:, self.ids[at] if at < len(self.ids) else small_tokenizer().single(END)] = 10.0
        return out


@pytest.mark.parametrize("way", ["greedy", "prompt lookup"])
def test_a_sequence_that_leaves_and_comes_back_is_told_of_twice(way: str) -> None:
    """Candidates are copied from the prompt and mostly rejected; nested lists open and close in them."""
    prompt, text = "x = [[a, a], [a, b", ", a, b, a, b]]\nx = [[a, b, a, a, b"
    told: list[Distance] = []
    for count in (1, 2):
        options = WAYS[way]() | {"suppress_tokens": None}
        (row,) = say(guarding(told), prompt, first=(Script(prompt, text),), **options)
        assert small_tokenizer().decode(row.tolist()).startswith(prompt + text[:-1])
        expected = crossings(row, batch_of(prompt)[0].shape[1])
        assert len(expected) == 2 and len(told) == 2 * count
        assert [one.n for one in told[-2:]] == expected


def test_our_own_generation() -> None:
    model = threshold_circuit(small_tokenizer(), 0.04, block_size=64)
    told: list[Distance] = []
    watch = HoleGuard(model, LAW, on_failure=told.append)
    ids, mask = small_tokenizer().batch([PROMPT, "x = [[a"], side="left")
    scored: list[int] = []

    def element(_: Tensor, scores: Tensor) -> Tensor:  # commas and elements alternate
        scored.append(len(scores))
        out = torch.full_like(scores, -10.0)
        out[:, small_tokenizer().encode(", a")[len(scored) % 2]] = 10.0
        return out

    for count in (1, 2):
        model.generate(ids, LENGTH, attention_mask=mask, processors=(element, watch))
        assert [one.n for one in told] == [20, 20] * count


# ---- what is reported, call by call ------------------------------------------------------------


def asked(kept: Crossings, row: str, inside: bool, after: str = "", says: str = "", lookup: bool = False) -> bool:
    """Whether the only row of a call is reported. Tokens are letters, and ``after`` are the candidates that follow the
    row.

    The model generates the first letter of ``says``, or otherwise of ``after``.
    """
    whole = torch.tensor([[ord(c) for c in row + after]])
    scores = torch.ones(1, 256) if lookup else torch.arange(256.0)[None] / 256
    scores[0, ord((says or after or "z")[0])] += 0.0 if lookup else 2.0
    return kept.new([[ord(c) for c in row]], [inside], whole[:, : len(row)], scores)[0]


def asked_of(*given: tuple[Any, ...]) -> list[bool]:
    kept = Crossings()
    return [asked(kept, *each) for each in given]


DRAFTS = [("p", False), ("pa", False), ("pab", True)]  # these drafts propose "a", "b" and "c"
CHECKED = [("p", False, "abc"), ("pa", False, "bc"), ("pab", True, "c"), ("pabc", True)]
BUT_A_ALONE_IS_KEPT = [("p", False, "abc"), ("pa", False, "bc", "x"), ("pab", True, "c"), ("pabc", True)]


def test_a_round_of_candidates() -> None:
    assert asked_of(*DRAFTS, *CHECKED) == [False, False, True] + [False] * 4
    # The first drafts look like ordinary decoding, so "b" is reported; its replacement then is not.
    assert asked_of(*DRAFTS, *BUT_A_ALONE_IS_KEPT, ("pax", True), ("paxy", True))[2:] == [True] + [False] * 6
    # The text is still outside where "b" had crossed, so its own crossing is another one.
    assert asked_of(*DRAFTS, *BUT_A_ALONE_IS_KEPT, ("pax", False), ("paxy", True))[-2:] == [False, False]
    proposed = [("pax", False), ("paxy", True), ("pax", False, "y"), ("paxy", True)]
    assert asked_of(*DRAFTS, *BUT_A_ALONE_IS_KEPT, *proposed)[-4:] == [False, False, False, True]


@pytest.mark.parametrize("lookup", [False, True])
def test_later_proposals_are_told_of_when_they_are_kept(lookup: bool) -> None:
    def propose(*rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [(*row, "", "", lookup) for row in rows]

    begun = [*propose(("p", False), ("pa", False)), ("p", False, "ab"), ("pa", False, "b"), ("pab", False)]
    drafts = propose(("pabx", False), ("pabxy", True))
    kept = [("pabx", False, "yz"), ("pabxy", True, "z"), ("pabxyz", True)]
    thrown = [("pabx", False, "yz", "v"), ("pabxy", True, "z"), ("pabxyz", True)]
    assert asked_of(*begun, *drafts, *kept)[5:] == [False] * 3 + [True, False]
    assert not any(asked_of(*begun, *drafts, *thrown, *propose(("pabxv", False))))
    # The scores reject the draft, but sampling kept it, as the next round shows.
    assert asked_of(*begun, *drafts, *thrown, *propose(("pabxyz!", True)))[5:] == [False] * 5 + [True]
    # Ordinary decoding continues without proposals. It is reported at once, or once it is too long to be a proposal.
    plain = [("pabx" + "w" * n, n > 0) for n in range(9)]
    assert asked_of(*begun, *plain)[5:] == [n == (1 if lookup else 5) for n in range(9)]


def test_a_text_whose_tokens_are_known_is_no_candidate() -> None:
    """A prefix of a known longer row without proposals: a caller steps through a text, whatever the model generates."""
    text, steps = "pabcdef", range(1, 7)
    walk = [(text[:n], n > 3, text[n:], "x") for n in steps]
    assert asked_of(*walk, *walk) == [n == 4 for n in steps] * 2


def test_a_prompt_begins_a_generation_and_a_longer_one_goes_on() -> None:
    plain = [("p", False), ("pa", True)]
    assert asked_of(*plain, *plain) == [False, True] * 2
    assert asked_of(*plain, ("pab", True), ("q", True), ("pabc", True)) == [False, True, False, True, False]
    checked = [("p", False, "a"), ("pa", True)]
    assert asked_of(*plain, *checked, *plain, *checked) == [False, True, False, False] * 2


def test_rows_of_one_call() -> None:
    def told(kept: Crossings, rows: list[list[int]], inside: list[bool]) -> list[bool]:
        return kept.new(rows, inside, torch.zeros(len(rows), 9, dtype=torch.long), torch.randn(len(rows), 256))

    kept = Crossings()
    assert told(kept, [[1], [1], [2], []], [True, True, True, False]) == [True, False, True, False]
    assert told(kept, [[1, 5], [1, 6], [2, 5], [7]], [True] * 4) == [False, False, False, True]
    kept = Crossings()
    told(kept, [[1], [1]], [False] * 2)
    assert told(kept, [[1, 5], [1, 6]], [True] * 2) == [True, True]


def test_a_long_watch_keeps_few_prefixes() -> None:
    kept = Crossings()
    assert all(asked(kept, chr(i), True) for i in range(256)) and len(kept._seen) == 256
    for i in range(6000):
        kept.new([[i, 0]], [True], torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 9))
    assert len(kept._seen) == 4096
