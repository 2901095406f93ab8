"""Covariances of attention weights and of their gradients, against numpy and plain autograd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from decoder_cases import MODELS, ids_of, model_of
from scalpel.hooks.modules import user_hooks

LENGTH = 6


def collect(model: Any, batches: list[Any], hooks: Any, **options: Any) -> Any:
    return scalpel.collect(model, batches, hooks, **{"progress": False, **options})


def batch_of(seed: int, padding: str) -> dict[str, Tensor]:
    ids = ids_of(3, LENGTH, seed) % 13
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(state: Any, rows: list[Tensor], **tolerance: float) -> None:
    """Compare a state with numpy's mean and covariance of the rows."""
    together = torch.cat(rows).double().numpy()
    assert state.count == len(together) and bool(together.any())
    np.testing.assert_allclose(state.mean.cpu(), together.mean(0), **tolerance)
    np.testing.assert_allclose(state.covariance().cpu(), np.cov(together.T, bias=True), **tolerance)


def next_token_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * (mask[:, 1:] * mask[:, :-1]).flatten()).sum()


def eager_rows(model: Any, batch: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """The weights and their gradient as transformers' eager attention gives them, (real tokens, heads * L)."""
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.enable_grad():
        given = model(**batch, position_ids=places, output_attentions=True, use_cache=False)
        weights = given.attentions[layer]
        (slope,) = torch.autograd.grad(next_token_loss(given.logits, batch), weights)
    real, reads = batch["attention_mask"].bool(), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    reads = reads & real[:, None, :]
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None)
    if window is not None and (kinds is None or kinds[layer] == "sliding_attention"):
        reads = reads & torch.ones_like(reads).triu(1 - window)
    slope = slope.masked_fill(~reads[:, None], 0.0)
    return tuple(x.detach().transpose(1, 2).flatten(2)[real] for x in (weights, slope))  # type: ignore[return-value]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_decoders(name: str, implementation: str, padding: str) -> None:
    """In float32: with padding, transformers' eager attention gives NaN in float64."""
    model, eager = model_of(name).float(), model_of(name).float().requires_grad_(True)
    model.config._attn_implementation, eager.config._attn_implementation = implementation, "eager"
    batches = [batch_of(seed, padding) for seed in range(3)]
    names = ["1.attn.pattern", "blocks.1.attn.hook_pattern.grad", "1.resid_in"]
    states = collect(model, batches, names)
    assert list(states) == ["1.attn.pattern", "1.resid_in", "blocks.1.attn.hook_pattern.grad"]
    rows = [eager_rows(eager, batch, 1) for batch in batches]
    check(states["1.attn.pattern"], [weights for weights, _ in rows], rtol=1e-4, atol=1e-6)
    check(states["blocks.1.attn.hook_pattern.grad"], [slopes for _, slopes in rows], rtol=1e-3, atol=1e-4)
    assert model.config._attn_implementation == implementation and not user_hooks(model)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", ["plain", "like_csp_yolo2"])
def test_a_circuitgpt(case: str, padding: str) -> None:
    model = build(case)
    batches = [batch_of(seed, padding) for seed in range(3)]
    states = collect(model, batches, ["0.attn.pattern", "0.attn.pattern.grad"])
    rows: list[list[Tensor]] = [[], []]
    for batch in batches:
        seen: dict[str, Tensor] = {}

        def tap(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            seen[name] = value
            return value

        real = batch["attention_mask"].bool()
        logits = model(*batch.values(), tap=tap)
        (at_y,) = torch.autograd.grad(next_token_loss(logits, batch), seen["0.attn.y"])
        q, k, v, u = (x.unflatten(-1, (3, -1)) for x in (seen["0.attn.q"], seen["0.attn.k"], seen["0.attn.v"], at_y))
        reads = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & real[:, None, :])[:, :, None, :]
        shares = torch.einsum("bihd,bjhd->bihj", q, k).div(q.shape[-1] ** 0.5).exp() * reads
        total = shares.sum(-1, keepdim=True)
        if model.config.sink:
            total = total + model.transformer.h[0].attn.sink_logit.exp()[:, None]
        rows[0].append((shares / total).flatten(2)[real].detach())
        rows[1].append((torch.einsum("bihd,bjhd->bihj", u, v) * reads).flatten(2)[real].detach())
    check(states["0.attn.pattern"], rows[0], rtol=1e-9, atol=1e-12)
    check(states["0.attn.pattern.grad"], rows[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_weights_alone_leave_the_model_to_its_fused_attention(name: str) -> None:
    """What follows has the same bits with and without them, and gradients elsewhere change nothing about it."""
    model = model_of(name).float().train()
    batches = [batch_of(0, "right")]
    alone = collect(model, batches, ["final_resid", "0.resid_in.grad"])
    beside = collect(model, batches, ["final_resid", "0.attn.pattern", "2.attn.pattern", "0.resid_in.grad"])
    for hook, state in alone.items():
        assert torch.equal(state.covariance(), beside[hook].covariance())
    assert model.training and not user_hooks(model)


def test_frozen_weights_have_gradients_at_the_pattern_too() -> None:
    free, frozen = model_of("llama").requires_grad_(True), model_of("llama")
    for implementation in ("sdpa", "eager"):
        states = []
        for model in (free, frozen):
            model.config._attn_implementation = implementation
            states.append(collect(model, [batch_of(0, "none")], ["1.attn.pattern.grad"])["1.attn.pattern.grad"])
        torch.testing.assert_close(states[0].covariance(), states[1].covariance())


def test_half_precision_is_computed_in_float32() -> None:
    model, exact = model_of("llama"), model_of("llama").bfloat16()
    exact, half = exact.double(), model.bfloat16()
    batches = [batch_of(0, "left")]
    hooks = ["0.attn.pattern", "0.attn.pattern.grad"]
    states, known = collect(half, batches, hooks), collect(exact, batches, hooks)
    for hook in hooks:
        error = (states[hook].covariance() - known[hook].covariance()).norm() / known[hook].covariance().norm()
        assert 0 < float(error) < 0.05


def test_which_names_choose_it() -> None:
    circuit, decoder = build("plain"), model_of("llama")
    for model, layers in ((circuit, 2), (decoder, 3)):
        batches = [batch_of(0, "none")]
        every = collect(model, batches, ".*")
        assert not [name for name in every if "pattern" in name]
        chosen = collect(model, batches, r"\d\.attn\.(resid_delta|pattern)")
        expected = [f"{i}.attn.{place}" for i in range(layers) for place in ("pattern", "resid_delta")]
        assert list(chosen) == expected
        assert list(collect(model, batches, {"1.attn.pattern", "0.attn.pattern"})) == [
            "0.attn.pattern",
            "1.attn.pattern",
        ]
        assert not [name for name in collect(model, batches, lambda name: True) if "pattern" in name]


def test_batches_need_one_length() -> None:
    model = model_of("gpt2")
    batches = [ids_of(2, LENGTH), ids_of(2, LENGTH - 1)]
    for each in (model, build("plain")):
        with pytest.raises(ValueError, match=r"0\.attn\.pattern is 15 wide in batch 2, and was 18: .*one length"):
            collect(each, [ids % 13 for ids in batches], ["0.attn.pattern"])
    with pytest.raises(ValueError, match=r"is 18 wide, and its state takes.*rank"):
        collect(model, batches, ["0.attn.pattern"], memory=1000)


def test_a_saved_state_goes_on(tmp_path: Any) -> None:
    model, batches = model_of("qwen3"), [batch_of(seed, "left") for seed in range(4)]
    hooks = ["0.attn.pattern", "1.attn.pattern.grad"]

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, batches, hooks, folder=tmp_path / "stopped", save_every=1, progress=stop)
    states = collect(model, batches, hooks, folder=tmp_path / "stopped", save_every=1)
    whole = collect(model, batches, hooks, folder=tmp_path / "whole", save_every=1)
    for hook in hooks:
        assert torch.equal(states[hook].covariance(), whole[hook].covariance())


def test_another_thread_is_left_alone() -> None:
    """A pass of the same model elsewhere keeps its fused attention, and its weights are not taken for ours."""
    model, ids = model_of("llama").float(), ids_of(2, LENGTH)
    hooks = ["0.attn.pattern", "0.attn.pattern.grad"]
    alone = collect(model, [ids], hooks)
    with torch.no_grad():
        expected = model(ids + 1).logits
    inside, done = Event(), Event()
    collecting: list[int] = []

    def pause(*_: Any) -> None:  # in the middle of an attention module whose weights are watched
        if get_ident() in collecting and not inside.is_set():
            inside.set()
            assert done.wait(60)

    def collect_here() -> Any:
        collecting.append(get_ident())
        return collect(model, [ids], hooks)

    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        states = pool.submit(collect_here)
        assert inside.wait(60)
        with torch.no_grad():
            assert torch.equal(model(ids + 1).logits, expected)
        done.set()
        for hook, state in states.result().items():
            assert torch.equal(state.covariance(), alone[hook].covariance())
    handle.remove()


def test_an_error_halfway_leaves_the_model_as_it_was() -> None:
    model, ids = model_of("gpt2").train(), ids_of(2, LENGTH)

    def fails(*_: Any) -> None:
        raise RuntimeError("halfway")

    handle = model.transformer.h[1].attn.c_proj.register_forward_hook(fails)  # inside the attention that is watched
    with pytest.raises(RuntimeError, match="halfway"):
        collect(model, [ids], ["1.attn.pattern", "1.attn.pattern.grad"])
    handle.remove()
    assert model.training and not user_hooks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_compiled_layers_are_seen() -> None:
    model, ids = model_of("llama"), ids_of(2, LENGTH)
    known = collect(model, [ids], ["1.attn.pattern"])["1.attn.pattern"].covariance()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with torch.no_grad():
        model(ids)
    for each in (model, torch.compile(model, backend="eager")):
        found = collect(each, [ids], ["1.attn.pattern"])["1.attn.pattern"].covariance()
        torch.testing.assert_close(found, known)


def test_what_cannot_be_seen_is_said() -> None:
    import transformers

    def own(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        return q.transpose(1, 2), None

    transformers.AttentionInterface.register("no softmax", own)
    try:
        model = model_of("gpt2")
        model.config._attn_implementation = "no softmax"
        with pytest.raises(ValueError, match=r"never showed '0\.attn\.pattern'.*'no softmax'.*'sdpa'"):
            collect(model, [ids_of(2, LENGTH)], ["0.attn.pattern"])
    finally:
        transformers.AttentionInterface._global_mapping.pop("no softmax")
    plain = nn.Sequential(nn.Embedding(19, 4), nn.Linear(4, 19))
    with pytest.raises(ValueError, match=r"unknown hook '0\.attn\.pattern': .*no module's value.*Sequential"):
        collect(plain, [ids_of(2, LENGTH)], ["0.attn.pattern"])
    with pytest.raises(ValueError, match=r"unknown hook '3\.attn\.pattern'"):
        collect(model_of("gpt2"), [ids_of(2, LENGTH)], ["3.attn.pattern"])
