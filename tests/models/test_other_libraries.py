"""CircuitGPT inside TransformerLens and nnsight, beside Scalpel's own hooks.

Neither library is needed otherwise. TransformerLens has entry points for architectures from version 3.3 on.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from circuitgpt_cases import one_thread  # noqa: F401
from scalpel import CircuitGPT


def installed(package, least):
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    return "" if numbers >= least else f"{package} is {found}, and {'.'.join(map(str, least))} is needed"


WHY_NOT_LENS, WHY_NOT_NNSIGHT = installed("transformer-lens", (3, 3)), installed("nnsight", (0, 6))


@pytest.fixture(scope="module")
def model():
    return CircuitGPT.from_pretrained("bracket-mini")


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.batch(["x = [[1, 2], [3", "y = [4, [5, 6]]"])[0][:, :11]


@pytest.fixture(scope="module")
def bridge(model):
    if WHY_NOT_LENS:
        pytest.skip(WHY_NOT_LENS)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(model.folder), device="cpu")


# TransformerLens's name within a layer, ours, and whether it has an axis for the heads.
LENS = {
    "hook_resid_pre": ("resid_in", False),
    "attn.hook_q": ("attn.q", True),
    "attn.hook_k": ("attn.k", True),
    "attn.hook_v": ("attn.v", True),
    "attn.hook_z": ("attn.y", True),
    "hook_attn_out": ("attn.resid_delta", False),
    "hook_resid_mid": ("resid_mid", False),
    "mlp.hook_post": ("mlp.post_act", False),
    "hook_mlp_out": ("mlp.resid_delta", False),
}


@torch.no_grad()
def test_the_bridge_has_the_same_values(bridge, model, ids):
    logits, cache = bridge.run_with_cache(ids)
    expected, values = model.run_with_cache(ids)
    assert torch.allclose(logits, expected, atol=2e-5)
    for layer in range(2):
        for theirs, (ours, heads) in LENS.items():
            value = values[f"{layer}.{ours}"]
            value = value.unflatten(-1, (model.config.n_head, -1)) if heads else value
            assert torch.allclose(cache[f"blocks.{layer}.{theirs}"], value, atol=1e-5), theirs
        weights = cache[f"blocks.{layer}.attn.hook_pattern"]
        q, k = (values[f"{layer}.attn.{name}"].unflatten(-1, (8, 16)).transpose(1, 2) for name in "qk")
        scores = (q @ k.transpose(-2, -1) / 4).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).exp()
        sink = model.transformer.h[layer].attn.sink_logit.exp()[:, None, None]
        assert torch.allclose(weights, scores / (scores.sum(-1, keepdim=True) + sink), atol=1e-5)
    assert torch.allclose(cache["ln_final.hook_in"], values["final_resid"], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", LENS)
def test_a_change_in_the_bridge_reaches_all_that_follows(name, bridge, model, ids):
    found = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.0.{name}", lambda value, hook: value * 0.5)])
    expected = model.run_with_hooks(ids, [(f"0.{LENS[name][0]}", lambda value, name: value * 0.5)])
    assert torch.allclose(found, expected, atol=2e-5)
    assert not torch.allclose(expected, model(ids), atol=1e-3)
    assert torch.allclose(bridge(ids), model(ids), atol=2e-5)  # the hook is gone


def test_the_bridge_generates(bridge, model):
    prompt = "x = [[1, 2], [3"
    text = bridge.generate(prompt, max_new_tokens=6, do_sample=False, verbose=False, prepend_bos=False)
    ours = model.generate(torch.tensor([model.tokenizer.encode(prompt)]), 6)[0]
    assert text == model.tokenizer.decode(ours)


@pytest.mark.skipif(bool(WHY_NOT_NNSIGHT), reason=WHY_NOT_NNSIGHT)
@torch.no_grad()
def test_nnsight_reads_and_changes_our_modules(model, ids):
    from nnsight import NNsight

    wrapped = NNsight(model)
    with wrapped.trace(ids):
        delta = wrapped.transformer.h[0].attn.output.save()
        between = wrapped.transformer.h[1].input.save()
        logits = wrapped.output.save()
    expected, values = model.run_with_cache(ids)
    assert torch.allclose(delta, values["0.attn.resid_delta"], atol=1e-5)
    assert torch.allclose(between, values["1.resid_in"], atol=1e-5)
    assert torch.allclose(logits, expected, atol=2e-5)
    with wrapped.trace(ids):
        wrapped.transformer.h[0].mlp.output[:] = 0
        changed = wrapped.output.save()
    by_hand = model.run_with_hooks(ids, [("0.mlp.resid_delta", lambda value, name: torch.zeros_like(value))])
    assert torch.allclose(changed, by_hand, atol=2e-5)
    assert not torch.allclose(changed, logits, atol=1e-2)
