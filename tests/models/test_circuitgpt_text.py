"""The tokenizer, and text generation."""

import json

import pytest
import tokenizers
import torch

from circuitgpt_cases import BASE, build, one_thread, tokens  # noqa: F401
from scalpel import CircuitGPT, CircuitGPTConfig
from scalpel.models.tokenizer import Tokenizer

TEXTS = ["x = [1, [2, 3]]\n", "def f(a):\n    return a]]\n", "s = 'ünïcödé → 字'\n\n", "[[[]]]\n", " \t"]


@pytest.fixture(scope="module")
def tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    return Tokenizer(inner)


@pytest.fixture
def speaking(tokenizer):
    model = CircuitGPT(CircuitGPTConfig.from_dict(BASE | {"vocab_size": tokenizer.vocab_size, "block_size": 40}))
    model.tokenizer = tokenizer
    return model.eval()


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids)) == text
    assert all(tokenizer.token_to_id(tokenizer.id_to_token(i)) == i for i in ids)


def test_the_tokenizer_travels_with_the_model(speaking, tmp_path):
    speaking.save_pretrained(tmp_path)
    again = CircuitGPT.from_pretrained(tmp_path)
    assert again.tokenizer.encode(TEXTS[2]) == speaking.tokenizer.encode(TEXTS[2])
    speaking.tokenizer = None
    speaking.save_pretrained(tmp_path)
    assert CircuitGPT.from_pretrained(tmp_path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        CircuitGPT.from_pretrained(tmp_path)


def test_single_tokens(tokenizer):
    assert tokenizer.single("=") == tokenizer.token_to_id("=")
    with pytest.raises(ValueError, match="tokens, not one: '='"):
        tokenizer.single("= = =")


def test_bad_text_and_ids_are_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        tokenizer.encode("")
    with pytest.raises(TypeError, match="int"):
        tokenizer.encode(3)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=str(bad)):
            tokenizer.decode([bad])
    with pytest.raises(ValueError, match="one row"):
        tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocabulary"):
        tokenizer.token_to_id("no such token")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_exactly(tokenizer, speaking, side):
    ids, mask = tokenizer.batch(TEXTS, side=side)
    assert ids.shape == mask.shape and ids.dtype == mask.dtype == torch.int64
    logits = speaking(ids, mask)
    for row, text in enumerate(TEXTS):
        real = mask[row].bool()
        assert ids[row][real].tolist() == tokenizer.encode(text)
        alone = speaking(torch.tensor([tokenizer.encode(text)]))[0]
        torch.testing.assert_close(logits[row][real], alone, atol=1e-6, rtol=1e-5)
    with pytest.raises(TypeError):
        tokenizer.batch("text")
    with pytest.raises(ValueError, match="at least one"):
        tokenizer.batch([])
    with pytest.raises(ValueError, match="side"):
        tokenizer.batch(TEXTS, side="both")


def test_a_published_pair_of_files_is_read(tmp_path, tokenizer):
    spelled = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("]", "]"), ("Ġ", "["), ("]]", "Ċ"), ("1", "2"), ("12", "3")]
    vocabulary = {token: i for i, token in enumerate([*spelled, *("".join(pair) for pair in merges)])}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    read = Tokenizer.from_folder(tmp_path, "tinypython_2k")
    assert [read.decode([i]) for i in read.encode("x [12345]]\n")] == ["x", " [", "123", "4", "5", "]]\n"]
    assert Tokenizer.from_folder(tmp_path, "another") is None
    for text in TEXTS:
        assert read.decode(read.encode(text)) == text


# Generation.


def test_greedy_is_the_argmax_loop():
    model = build("like_csp_yolo2")
    ids = tokens(model, batch=2, length=4)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids, 8), expected)
    assert torch.equal(model.generate(ids, 0), ids)


def test_greedy_takes_the_lowest_id_of_equals():
    model = build("plain")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.final_logits_bias.zero_()
        model.final_logits_bias[[4, 9]] = 1.0
    assert model.generate(tokens(model), 2)[:, -2:].tolist() == [[4, 4], [4, 4]]


def test_a_padded_batch_continues_as_its_rows_do():
    model = build("sink")
    ids = tokens(model, batch=2, length=6)
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    together = model.generate(ids, 5, attention_mask=mask)
    assert torch.equal(together[1, 3:], model.generate(ids[1:, 3:], 5)[0])
    with pytest.raises(ValueError, match="left"):
        model.generate(ids, 5, attention_mask=mask.flip(1))


def test_sampling_follows_its_seed_and_top_k():
    model = build("plain")
    ids = tokens(model, batch=8, length=2)
    first = model.generate(ids, 6, temperature=1.0, seed=1)
    assert torch.equal(first, model.generate(ids, 6, temperature=1.0, seed=1))
    assert not torch.equal(first, model.generate(ids, 6, temperature=1.0, seed=2))
    assert torch.equal(model.generate(ids, 6, temperature=2.0, top_k=1), model.generate(ids, 6))
    best = model(ids)[:, -1].topk(3).indices
    new = model.generate(ids, 1, temperature=5.0, top_k=3)[:, -1:]
    assert (best == new).any(-1).all()


def test_sampling_draws_from_the_softmax():
    model = build("plain")
    ids = tokens(model, batch=1, length=3).expand(4000, 3)
    drawn = model.generate(ids, 1, temperature=2.0)[:, -1]
    expected = (model(ids[:1])[0, -1] / 2).softmax(-1)
    counts = torch.bincount(drawn, minlength=13) / 4000
    assert (counts - expected).abs().max() < 0.04


def test_a_stop_token_ends_its_row(speaking):
    model = build("plain")
    ids = tokens(model, batch=3, length=3)
    free = model.generate(ids, 6)
    stop = int(free[0, 4])
    stopped = model.generate(ids, 6, stop=stop)
    for row in range(3):
        new = free[row, 3:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        assert stopped[row, 3 : 3 + end].tolist() == new[: min(end, stopped.shape[1] - 3)]
        assert set(stopped[row, 3 + end :].tolist()) <= {stop}
    assert model.generate(ids[:1], 6, stop=[stop]).shape[1] == 3 + free[0, 3:].tolist().index(stop) + 1
    assert speaking.generate(torch.tensor([[5]]), 3, stop="=").shape[1] <= 4
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(ids, 2, stop="=")


@pytest.mark.parametrize(
    "count, options, says",
    [
        (6, {}, "at most 5"),
        (-1, {}, "max_new_tokens"),
        (1, {"temperature": -1.0}, "temperature"),
        (1, {"temperature": float("nan")}, "temperature"),
        (1, {"top_k": 0}, "top_k"),
        (1, {"attention_mask": torch.ones(1, 2)}, "attention_mask"),
    ],
)
def test_bad_requests_are_refused(count, options, says):
    model = build("plain")
    with pytest.raises(ValueError, match=says):
        model.generate(tokens(model), count, **options)
