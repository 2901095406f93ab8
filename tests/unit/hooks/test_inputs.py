"""Inputs from users: padding on either side, masks of every shape, positions, and inputs that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scalpel
from circuitgpt_cases import build
from decoder_cases import VOCAB, exact_norms, ids_of, model_of
from scalpel.hooks.inputs import Limits, limits_of, positions_after_padding, read_inputs, real_tokens
from scalpel.jacobians.stream import stream_layers

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


TEXT, PADDING = 5, 3
MODELS = ["gpt2", "gpt_neox", "llama", "circuitgpt"]
SIDES = ["left", "right"]


def made(name: str) -> Any:
    return build("like_csp_yolo2") if name == "circuitgpt" else model_of(name)


def text_of(model: Any) -> Tensor:
    return torch.randint(0, 11, (1, TEXT), generator=torch.Generator().manual_seed(1))


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor, slice]:
    """A batch of two texts, one of them padded; the mask; and the place of the first text."""
    filler, other = torch.full((1, PADDING), 7), torch.randint(0, 11, (1, TEXT + PADDING))
    blank, full = torch.zeros_like(filler), torch.ones_like(ids)
    if side == "left":
        first, mask, where = torch.cat([filler, ids], 1), torch.cat([blank, full], 1), slice(PADDING, None)
    else:
        first, mask, where = torch.cat([ids, filler], 1), torch.cat([full, blank], 1), slice(0, TEXT)
    return torch.cat([first, other]), torch.cat([mask, torch.ones_like(mask)]), where


def four_dimensional(mask: Tensor, kind: str) -> Tensor:
    """The same mask as a causal mask (B, 1, L, L), as a user of transformers would write it."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    if kind == "itself":
        return allowed | torch.eye(length, dtype=torch.bool)
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # otherwise the softmax of padding queries would be 0 / 0
    if kind == "bool":
        return allowed
    lowest = torch.finfo(torch.float64).min
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)


# ---- padding never changes a text's values -------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_text_has_the_jacobian_that_it_has_alone(name: str, side: str) -> None:
    model = made(name)
    ids = text_of(model)
    batch, mask, where = padded(ids, side)
    alone = scalpel.jacobian(model, ids, "0.resid_in", "final_resid")
    J = scalpel.jacobian(model, {"input_ids": batch, "attention_mask": mask}, "0.resid_in", "final_resid")
    torch.testing.assert_close(J.primal[:1, where], alone.primal, rtol=1e-5, atol=1e-6)
    tangents = torch.randn(3, *alone.source_shape, dtype=alone.dtype)
    wide = torch.zeros(3, *J.source_shape, dtype=alone.dtype)
    wide[:, :1, where] = tangents
    torch.testing.assert_close(J.jvp(wide)[:, :1, where], alone.jvp(tangents), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_text_is_collected_as_it_is_alone(name: str, side: str) -> None:
    model = made(name)
    ids = text_of(model)
    batch, mask, _ = padded(ids, side)
    hooks = ["1.resid_in", "1.resid_in.grad"]
    found = scalpel.collect(model, [{"input_ids": batch[:1], "attention_mask": mask[:1]}], hooks, progress=False)
    alone = scalpel.collect(model, [ids], hooks, progress=False)
    for hook in hooks:
        assert found[hook].count == TEXT
        torch.testing.assert_close(found[hook].covariance(), alone[hook].covariance(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_lyapunov_of_a_padded_text(side: str) -> None:
    model = model_of("gpt2")
    ids = text_of(model)
    batch, mask, where = padded(ids, side)
    batch, mask = batch[:1], mask[:1]
    at = list(range(TEXT + PADDING))[where]
    alone = scalpel.lyapunov(model, ids, 2).exponents
    found = scalpel.lyapunov(model, batch, 2, attention_mask=mask, positions=at).exponents
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("side", SIDES)
def test_a_streamed_padded_text(side: str, tmp_path: Path) -> None:
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    ids = text_of(model)
    batch, mask, where = padded(ids, side)
    for layer, alone in zip(
        stream_layers(tmp_path, batch, attention_mask=mask), stream_layers(tmp_path, ids), strict=True
    ):
        torch.testing.assert_close(layer.after[:1, where], alone.after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["itself", "added", "bool"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mask_with_an_axis_for_queries(name: str, side: str, kind: str) -> None:
    model = made(name)
    ids = text_of(model)
    batch, mask, where = padded(ids, side)
    given = {"input_ids": batch, "attention_mask": four_dimensional(mask, kind)}
    found = scalpel.collect(model, [given], ["1.resid_in", "1.resid_in.grad"], progress=False)
    other = scalpel.collect(
        model, [{"input_ids": batch, "attention_mask": mask}], ["1.resid_in", "1.resid_in.grad"], progress=False
    )
    if kind == "itself":  # a token that reads itself is not padding
        assert found["1.resid_in"].count == 2 * (TEXT + PADDING)
        return
    for hook, state in found.items():
        assert state.count == 2 * TEXT + PADDING
        torch.testing.assert_close(state.covariance(), other[hook].covariance(), rtol=1e-6, atol=1e-9)
    alone = scalpel.jacobian(model, ids, "0.resid_in", "final_resid")
    J = scalpel.jacobian(model, given, "0.resid_in", "final_resid")
    torch.testing.assert_close(J.primal[:1, where], alone.primal, rtol=1e-6, atol=1e-8)


def test_a_circuitgpts_mask_with_an_axis_for_queries() -> None:
    model = made("circuitgpt")
    ids = text_of(model)
    for side in SIDES:
        batch, mask, where = padded(ids, side)
        allowed = torch.ones(TEXT + PADDING, TEXT + PADDING, dtype=torch.bool).tril() & mask.bool()[:, None, :]
        torch.testing.assert_close(model(batch, allowed)[:1, where], model(ids), rtol=1e-5, atol=1e-6)
        found = scalpel.collect(model, [{"input_ids": batch, "attention_mask": allowed}], ["1.resid_in"])
        assert found["1.resid_in"].count == 2 * TEXT + PADDING


def test_which_tokens_are_real() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert real_tokens(ids, causal[None, None]).all(), "every token of a plain causal mask"
    assert real_tokens(ids, torch.ones(1, 1, 4, 4)).all(), "every token where all read all"
    packed = torch.block_diag(causal[:2, :2].int(), causal[:2, :2].int())[None]
    assert real_tokens(ids, packed).all(), "two texts packed into one row"
    right = causal & torch.tensor([1, 1, 0, 0]).bool()
    assert real_tokens(ids, right[None]).tolist() == [[True, True, False, False]] * 2
    both = torch.stack([right, causal])[:, None]
    assert real_tokens(ids, both).tolist() == [[True, True, False, False], [True] * 4]
    one_query = torch.ones(4, 4, dtype=torch.bool)
    one_query[3, :2] = False
    assert real_tokens(ids, one_query[None]).all(), "one query that may not read two tokens"
    assert real_tokens(ids, one_query[None, None]).all()
    kinds = {"full_attention": both, "sliding_attention": None}
    assert torch.equal(real_tokens(ids, kinds), real_tokens(ids, both))


def test_positions_follow_leading_padding_alone() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    found = positions_after_padding(real)
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert positions_after_padding(real[1:2]) is None


def test_a_model_that_counts_positions_itself_is_left_to_it() -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config).double().eval()
    ids = torch.randint(2, VOCAB, (1, TEXT))
    batch = torch.cat([torch.ones(1, PADDING, dtype=torch.int64), ids], 1)
    place = "roberta.encoder.layer.1"
    alone = scalpel.collect(model, [ids], [place], progress=False)[place]
    left = scalpel.collect(model, [{"input_ids": batch, "attention_mask": (batch != 1).long()}], [place])[place]
    assert left.count == TEXT
    torch.testing.assert_close(left.covariance(), alone.covariance(), rtol=1e-6, atol=1e-9)
    assert limits_of(model).context == 18  # two positions are reserved for padding


# ---- what is refused -----------------------------------------------------------------------------

Call = Callable[[Any, Any], Any]
PATHS = ("transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj")  # the rules do not know the first
FUNCTIONS: dict[str, Call] = {
    "jacobian by rules": lambda model, given: scalpel.jacobian(model, given),
    "jacobian by torch.func": lambda model, given: scalpel.jacobian(model, given, *PATHS),
    "lyapunov": lambda model, given: scalpel.lyapunov(model, given, 1),
    "collect": lambda model, given: scalpel.collect(model, [given], ["0.resid_in"], progress=False),
}
BAD: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "a list": ([[1, 2, 3]], TypeError, ["list", "int64 tensor", "(batch, length)"]),
    "a text": ("some text", TypeError, ["str", "int64 tensor"]),
    "one dimension": (torch.tensor([1, 2, 3]), ValueError, ["(3,)", "(batch, length)", "input_ids[None]"]),
    "floating point": (torch.ones(1, 3), TypeError, ["torch.float32", "int64"]),
    "nothing": (torch.zeros(1, 0, dtype=torch.int64), ValueError, ["empty", "(1, 0)"]),
    "beyond the vocabulary": (torch.tensor([[1, VOCAB]]), ValueError, [str(VOCAB), f"0 to {VOCAB - 1}", "tokenizer"]),
    "below zero": (torch.tensor([[1, -1]]), ValueError, ["-1", f"0 to {VOCAB - 1}"]),
    "too long": (torch.zeros(1, 17, dtype=torch.int64), ValueError, ["17", "16", "shorten"]),
    "a mask of another shape": (
        {"input_ids": ids_of(1, 4), "attention_mask": torch.ones(1, 5)},
        ValueError,
        ["(1, 5)", "(1, 4)"],
    ),
    "a mask of other numbers": (
        {"input_ids": ids_of(1, 4), "attention_mask": torch.tensor([[0, 1, 2, 1]])},
        ValueError,
        ["attention_mask", "2", "zeros"],
    ),
    "positions of another shape": (
        {"input_ids": ids_of(1, 4), "position_ids": torch.arange(3)},
        ValueError,
        ["position_ids", "(3,)", "4 positions"],
    ),
    "positions beyond the context": (
        {"input_ids": ids_of(1, 4), "position_ids": torch.arange(13, 17)},
        ValueError,
        ["position_ids", "16", "0 to 15"],
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_inputs_are_refused_in_the_same_words_everywhere(function: str, bad: str) -> None:
    given, kind, words = BAD[bad]
    with pytest.raises(kind) as caught:
        FUNCTIONS[function](model_of("gpt2"), given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", ["a list", "one dimension", "beyond the vocabulary", "too long"])
def test_a_circuitgpt_and_a_stream_refuse_them_as_well(bad: str, tmp_path: Path) -> None:
    given, kind, _ = BAD[bad]
    model = build("plain")
    limit = model.config.block_size
    given = torch.zeros(1, limit + 1, dtype=torch.int64) if bad == "too long" else given
    for call in (model, lambda ids: scalpel.jacobian(model, ids), lambda ids: scalpel.collect(model, [ids], ".*")):
        with pytest.raises(kind, match="input_ids|the text has"):
            call(given)
    model_of("gpt2").save_pretrained(tmp_path)
    with pytest.raises(kind, match="input_ids|the text has"):
        list(stream_layers(tmp_path, BAD[bad][0]))


def test_what_a_batch_may_hold_besides() -> None:
    model = made("circuitgpt")
    ids = text_of(model)
    batch = {"input_ids": ids, "token_type_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    plain = scalpel.jacobian(model, ids).primal
    assert torch.equal(scalpel.jacobian(model, batch).primal, plain)
    for function in (scalpel.jacobian, lambda m, given: scalpel.collect(m, [given], ["0.resid_in"])):
        with pytest.raises(ValueError, match="pixel_values.*input_ids"):
            function(model, batch | {"pixel_values": ids})
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        scalpel.jacobian(model, batch, attention_mask=torch.ones_like(ids))


def test_int32_ids_and_batches_in_inference_mode() -> None:
    model = model_of("llama")
    with torch.inference_mode():
        ids = ids_of()
    expected = scalpel.jacobian(model, ids_of()).primal
    assert torch.equal(scalpel.jacobian(model, ids.int()).primal, expected)
    found = read_inputs({"input_ids": ids, "attention_mask": None}, Limits(VOCAB))
    assert found.real is None
    assert not found.ids.is_inference()
