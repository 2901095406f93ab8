"""The parts of a logit attribution add up, and each equals the effect of zeroing it in a linear readout."""

import pytest
import torch

from circuitgpt_cases import CASES, build, one_thread, tokens  # noqa: F401


@pytest.mark.parametrize("name", CASES)
def test_parts_sum_to_the_logit(name):
    model = build(name)
    ids = tokens(model, batch=3)
    with torch.no_grad():  # like the attribution: with gradients, attention rounds differently
        logits = model(ids)
    for wanted, position in ((4, -1), ((2, 7), 3)):
        result = model.logit_attribution(ids, wanted, position=position)
        at = logits[:, position]
        expected = at[:, 4] if wanted == 4 else at[:, 2] - at[:, 7]
        assert torch.equal(result.total, expected)
        assert (sum(result.parts().values()) - expected).abs().max() < 1e-9
        nodes = result.y.sum((1, 2)) + result.post_act.sum((1, 2))
        assert (nodes - result.heads.sum((1, 2)) - result.mlps.sum(1)).abs().max() < 1e-9
        assert result.interventions.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["plain", "like_csp_yolo2", "topk_everywhere_relu_residual"])
def test_it_adds_up_under_ablations_and_hooks_too(name):
    model = build(name)
    ids = tokens(model)
    hooks = [("1.resid_mid", lambda value, name: value + 0.3), ("0.mlp.resid_delta", lambda v, n: 0.5 * v)]
    hooks += [("0.resid_in", lambda value, name: value - 0.1), ("final_resid", lambda value, name: 2 * value)]
    with model.ablate(["0.attn.y:4", "1.mlp.post_act"], kind="mean", reference=tokens(model, seed=4)):
        result = model.logit_attribution(ids, (1, 2), fwd_hooks=hooks)
        logits, _ = model.run_with_cache(ids, ["final_resid"], fwd_hooks=hooks)
    torch.testing.assert_close(result.total, logits[:, -1, 1] - logits[:, -1, 2], atol=1e-12, rtol=0)
    torch.testing.assert_close(sum(result.parts().values()), result.total, atol=1e-9, rtol=0)
    assert result.interventions.abs().max() > 1e-3


def test_a_heads_part_is_what_its_output_adds_to_the_frozen_readout():
    model = build("plain")
    ids = tokens(model)
    result = model.logit_attribution(ids, 5)
    _, acts = model.run_with_cache(ids, ["1.attn.y", "final_resid"])
    final = acts["final_resid"][:, -1]
    norm = model.transformer.ln_f
    scale = (final.var(-1, unbiased=False) + 1e-5).rsqrt()
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        write = acts["1.attn.y"][:, -1, at] @ model.transformer.h[1].attn.c_proj.weight[:, at].T
        centered = write - write.mean(-1, keepdim=True)
        expected = (centered * scale[:, None] * norm.weight) @ model.lm_head.weight[5]
        torch.testing.assert_close(result.heads[:, 1, head], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_default_position_is_the_last_real_token(side):
    model = build("sink")
    ids = tokens(model, batch=3, length=8)
    lengths = [8, 3, 5]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(8 - length, 8)] = 1
    together = model.logit_attribution(ids, 3, attention_mask=mask)
    for row in range(3):
        alone = model.logit_attribution(ids[row][mask[row].bool()][None], 3)
        for name, value in alone.parts().items():
            torch.testing.assert_close(together.parts()[name][row], value[0], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="not a real token"):
        model.logit_attribution(ids, 3, position=0 if side == "left" else 7, attention_mask=mask)


def test_tables():
    model = build("sink")
    result = model.logit_attribution(tokens(model), (1, 2))
    table = result.to_pandas()
    assert list(table.columns) == ["prompt", "part", "value"]
    total = table.groupby("prompt").value.sum()
    assert total.to_numpy() == pytest.approx(result.total.numpy(), abs=1e-9)
    nodes = result.to_pandas(nodes=True)
    assert len(nodes) == 2 * 2 * (12 + 20) and "1.mlp.post_act:19" in set(nodes.node)
    plain = result.to_dict()
    assert plain["tokens"] == [1, 2] and plain["heads"] == result.heads.tolist()


@pytest.mark.parametrize(
    "wanted, options, says",
    [
        (13, {}, "token id 13"),
        (-1, {}, "token id -1"),
        ((1, 2, 3), {}, "3 entries"),
        ("]]", {}, "no tokenizer"),
        (1, {"position": 7}, "position 7"),
        (1, {"position": -8}, "position -8"),
    ],
)
def test_bad_requests_are_refused(wanted, options, says):
    model = build("plain")
    with pytest.raises(ValueError, match=says):
        model.logit_attribution(tokens(model), wanted, **options)


def test_a_token_that_is_no_integer_is_not_rounded():
    model = build("plain")
    with pytest.raises(TypeError, match=r"token is 1\.7"):
        model.logit_attribution(tokens(model), 1.7)
    at = torch.tensor(3)
    assert model.logit_attribution(tokens(model), at).tokens == (3,)
