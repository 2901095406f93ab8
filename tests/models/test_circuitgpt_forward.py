"""The forward pass against the slow oracle, and padded batches against single prompts."""

import pytest
import torch

import circuitgpt_oracle as oracle
from circuitgpt_cases import CASES, build, one_thread, tokens  # noqa: F401
from scalpel.lanes import SparseWeight
from scalpel.models.circuitgpt.attention import allowed_keys
from scalpel.models.circuitgpt.layers import LayerInputs
from scalpel.models.fresh import sinusoids


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_hook_equal_the_oracle(name):
    model = build(name)
    ids = tokens(model)
    logits, acts = model.run_with_cache(ids)
    assert list(acts) == model.hook_names
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    for row in range(len(ids)):
        expected, hooks = oracle.forward(model.config.to_dict(), weights, ids[row].tolist())
        torch.testing.assert_close(logits[row], torch.from_numpy(expected), atol=1e-9, rtol=1e-9)
        assert hooks.keys() == acts.keys()
        for hook, value in hooks.items():
            torch.testing.assert_close(acts[hook][row], torch.from_numpy(value), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["plain", "sink", "positions_concatenated", "like_csp_yolo2", "relu_residual"])
def test_padding_changes_nothing(name, side, dtype, atol):
    model = build(name, dtype)
    ids = tokens(model, batch=4, length=9)
    lengths = [9, 1, 4, 6]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(9 - length, 9)] = 1
    together = model(ids, attention_mask=mask)
    other = model(torch.where(mask.bool(), ids, (ids + 5) % model.config.vocab_size), attention_mask=mask)
    for row in range(4):
        real = mask[row].bool()
        alone = model(ids[row][real][None])[0]
        torch.testing.assert_close(together[row][real], alone, atol=atol, rtol=atol)
        assert torch.equal(together[row][real], other[row][real])  # the contents of the padding do not matter


def test_a_mask_of_pairs_deletes_keys_for_one_query():
    model = build("plain")
    ids = tokens(model, batch=1, length=6)
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    mask[0, 5, :2] = False
    logits, free = model(ids, attention_mask=mask), model(ids)
    torch.testing.assert_close(logits[0, :5], free[0, :5], atol=1e-12, rtol=0)
    assert (logits[0, 5] - free[0, 5]).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(CASES))
def test_the_fused_attention_is_the_differentiable_one(name):
    model = build(name)
    ids = tokens(model, batch=3)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, :2] = 0, 0
    pairs = torch.rand(3, ids.shape[1], ids.shape[1], generator=torch.Generator().manual_seed(1)) < 0.7
    for given in (None, mask, pairs):
        slow = model(ids, attention_mask=given).detach()
        with torch.no_grad():
            fast = model(ids, attention_mask=given)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def sparse(model, density):
    """The same model with most weights of its blocks set to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name and parameter.dim() == 2:
                parameter *= torch.rand(parameter.shape) < density
    return model


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("name", ["plain", "like_csp_yolo2", "positions_concatenated", "no_bias"])
def test_visiting_non_zeros_only_changes_nothing(name, density, monkeypatch):
    model = sparse(build(name), density)
    ids = tokens(model)
    calls = []
    forward = SparseWeight.forward
    monkeypatch.setattr(
        SparseWeight, "forward", lambda self, *given: calls.append(self.density) or forward(self, *given)
    )
    expected, hooks = model.run_with_cache(ids)
    assert not calls  # gradients are on, so the dense path runs
    with torch.no_grad():
        logits, acts = model.run_with_cache(ids)
    assert len(calls) >= 4 * model.config.n_layer if density < 0.1 else not calls
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    for hook, value in hooks.items():
        torch.testing.assert_close(acts[hook], value, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("how", ["in place", "through .data", "another parameter", "load_state_dict"])
def test_the_sparse_copy_follows_the_weights(how):
    model, other = sparse(build("like_csp_yolo2"), 0.05), sparse(build("like_csp_yolo2", seed=1), 0.05)
    ids = tokens(model)
    with torch.no_grad():
        before = model(ids)
        for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if how == "in place":
                mine.copy_(theirs)
            elif how == "through .data":
                mine.data.copy_(theirs)
        if how == "another parameter":
            for mine, theirs in zip(model.modules(), other.modules(), strict=True):
                for name, parameter in theirs.named_parameters(recurse=False):
                    setattr(mine, name, torch.nn.Parameter(parameter.clone()))
        elif how == "load_state_dict":
            model.load_state_dict(other.state_dict())
        assert torch.equal(model(ids), other(ids))
        assert not torch.equal(model(ids), before)


def test_forward_derivatives_exist_without_grad_mode():
    """The fused kernel has no forward derivative, so it must not be used under forward differentiation."""
    model = build("sink") if "sink" in CASES else build(next(iter(CASES)))
    ids = tokens(model)
    add = torch.zeros(*ids.shape, model.config.d_model, dtype=model.dtype)
    tangent = torch.ones_like(add)

    def logits(delta):
        return model(ids, tap=lambda name, value: value + delta if name == "0.resid_in" else value)

    with torch.no_grad():
        _, with_grad_off = torch.func.jvp(logits, (add,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(add, tangent)
            by_dual_numbers = torch.autograd.forward_ad.unpack_dual(logits(dual)).tangent
    finite = (logits(1e-6 * tangent) - logits(-1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(with_grad_off, by_dual_numbers)
    torch.testing.assert_close(with_grad_off, finite, rtol=1e-4, atol=1e-6)


def test_sinusoids_reach_from_four_tokens_to_the_context():
    table = sinusoids(64, 6)
    assert table.shape == (64, 6)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(table[4, 0], torch.tensor(0.0), atol=1e-5, rtol=0)  # period 4
    torch.testing.assert_close(table[32, 5], torch.tensor(-1.0), atol=1e-5, rtol=0)  # period 64
    assert torch.equal(sinusoids(64, 5)[:, 4], torch.zeros(64))  # an odd number: the last column is padding
    assert sinusoids(64, 1).shape == (64, 1)


@pytest.mark.parametrize(
    "ids, error, says",
    [
        (torch.zeros(1, 13, dtype=torch.int64), ValueError, "context holds 12"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "empty"),
        (torch.tensor([[3, 13]]), ValueError, "13; ids run from 0 to 12"),
        (torch.tensor([[3, -1]]), ValueError, "-1"),
        (torch.tensor([1, 2]), ValueError, r"\(batch, length\)"),
        (torch.zeros(1, 2), TypeError, "float32"),
        ([[1, 2]], TypeError, "list"),
    ],
)
def test_bad_ids_are_refused(ids, error, says):
    with pytest.raises(error, match=says):
        build("plain")(ids)


def test_bad_masks_and_positions_are_refused():
    model = build("plain")
    ids = tokens(model)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.arange(7) + 6)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.arange(7) - 1)
    shifted = model(ids, position_ids=torch.arange(7) + 2)
    assert not torch.equal(shifted, model(ids))


@pytest.mark.parametrize("name", [name for name in CASES if name != "no_layer"])
def test_a_layer_gives_some_rows_and_may_overwrite_what_it_made(name: str) -> None:
    """Only the wanted rows, in memory that is used again, are what the whole pass has there; so is each later stage."""
    model = build(name)
    ids = tokens(model, 2, 6)
    rows = torch.tensor([5, 1, 3])
    concatenated = model.config.d_pos_emb is not None
    with torch.no_grad():
        logits, values = model.run_with_cache(ids)
        layer = LayerInputs(
            "0",
            tap=lambda hook, value: value,
            allowed=allowed_keys(ids, None)[rows],
            positions=model.transformer.wpe.weight[:6] if concatenated else None,
            rows=rows,
            overwrite=True,
        )
        block, at = model.transformer.h[0], {hook: value.clone() for hook, value in values.items()}
        after = values[model.hook_names[11]][:, rows]
        before, middle = at["0.resid_in"][:, rows], at["0.resid_mid"][:, rows]
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(block(at["0.resid_in"], layer), after, **close)
        attention = block.attn.from_product(block.attn.c_proj(at["0.attn.y"][:, rows]), layer)
        torch.testing.assert_close(block.from_attention(before, attention, layer), after, **close)
        torch.testing.assert_close(block.from_middle(middle.clone(), layer), after, **close)
        written = block.mlp.from_product(block.mlp.c_proj(at["0.mlp.post_act"][:, rows]), layer)
        torch.testing.assert_close(block.from_mlp(middle, written, layer), after, **close)
        assert all(torch.equal(at[hook], values[hook]) for hook in values)  # what was given is as it was
        some = model.unembed(values["final_resid"], ids, (7, 2))
        torch.testing.assert_close(some, logits[..., [7, 2]], **close)
