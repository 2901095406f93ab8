"""Generation with kept keys and values: against whole passes, and against an implementation of its own in float64."""

import numpy as np
import pytest
import torch

from circuitgpt_cases import BASE, CASES, build, one_thread, tokens  # noqa: F401
from circuitgpt_oracle import forward
from scalpel import CircuitGPT, CircuitGPTConfig
from scalpel.models import hook_recorder
from scalpel.models.circuitgpt.key_values import KeyValueCache

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def cache_of(model, rows, room):
    return KeyValueCache(model.config, rows, room, model.device, model.dtype)


def in_pieces(model, ids, pieces, mask=None):
    """The logits of a text that is read piece by piece, each after the keys and values of those before."""
    past, logits, begin = cache_of(model, *ids.shape), [], 0
    for size in pieces:
        end = begin + size
        logits.append(model(ids[:, begin:end], None if mask is None else mask[:, :end], past=past))
        begin = end
    assert past.length == ids.shape[1]
    return torch.cat(logits, dim=1)


def decided(model, ids, mask, within):
    """(B, L): the tokens before which no choice was nearer than rounding; from a near tie on, anything may differ."""
    clear = torch.ones(ids.shape, dtype=torch.bool)
    for tie in model.near_ties(ids, within, mask):
        if tie.hook != "logits":
            clear[tie.row, tie.token :] = False
    return clear


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_text_in_pieces_has_the_logits_of_the_whole(name, dtype):
    model = build(name, dtype)
    ids = tokens(model, batch=3, length=11)
    pieces = in_pieces(model, ids, (4, 1, 1, 3, 2))
    whole = model(ids)
    clear = decided(model, ids, None, TOLERANCE[dtype])
    assert clear.float().mean() > 0.8
    scale = max(1.0, float(whole.abs().max()))
    assert ((pieces - whole)[clear].abs() < TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("name", ["like_csp_yolo2", "positions_concatenated", "topk_everywhere_relu_residual"])
@torch.no_grad()
def test_the_last_token_has_the_logits_of_a_slow_implementation(name):
    model = build(name)
    ids = tokens(model, batch=1, length=7)
    config = model.config.to_dict()
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    expected, _ = forward(config, weights, ids[0].tolist())
    found = in_pieces(model, ids, (3, 1, 1, 1, 1))[0]
    assert np.abs(found.numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("name", ["sink", "positions_concatenated", "topk_everywhere", "bigram_buffer"])
@torch.no_grad()
def test_padding_on_the_left_is_read_by_nobody(name):
    model = build(name)
    ids = tokens(model, batch=3, length=9)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :1] = 0, 0
    found = in_pieces(model, ids, (5, 1, 1, 2), mask)
    for row, first in enumerate((0, 4, 1)):
        alone = model(ids[row : row + 1, first:])[0]
        assert (found[row, first:] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("shipped", ["bracket-mini", "python-small", "bracket-mini-no-positions"])
def test_the_same_greedy_tokens_with_and_without(shipped):
    model = CircuitGPT.from_pretrained(shipped)
    ids, mask = model.tokenizer.batch(["x = [[1, 2], [3", "y = [4", "z = [[[5, 6], [7]], [8, 9], "], side="left")
    seen = {True: [], False: []}
    out = {}
    for use_cache in (True, False):

        def look(ids, logits, seen=seen[use_cache]):
            seen.append((ids.clone(), logits.clone()))
            return logits

        out[use_cache] = model.generate(ids, 24, attention_mask=mask, processors=[look], use_cache=use_cache)
    assert torch.equal(out[True], out[False])
    whole_mask = torch.cat([mask, torch.ones(3, 24, dtype=mask.dtype)], dim=1)
    clear = decided(model, out[True], whole_mask, 1e-6)
    assert clear.float().mean() > 0.5
    for (kept, kept_logits), (whole, whole_logits) in zip(seen[True], seen[False], strict=True):
        assert torch.equal(kept, whole)
        rows = clear[:, kept.shape[1] - 1]
        assert ((kept_logits - whole_logits)[rows].abs() < 1e-5).all()


def test_every_option_gives_what_whole_passes_give():
    model = build("like_csp_yolo2")
    ids = tokens(model, batch=4, length=3)
    stop = int(model.generate(ids, 2, use_cache=False)[0, 4])

    def ban(ids, logits):
        return logits.index_fill(-1, torch.tensor([1, 2]), -torch.inf)

    for options in (
        {"stop": stop},
        {"temperature": 1.3, "seed": 3},
        {"temperature": 0.7, "top_k": 3, "seed": 1},
        {"processors": [ban]},
    ):
        kept, whole = (model.generate(ids, 8, use_cache=use, **options) for use in (True, False))
        assert torch.equal(kept, whole)


def test_a_step_computes_the_new_tokens_alone():
    model = build("sink")
    ids, lengths = tokens(model, length=4), []
    forward = model.forward

    def counted(new, *arguments, **options):
        lengths.append(new.shape[1])
        return forward(new, *arguments, **options)

    model.forward = counted
    model.__dict__["forward"] = counted
    with pytest.raises(ValueError, match="forward method"):
        model.generate(ids, 3, use_cache=True)  # somebody's own forward may need the whole text
    del model.__dict__["forward"]
    type_forward = CircuitGPT.forward
    try:
        CircuitGPT.forward = lambda self, *arguments, **options: counted(*arguments, **options)
        model.generate(ids, 3)
        assert lengths == [4, 1, 1]
        lengths.clear()
        model.generate(ids, 3, use_cache=False)
        assert lengths == [4, 5, 6]
    finally:
        CircuitGPT.forward = type_forward


def test_what_may_need_the_whole_text_gets_it():
    model = build("topk_everywhere")
    ids = tokens(model, length=4)
    reference = tokens(model, batch=4, length=6, seed=5)
    for kind in ("zero", "mean"):
        with model.ablate(["0.attn.v:1", "1.mlp.post_act"], kind, reference=reference):
            assert torch.equal(model.generate(ids, 6), model.generate(ids, 6, use_cache=False))
            assert not torch.equal(model.generate(ids, 6, use_cache=True), ids)
    with model.ablate("0.attn.v", "resample", reference=reference):
        assert torch.equal(model.generate(ids, 6), model.generate(ids, 6, use_cache=False))
        with pytest.raises(ValueError, match="intervention"):
            model.generate(ids, 6, use_cache=True)
    handle = model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output.flip(1))
    flipped = model.generate(ids, 6)
    with pytest.raises(ValueError, match="has been hooked"):
        model.generate(ids, 6, use_cache=True)
    handle.remove()
    expected = ids
    for _ in range(6):  # by hand, with the same change
        with hook_recorder("nothing", {"1.resid_in": lambda value: value.flip(1)}):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(flipped, expected)
    with hook_recorder("0.attn.k") as recorded:
        out = model.generate(ids, 3)
    assert recorded["0.attn.k"].shape[1] == out.shape[1] - 1


def test_a_cache_takes_the_memory_that_it_says():
    config = CircuitGPTConfig.from_dict(BASE | {"d_head": 7})
    cache = KeyValueCache(config, 5, 9, torch.device("cpu"), torch.float64)
    assert cache.nbytes == 2 * config.n_layer * 5 * 9 * config.n_head * 7 * 8
    assert cache.nbytes == cache._store.untyped_storage().nbytes()


@torch.no_grad()
def test_errors_leave_the_cache_as_it_was():
    model = build("plain")
    ids = tokens(model, batch=1, length=12)
    past = cache_of(model, 1, 12)
    model(ids[:, :10], past=past)
    with pytest.raises(ValueError, match="room for 2 more"):
        model(ids[:, :3], past=past)
    with pytest.raises(ValueError, match=r"10 tokens came before"):
        model(ids[:, 10:], torch.ones(1, 2), past=past)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids[:, 10:], torch.ones(1, 2, 12), past=past)

    def fail(name, value):
        if name == "1.mlp.act_in":
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 10:], past=past, tap=fail)
    assert past.length == 10
    assert (model(ids[:, 10:], past=past) - model(ids)[:, 10:]).abs().max() < 1e-10


@torch.no_grad()
def test_near_ties_are_those_of_a_sort():
    model = build("topk_attn_in")
    ids = tokens(model, batch=4, length=8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    normed = np.sort(model.transformer.h[0].ln_1(x).abs().numpy(), axis=-1)[..., ::-1]
    k = int(0.4 * model.config.d_model)
    margins = normed[..., k - 1] - normed[..., k]
    within = float(np.median(margins))
    expected = {(r, t): margins[r, t] for r in range(4) for t in range(8) if margins[r, t] < within and mask[r, t]}
    found = {(t.row, t.token): t.margin for t in model.near_ties(ids, within, mask) if t.hook == "0.attn.act_in"}
    assert found.keys() == expected.keys() and len(found) > 5
    assert all(abs(found[at] - expected[at]) < 1e-12 for at in found)
    top = np.sort(model(ids, mask).numpy(), axis=-1)
    gaps = top[..., -1] - top[..., -2]
    named = {(t.row, t.token) for t in model.near_ties(ids, 0.3, mask) if t.hook == "logits"}
    assert named == {(r, t) for r in range(4) for t in range(8) if gaps[r, t] < 0.3 and mask[r, t]}


def test_a_choice_among_zeros_is_no_near_tie():
    model = build("topk_mlp_neuron")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.bias.zero_()
    assert not [tie for tie in model.near_ties(tokens(model), 0.1) if tie.hook.endswith("post_act")]
    with pytest.raises(ValueError, match="within is -1"):
        model.near_ties(tokens(model), -1)
