"""The bracket task: it reads real literals correctly, asks long lists at the end of an element, and judges answers."""

import numpy as np
import pytest
import torch

from bracket_fixtures import SOURCES, small_tokenizer
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.tasks.brackets import answer, closers, long_lists, preference, questions_from
from scalpel.tasks.corpus import documents
from scalpel.tasks.literals import literals_of


@pytest.mark.parametrize(
    ("source", "depth", "prompt"),
    [
        ("x = [1, 2]\n", 1, "x = [1, 2"),
        ("    x = [[1, 2],\n         [3, 4]]\n".replace("    x", "x", 1), 2, "x = [[1, 2],\n         [3, 4"),
        ("return_ = [a, [b, -1]]\n", 2, "return_ = [a, [b, -1"),
        ("x = [[1], 2]\n", 1, "x = [[1], 2"),
        ("x = [[[1]]]\n", 3, "x = [[[1"),
        ("assert y == ['é' 'x'][0:1] or [1]\n".replace("é", "e"), 1, "assert y == ['e' 'x'][0:1] or [1"),
    ],
)
def test_literals_are_read(source, depth, prompt):
    (literal,) = literals_of(source)
    assert (literal.depth, literal.prompt) == (depth, prompt)
    assert literal.text == source


@pytest.mark.parametrize(
    "source",
    [
        "x = []\n",
        "x = [1, 2,]\n",
        "x = [1, 2\n]\n",
        "x = f([1])\n",
        "x = [1]  # why\n",
        "x = [a[0]]\n",  # not all closing brackets belong to the list
        "x = a[[1]]\n",
        "x = [1]; y = 2\n",
        "x = [f(1)]\n",
        "x = [[[[1]]]]\n",
        "x = [1\n",
    ],
)
def test_what_is_no_question_is_left_out(source):
    assert list(literals_of(source)) == []


NESTED = """
@d([0])
class A:
    a = [1]
    def f(self, x=[2]):
        try:
            b = [3]
        except E:
            c = [4]
        else:
            d = [5]
        finally:
            e = [6]
        return lambda: [7]
    async def g(self):
        async with h as i:
            j = [8]
        async for k in [9]:
            while l:
                m = [10]
            else:
                n = [11]
match o:
    case [p]:
        q = [12]
    case _:
        if r:
            s = [13]
        elif t:
            u = [14]
        else:
            v = [15]
with w: x = [16]
"""


def test_literals_of_every_statement_are_read_from_the_outside_inwards():
    """The order matters, because it determines what a model was trained on."""
    found = [int(one.leaves[0]) for one in literals_of(NESTED)]
    assert found == [1, 16, 7, 12, 3, 5, 6, 8, 13, 4, 10, 11, 14, 15]


def test_questions_are_distinct_and_of_two_depths():
    literals = [one for s in ("x = [1]\n", "x = [1]\n", "y = [[1]]\n", "z = [[[1]]]\n") for one in literals_of(s)]
    assert questions_from(literals) == [("x = [1", 1), ("y = [[1", 2)]


@pytest.mark.parametrize(("k", "depth"), [(1, 1), (2, 2), (3, 2), (6, 2)])
def test_long_lists_ask_after_each_element(k, depth):
    tokenizer = small_tokenizer()
    lists = long_lists(tokenizer, k, 80, 16, block_size=100, depth=depth, seed=3)
    assert lists.ids.shape == (16, 80)
    assert int(lists.positions.min()) >= 0 and int(lists.positions.max()) < 100
    assert len(set(lists.positions[:, 0].tolist())) > 1
    bracket, comma = tokenizer.single("["), tokenizer.single(", ")
    closed = tokenizer.single("],")
    for row, asked in zip(lists.ids, lists.asked, strict=True):
        for at in asked.tolist():
            assert int((row[: at + 1] == bracket).sum()) == k
            assert int((row[: at + 1] == bracket).sum() - (row[: at + 1] == closed).sum()) == depth
            assert int(row[at]) != comma and (at + 1 == len(row) or int(row[at + 1]) == comma)
    assert torch.equal(lists.n, lists.asked + 1)


def test_long_lists_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="k is 1 at depth 1"):
        long_lists(small_tokenizer(), 1, 80, 4, block_size=100, depth=2)
    with pytest.raises(ValueError, match="more than the context"):
        long_lists(small_tokenizer(), 2, 180, 4, block_size=100)


def _model() -> CircuitGPT:
    config = CircuitGPTConfig(
        block_size=96,
        vocab_size=small_tokenizer().vocab_size,
        n_layer=1,
        n_head=2,
        d_model=16,
        afrac=0.5,
        sink=True,
    )
    model = CircuitGPT(config, seed=4).eval()
    model.tokenizer = small_tokenizer()
    return model


def test_one_pass_gives_what_asking_each_prompt_gives():
    model = _model()
    lists = long_lists(model.tokenizer, 2, 60, 3, block_size=60, seed=0)
    along = preference(model, lists)
    ids = closers(model.tokenizer)
    for i in range(3):
        for j in (0, 5, lists.asked.shape[1] - 1):
            prefix = lists.ids[i, : int(lists.asked[i, j]) + 1]
            logits = model(prefix[None])[0, -1]
            assert along[i, j].item() == pytest.approx((logits[ids.two] - logits[ids.one]).item(), abs=1e-4)


def test_answers_are_judged_by_depth_and_too_long_ones_counted():
    model = _model()
    prompts = [("x = [1, 2", 1), ("x = [[1, 2", 2), ("y = [[3", 2), ("x = [" + "1, " * 60 + "1", 1)]
    answers = answer(model, prompts, max_tokens=30)
    assert answers.skipped_too_long == 1 and len(answers.right) == 3
    assert np.array_equal(answers.right, (answers.preference > 0) == (answers.depth == 2))
    flipped = answer(model, [(t, 3 - d) for t, d in prompts], max_tokens=30)
    assert np.array_equal(flipped.right, ~answers.right)


def test_padding_does_not_change_an_answer():
    model = _model()
    prompts = [("x = [1, 2", 1), ("rows = [[1, 2, 3, 4, 5, 6", 2)]
    together = answer(model, prompts, max_tokens=60).preference
    alone = [answer(model, [p], max_tokens=60).preference[0] for p in prompts]
    assert together == pytest.approx(alone, abs=1e-4)


def since_last_bracket(text):
    """The number of elements between the last bracket, opening or closing, and the question."""
    body = text.rstrip("]\n")
    return body[max(body.rfind("["), body.rfind("]")) + 1 :].strip(" ,\n").count(",") + 1


@pytest.mark.parametrize("cue", ["elements", "since_last_bracket", "head", "one_line", "rows"])
def test_nothing_but_the_brackets_tells_the_depth(cue):
    """In the training text P(depth | cue) is constant, by a chi-square test of independence over 12,000 texts."""
    from itertools import islice

    from scipy.stats import chi2_contingency

    measure = {
        "elements": lambda d: d.elements,
        "since_last_bracket": lambda d: since_last_bracket(d.text),
        "head": lambda d: len(d.text.split("[")[0]),
        "one_line": lambda d: d.text.count("\n") > 1 and d.elements > 4,
        "rows": lambda d: d.elements - since_last_bracket(d.text),
    }[cue]
    counts = np.zeros((3, 12))
    for document in islice(documents(SOURCES, np.random.default_rng(0)), 12_000):
        counts[document.depth - 1, min(int(measure(document)), 11)] += 1
    assert chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue > 0.001


def test_a_text_is_what_its_document_says():
    from itertools import islice

    for document in islice(documents(SOURCES, np.random.default_rng(1)), 500):
        (literal,) = literals_of(document.text)
        assert literal.depth == document.depth
        assert literal.elements == document.elements


def test_the_chi_square_would_notice_a_planted_length():
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(0)
    depth = rng.integers(1, 4, 12_000)
    elements = np.minimum(rng.geometric(1 / (4 + 1.0 * (depth == 1))), 12)
    counts = np.zeros((3, 12))
    np.add.at(counts, (depth - 1, elements - 1), 1)
    assert chi2_contingency(counts).pvalue < 0.001


def test_a_tokenizer_that_splits_the_answers_is_refused():
    import tokenizers

    from scalpel.models.tokenizer import Tokenizer

    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(
        ["x"],
        tokenizers.trainers.BpeTrainer(
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    with pytest.raises(ValueError, match="splits an answer"):
        closers(Tokenizer(plain))
