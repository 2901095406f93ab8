"""scalpel analyze: what is put in front of a text and around it, and which tokens count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from analysis_cases import CIRCUIT, LETTERS, chunk, ids_of, invoke, letters, text_of
from circuitgpt_cases import one_thread  # noqa: F401
from decoder_cases import exact_norms, model_of
from scalpel import CircuitGPT, StreamingCovariance
from scalpel.analysis import analyze, chunks
from scalpel.analysis.source import load
from scalpel.analysis.text import Choice, Text, read_text

transformers = pytest.importorskip("transformers")

BOS, END, USER, SYSTEM = 13, 14, 15, 16
SPECIAL = {"<s>": BOS, "</s>": END, "<user>": USER, "<system>": SYSTEM}
OPENING = "{{ '<system>ba' }}"
PLAIN = "{% for m in messages %}{{ '<user>' + m['content'] + '</s>' }}{% endfor %}"
TRIMMED = "{% for m in messages %}{{ '<user>' + (m['content'] | trim) + '</s>' }}{% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
LENGTH = 6


def fast(template: str | None, bos: str | None = "<s>", adds_bos: bool = False) -> Any:
    inner = letters(13).inner
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if adds_bos:
        inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", END)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>")
    made.chat_template = template
    return made


Folder = Callable[..., Path]


@pytest.fixture
def decoder(tmp_path: Path) -> Folder:
    """Make the folder of a small Llama, with a tokenizer of these arguments."""
    folder = tmp_path / "decoder"
    model_of("llama").save_pretrained(folder, max_shard_size="4KB")

    def make(template: str | None = OPENING + PLAIN, **options: Any) -> Path:
        fast(template, **options).save_pretrained(folder)
        return folder

    return make


def read(folder: Path, text: Path, length: int = LENGTH, **choice: Any) -> Text:
    return read_text(text, load(folder), None, length, Choice(**choice))


def ids_in(text: Text) -> list[list[int]]:
    return [list(piece.ids) for piece in text.chunks]


# ---- what is put in front ------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_stands_in_front_of_each_chunk(decoder: Folder, text: Path, adds_bos: bool) -> None:
    """The chunks keep their length, whether the tokenizer's config or its post-processor says what BOS is."""
    found = read(decoder(bos=None if adds_bos else "<s>", adds_bos=adds_bos), text, prepend_bos=True)
    plain = [LETTERS.index(letter) for letter in text.read_text()]
    assert ids_in(found) == [[BOS, *plain[i : i + 5]] for i in range(0, 40, 5)]
    assert [piece.start for piece in found.chunks] == list(range(0, 40, 5))
    assert found.facts["special tokens"] == "'<s>' (13) in front of each chunk"
    assert found.facts["chat template"] == "not used" and found.facts["tokens that count"] == "all"
    assert found.facts["tokens"] == 40


def test_bos_is_that_of_transformers(decoder: Folder, text: Path) -> None:
    folder = decoder(adds_bos=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids
    assert ids_in(read(folder, text, 41, prepend_bos=True)) == [theirs[:-1]] and theirs[-1] == END


def test_nothing_is_added_unasked(decoder: Folder, text: Path) -> None:
    found = read(decoder(), text)
    assert ids_in(found) == [ids_of(text, i, 6, 6)[0].tolist() for i in range(6)]
    assert found.facts["special tokens"] == "none added" and found.key == {} and found.rows is None
    said = read(decoder(adds_bos=True), text).facts["special tokens"]
    assert said == "none added; the tokenizer itself would add '<s>' (13): see --bos"


def test_bos_is_never_doubled(decoder: Folder, text: Path) -> None:
    """Not at the beginning of a text that has it, and not where a chunk happens to begin with it."""
    text.write_text("<s>abcde" + "fghij" + "<s>klmab" + "<s>cdefg" + "hijkl")
    found = read(decoder(), text, prepend_bos=True)
    a = list(range(13))
    assert ids_in(found) == [
        [BOS, *a[:5]], [BOS, *a[5:10]], [BOS, *a[10:13], *a[:2]], [BOS, *a[2:7]], [BOS, *a[7:12]]
    ]  # fmt: skip
    assert [piece.start for piece in found.chunks] == [0, 6, 11, 17, 23]
    assert found.facts["special tokens"] == "'<s>' (13) in front of each chunk; 3 of 5 had it already"
    text.write_text("<s>abcde")
    said = read(decoder(), text, prepend_bos=True).facts["special tokens"]
    assert said == "none added: each chunk has '<s>' (13) already"


# ---- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 6, 9])
@pytest.mark.parametrize("template", [PLAIN, OPENING + PLAIN, OPENING + TRIMMED, WITH_BOS])
@pytest.mark.parametrize("bos", [False, True])
def test_each_chunk_is_the_beginning_of_a_conversation(
    bos: bool, template: str, length: int, decoder: Folder, tmp_path: Path
) -> None:
    """Its ids are those of transformers for a message with the rest of the text, up to the length."""
    words = "ab cd\n efg  hij <s>klm " + " ".join(text_of(60)) + "\n"
    path = tmp_path / "words.txt"
    path.write_text(words)
    folder = decoder(template)
    if bos and template.startswith(OPENING) and length == 5:
        with pytest.raises(ValueError, match="puts 5 tokens in front of a message, so chunks of 5 have none"):
            read(folder, path, length, chat_template=True, prepend_bos=bos)
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    found = read(folder, path, length, chat_template=True, prepend_bos=bos)
    plain = theirs(words, add_special_tokens=False, return_offsets_mapping=True)
    assert found.facts["tokens"] == len(plain.input_ids) == 73 + 1
    used, front = 0, [BOS] if bos and template != WITH_BOS else []
    for piece in found.chunks:
        assert piece.start == used
        rest = words[plain.offset_mapping[used][0] :]
        conversation = theirs.apply_chat_template([{"role": "user", "content": rest}], return_dict=False)
        assert list(piece.ids) == [*front, *conversation][:length]
        opening = len(front) + len(theirs.apply_chat_template([{"role": "user", "content": ""}], return_dict=False)) - 1
        used += length - opening
    closing = 1
    assert used + closing + opening + length > found.facts["tokens"]  # no whole chunk is left out
    assert found.facts["chat template"].endswith(f"; {opening} of a chunk's {length} tokens stand before the message")
    assert sum(token == BOS for token in found.chunks[0].ids[:2]) == (1 if bos or template == WITH_BOS else 0)
    if bos and template == WITH_BOS:
        assert found.facts["special tokens"] == "none added: each chunk has '<s>' (13) already"
    elif not bos:
        assert found.facts["special tokens"] == "those of the chat template"


def test_a_whole_conversation(decoder: Folder, text: Path) -> None:
    """A text shorter than a chunk says at which length it is analysed with the end of the message."""
    text.write_text("abc")
    folder = decoder()
    with pytest.raises(ValueError, match="has 9 tokens with BOS and the chat template and a chunk needs 12.*length 9"):
        read(folder, text, 12, chat_template=True, prepend_bos=True)
    found = read(folder, text, 9, chat_template=True, prepend_bos=True)
    assert ids_in(found) == [[BOS, SYSTEM, 1, 0, USER, 0, 1, 2, END]]


@pytest.mark.parametrize(
    "template,words",
    [
        (None, "has no chat template: leave out --chat-template"),
        ("{{ raise_exception('only systems') }}", "fails on a single message of the user: TemplateError: only systems"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "fails on a single message of the user: SecurityError"),
        ("{{ messages[0]['content'] | upper }}", "changes the text of a user's message|does not contain the text"),
        ("{{ 'abc' }}", "does not contain the text of a user's message"),
        ("{{ 'abcde' + messages[0]['content'] }}", "puts 5 tokens in front of a message, so chunks of 5 have none"),
        ("{% for m in messages %}{{ m.content", "fails on a single message of the user: TemplateSyntaxError"),
    ],
)
def test_templates_that_are_refused(template: str | None, words: str, decoder: Folder, text: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read(decoder(template), text, 5, chat_template=True)


def test_one_of_several_templates(decoder: Folder, text: Path) -> None:
    folder = decoder({"default": PLAIN, "tools": OPENING + PLAIN})  # type: ignore[arg-type]
    assert read(folder, text, chat_template=True).chunks[0].ids[0] == USER
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has the chat templates tools, and none is named 'default'"):
        read(folder, text, chat_template=True)


def test_no_bos_and_no_template(decoder: Folder, circuit: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no token that begins a text: leave out --bos, write .* bos_token"):
        read(decoder(bos=None), text, prepend_bos=True)
    for option, words in (("prepend_bos", "names no token that begins"), ("chat_template", "without a chat template")):
        with pytest.raises(ValueError, match=words):
            read(circuit, text, **{option: True})
    with pytest.raises(ValueError, match="length is 1; with --bos a chunk needs 2 tokens"):
        read(decoder(), text, 1, prepend_bos=True)
    with pytest.raises(ValueError, match="does not know its BOS token '<s>'"):  # the config has it alone
        read(_without_special(decoder()), text, prepend_bos=True)
    (tmp_path / "alone").mkdir()
    letters(13).save(tmp_path / "alone")
    given = read_text(text, load(circuit), decoder() / "tokenizer.json", LENGTH, Choice(skip_first=1))
    assert given.facts["tokens that count"] == "all but the first token of each chunk"
    with pytest.raises(ValueError, match="names no token that begins"):
        read_text(text, load(decoder()), tmp_path / "alone", LENGTH, Choice(prepend_bos=True))


def _without_special(folder: Path) -> Path:
    letters(13).save(folder)
    return folder


def test_the_users_own_tokenizer_brings_its_own(decoder: Folder, text: Path, tmp_path: Path) -> None:
    fast(WITH_BOS).save_pretrained(tmp_path / "given")
    source = load(decoder(None, bos=None))
    for given in (tmp_path / "given", tmp_path / "given" / "tokenizer.json"):
        found = read_text(text, source, given, LENGTH, Choice(chat_template=True, prepend_bos=True))
        assert found.chunks[0].ids[:2] == (BOS, USER)


# ---- which tokens count --------------------------------------------------------------------------


def dense(model: Any, ids: Tensor, first: int, last: int) -> Tensor:
    """The Jacobian from the input of layer ``first`` to the output of layer ``last``, (L, width, L, width)."""
    layers, seen = model.model.layers, {}

    def residual(x: Tensor) -> Tensor:
        enter = layers[first].register_forward_pre_hook(lambda _, given: (x[None], *given[1:]))
        leave = layers[last].register_forward_hook(lambda _, __, out: seen.update(out=out))
        model(ids, use_cache=False)
        enter.remove()
        leave.remove()
        out = seen["out"]
        return (out[0] if isinstance(out, tuple) else out)[0]

    start = model(ids, output_hidden_states=True).hidden_states[first][0].detach()
    return torch.autograd.functional.jacobian(residual, start)


@pytest.mark.parametrize("stream", [False, True])
def test_jacobians_lead_from_tokens_that_count_to_tokens_that_count(
    stream: bool, decoder: Folder, text: Path, tmp_path: Path
) -> None:
    """Every token is attended to, and so is in the way of the product."""
    text.write_text("ab<user>cdefgh</s>ijk" + text_of(20))
    folder = decoder()
    with exact_norms():
        analyze(
            folder, text, tmp_path / "out", length=LENGTH, chunks=2, tangents=3, stretches=0, untrained=False,
            prepend_bos=True, skip_first=2, skip_special=True, stream=stream,
        )  # fmt: skip
        model = model_of("llama")
        plain = [0, 1, USER, 2, 3, 4, 5, 6, 7, END, 8, 9, 10]
        for number, (begin, counted) in enumerate([(0, [2, 4, 5]), (5, [2, 3, 4])]):
            ids = torch.tensor([[BOS, *plain[begin : begin + 5]]])
            found = chunk(tmp_path / "out", number)
            assert (found["start"], found["tokens"]) == (begin, LENGTH)
            figures = found["trained"]
            states = model(ids, output_hidden_states=True).hidden_states
            for layer in range(3):
                J = dense(model, ids, layer, layer)[counted][:, :, counted].reshape(3 * 12, 3 * 12)
                logs = torch.linalg.svdvals(J).log()[:3]
                np.testing.assert_allclose(figures["layers"]["log_singular_values"][layer], logs, atol=1e-6)
                norm = states[layer][0, counted].norm().log()
                np.testing.assert_allclose(figures["log_norms"][layer], norm, atol=1e-10)
                np.testing.assert_allclose(figures["log_norms_without_first"][layer], norm, atol=1e-10)
            if not stream:
                whole = dense(model, ids, 0, 2)[counted][:, :, counted].reshape(3 * 12, 3 * 12)
                np.testing.assert_allclose(figures["exponents"], torch.linalg.svdvals(whole).log()[:3] / 3, atol=1e-6)


def test_the_frame_of_a_streamed_model_is_that_of_the_model_in_memory(
    decoder: Folder, text: Path, tmp_path: Path
) -> None:
    """A token that is left out between others takes part in the product, as the frame of a causal model shows."""
    text.write_text("ab<user>cdefg</s>ijk" + text_of(20))
    options: dict[str, Any] = {"length": LENGTH, "chunks": 2, "tangents": 4, "prepend_bos": True, "skip_special": True}
    analyze(decoder(), text, tmp_path / "whole", untrained=False, stretches=0, **options)
    analyze(decoder(), text, tmp_path / "streamed", stream=True, **options)
    for i in range(2):
        whole, found = (chunk(tmp_path / name, i)["trained"] for name in ("whole", "streamed"))
        np.testing.assert_allclose(found["frame_growth"], whole["frame_growth"], rtol=1e-7)
        assert found["active"] == {name: value for name, value in whole["active"].items() if name != "final_resid"}
        assert found["layers"]["sizes"] == whole["layers"]["sizes"] == [48] * 3


def test_active_fractions_and_margins_of_the_tokens_that_count(circuit: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"length": CIRCUIT, "chunks": 2, "tangents": 4, "stretches": 0, "untrained": False}
    analyze(circuit, text, tmp_path / "out", skip_first=5, **options)
    model = CircuitGPT.from_pretrained(circuit)
    found = chunk(tmp_path / "out", 1)["trained"]
    _, acts = model.run_with_cache(ids_of(text, 1, CIRCUIT, CIRCUIT))
    assert found["active"] == {name: float((value[:, 5:] != 0).double().mean()) for name, value in acts.items()}
    read_by = model.transformer.h[1].ln_1(acts["1.resid_in"])[0, 5:].abs().sort(descending=True).values.detach().numpy()
    margin = found["margins"]["1.attn.act_in"]
    assert margin["rows"] == CIRCUIT - 5
    np.testing.assert_allclose(margin["median"], np.median(read_by[:, 2] - read_by[:, 3]), rtol=1e-12)


def test_covariances_are_over_the_tokens_that_count(decoder: Folder, text: Path, tmp_path: Path) -> None:
    text.write_text("ab<user>cd</s>" * 12)
    analysis = analyze(
        decoder(), text, tmp_path / "out", length=LENGTH, chunks=1, tangents=2, stretches=9, products=False,
        hooks=r"1\.resid_in(\.grad)?", chat_template=True, skip_special=True, skip_first=2,
    )  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(decoder())
    model = model_of("llama").requires_grad_(True)
    rows: dict[str, list[np.ndarray]] = {"1.resid_in": [], "1.resid_in.grad": []}
    words, at = text.read_text(), 0
    offsets = theirs(words, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for _ in range(9):
        message = [{"role": "user", "content": words[offsets[at][0] :]}]
        ids = theirs.apply_chat_template(message, return_tensors="pt", return_dict=False)[:, :LENGTH]
        found = model(ids, output_hidden_states=True)
        state = found.hidden_states[1]
        state.retain_grad()
        nn.functional.cross_entropy(found.logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        counted = [i for i in range(2, LENGTH) if int(ids[0, i]) not in SPECIAL.values()]
        rows["1.resid_in"].extend(state.detach()[0, counted].numpy())
        assert state.grad is not None
        rows["1.resid_in.grad"].extend(state.grad[0, counted].numpy())
        at += LENGTH - 4  # <system> b a <user> stand before the text
    assert analysis.spectra is not None
    for stream, expected in rows.items():
        state = StreamingCovariance.load(tmp_path / "out" / "states" / "trained" / f"{stream}.safetensors")
        assert state.count == analysis.spectra["trained"][stream]["count"] == len(expected)
        np.testing.assert_allclose(state.covariance(), np.cov(np.array(expected).T, bias=True), atol=1e-6)
    assert "covariances are taken over these" in analysis.notes[1]


def test_a_stop_and_another_choice(
    decoder: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"length": LENGTH, "chunks": 2, "tangents": 2, "stretches": 4, "untrained": False}
    choices: list[dict[str, Any]] = [
        {},
        {"prepend_bos": True},
        {"chat_template": True},
        {"skip_first": 1},
        {"skip_first": 2},
        {"skip_special": True},
        {"chat_template": True, "skip_special": True},
    ]
    folder = decoder()
    for i, choice in enumerate(choices):
        analyze(folder, text, tmp_path / f"{i}", **sizes, **choice)
    monkeypatch.setattr(chunks, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("scalpel.analysis.spectra.collect", lambda *_, **__: pytest.fail("measured again"))
    for i, choice in enumerate(choices):
        analyze(folder, text, tmp_path / f"{i}", **sizes, **choice)
        for j, other in enumerate(choices):
            if i != j:
                with pytest.raises(ValueError, match="bos|chat_template|rows"):
                    analyze(folder, text, tmp_path / f"{i}", **sizes, **other)
    decoder(PLAIN)  # another template in the same folder
    with pytest.raises(ValueError, match="another chat_template"):
        analyze(folder, text, tmp_path / "2", **sizes, **choices[2])


def test_chunks_shrink_to_what_still_has_tokens_that_count(
    decoder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "longer.txt", chunks.measure
    path.write_text(text_of(100))

    def measure(model: Any, ids: Tensor, *rest: Any) -> Any:
        if ids.shape[1] > 15:
            raise MemoryError
        return real(model, ids, *rest)

    monkeypatch.setattr(chunks, "measure", measure)
    options: dict[str, Any] = {"length": 24, "chunks": 2, "tangents": 2, "stretches": 0, "untrained": False}
    analysis = analyze(decoder(), path, tmp_path / "out", skip_first=14, **options)
    assert analysis.shrunk == [{"chunk": 0, "from": 24, "to": 15}]
    with pytest.raises(ValueError, match="memory ran out at chunks of 16 tokens"):
        analyze(decoder(), path, tmp_path / "none", skip_first=15, **options)


def test_choices_that_leave_nothing(decoder: Folder, text: Path, tmp_path: Path) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            analyze(decoder(), text, tmp_path / "out", length=LENGTH, **options)
        assert not (tmp_path / "out").exists()

    refused("skip_first is 6, and a chunk has 6 tokens, so none counts", skip_first=6)
    refused("skip_first is -1; it must be 0 or more", skip_first=-1)
    refused("tangents is 13; 1 tokens of width 12 have 12", skip_first=5, tangents=13)
    text.write_text("abcdef" + "<user></s>" * 3)
    refused("in a chunk of 6 tokens none counts: give a larger --length", skip_special=True)
    text.write_text(text_of(12))
    found = read(_without_special(decoder()), text, skip_special=True)
    assert found.facts["tokens that count"] == "all but special tokens, of which the tokenizer has none"


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_was_done(decoder: Folder, text: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", decoder()
    sizes = ("--text", text, "--length", 8, "--chunks", 2, "--tangents", 2, "--spectra", 3, "--no-untrained")
    done = invoke(folder, *sizes, "--out", out, "--bos", "--chat-template", "--skip-first", 2, "--skip-special")
    assert done.exit_code == 0, done.stderr
    for words in (
        "'<s>' (13) in front of each chunk",
        "all but the first 2 tokens of each chunk and special tokens (4 ids)",
    ):
        assert words in done.stdout, words
    assert "5 of a chunk's 8 tokens stand before the message" in done.stdout
    assert (
        "note: Each chunk is the beginning of a conversation" in done.stderr
        and "note: Tokens that count: all but" in done.stderr
    )
    found = json.loads((out / "analysis.json").read_text())
    chosen = {"prepend_bos": True, "chat_template": True, "skip_first": 2, "skip_special": True}
    assert {name: found["options"][name] for name in chosen} == chosen
    assert found["text"]["special tokens"] == "'<s>' (13) in front of each chunk"
    page = (out / "report.html").read_text()
    for words in (
        "the tokens that count to the tokens that count",
        "<dt>Tokens that count</dt><dd>all but the first 2 tokens of each chunk and special tokens (4 ids)</dd>",
        "<dt>Chat template</dt><dd>the tokenizer&#39;s own",
        "Each chunk is the beginning of a conversation",
        "Tokens that count: all but the first 2",
    ):
        assert words in page, words
    plain = invoke(folder, *sizes, "--out", tmp_path / "plain")
    assert "none added" in plain.stdout and "tokens that count" in plain.stdout and "chat template" not in plain.stdout
    page = (tmp_path / "plain" / "report.html").read_text()
    assert "all tokens to all tokens" in page and "the tokens that count" not in page


def test_the_commands_errors(circuit: Path, text: Path, tmp_path: Path) -> None:
    for option, words in (("--bos", "leave out --bos"), ("--chat-template", "leave out --chat-template")):
        done = invoke(circuit, "--text", text, "--out", tmp_path / "out", option)
        assert done.exit_code == 2 and words in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert invoke(circuit, "--text", text, "--out", tmp_path / "out", "--skip-first", -1).exit_code == 2
