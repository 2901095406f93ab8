"""The weights of attention at a CircuitGPT: recorded and replaced by name, and computed for nobody else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from scalpel.models.circuitgpt import attention
from scalpel.models.circuitgpt.attention import fused_training

LENGTH = 7


def expected(model: Any, q: Tensor, k: Tensor, layer: int, mask: Tensor | None = None) -> Any:
    """The weights (B, heads, L, L) of each query in turn, by numpy in float64."""
    heads, sinks = model.config.n_head, model.transformer.h[layer].attn.sink_logit
    width = q.shape[-1] // heads
    q, k = q.detach(), k.detach()
    weights = np.zeros((len(q), heads, LENGTH, LENGTH))
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(LENGTH):
                keys = [j for j in range(i + 1) if mask is None or mask[b, j]] or [i]
                scores = [float(q[b, i, part].double() @ k[b, j, part].double()) / width**0.5 for j in keys]
                shares = np.exp(scores)
                total = shares.sum() + (0 if sinks is None else float(sinks[h].detach().double().exp()))
                weights[b, h, i, keys] = shares / total
    return weights


def by_head(model: Any, value: Tensor) -> Tensor:
    return value.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", ["plain", "like_csp_yolo2", "narrow_heads"])
def test_it_is_recorded(case: str, grad: bool, padding: str) -> None:
    model = build(case)
    ids = tokens(model, 2, LENGTH)
    mask = None
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[1, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    names = ["1.attn.q", "1.attn.k", "1.attn.pattern", "1.attn.v", "1.attn.y"]
    with torch.set_grad_enabled(grad):
        logits, acts = model.run_with_cache(ids, names, attention_mask=mask)
        plain = model(ids, mask)
    assert list(acts) == ["1.attn.k", "1.attn.q", "1.attn.v", "1.attn.pattern", "1.attn.y"]
    assert acts["1.attn.pattern"].shape == (2, LENGTH, model.config.n_head * LENGTH)
    weights = by_head(model, acts["1.attn.pattern"]).detach()
    known = expected(model, acts["1.attn.q"], acts["1.attn.k"], 1, mask)
    np.testing.assert_allclose(weights, known, rtol=1e-12, atol=1e-15)
    values = acts["1.attn.v"].unflatten(-1, (model.config.n_head, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), acts["1.attn.y"])
    torch.testing.assert_close(logits, plain)
    if model.config.sink:
        assert bool((weights.sum(-1) < 1).all())


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["0.attn.pattern"], ["0.attn.pattern"]),
        ("0.attn.pattern", ["0.attn.pattern"]),
        (r"\d\.attn\.(v|pattern)", ["0.attn.v", "0.attn.pattern", "1.attn.v", "1.attn.pattern"]),
        (["blocks.1.attn.hook_pattern"], ["blocks.1.attn.hook_pattern"]),
        ("blocks.1.attn.hook_pattern", ["blocks.1.attn.hook_pattern"]),
        (["0.attn.pattern", "blocks.0.attn.hook_pattern"], ["0.attn.pattern", "blocks.0.attn.hook_pattern"]),
        (["blocks.0.hook_resid_post", "0.attn.q"], ["0.attn.q", "blocks.0.hook_resid_post"]),
    ],
)
def test_names_pick_it(names: Any, kept: list[str]) -> None:
    model = build("sink")
    ids = tokens(model, 2, LENGTH)
    _, acts = model.run_with_cache(ids, names)
    assert list(acts) == kept
    ours = {"blocks.1.attn.hook_pattern": "1.attn.pattern", "blocks.0.attn.hook_pattern": "0.attn.pattern"}
    ours["blocks.0.hook_resid_post"] = "1.resid_in"
    for name, value in acts.items():
        found = model.run_with_cache(ids, [ours.get(name, name)])[1][ours.get(name, name)]
        torch.testing.assert_close(value, found)


def test_nobody_else_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 2, LENGTH)
    with torch.no_grad():
        plain = model(ids)

    def never(*_: Any) -> Tensor:
        raise AssertionError("weights were written out")

    monkeypatch.setattr(attention, "attention_weights", never)
    assert not [name for name in model.hook_names if "pattern" in name]
    with torch.no_grad():
        logits, acts = model.run_with_cache(ids)
        assert torch.equal(logits, plain) and list(acts) == model.hook_names
        assert torch.equal(model.run_with_cache(ids, lambda name: True)[0], plain)
        assert torch.equal(model.run_with_hooks(ids, [("0.attn.y", lambda value, name: None)]), plain)
        with pytest.raises(AssertionError, match="written out"):
            model.run_with_cache(ids, ["0.attn.pattern"])


def test_it_is_replaced_before_it_meets_v() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 2, LENGTH)
    calls: list[str] = []

    def uniform(value: Tensor, name: str) -> Tensor:
        calls.append(name)
        return torch.full_like(value, 0.25)

    hooks = [("blocks.0.attn.hook_pattern", uniform)]
    _, acts = model.run_with_cache(ids, ["0.attn.v", "0.attn.y", "0.attn.pattern"], fwd_hooks=hooks)
    assert calls == ["blocks.0.attn.hook_pattern"] and bool((acts["0.attn.pattern"] == 0.25).all())
    # A key that a query may not read stays unread, whatever is put there.
    torch.testing.assert_close(acts["0.attn.y"], 0.25 * acts["0.attn.v"].cumsum(1))
    logits = model.run_with_hooks(ids, hooks)
    cut = model.run_with_hooks(ids, [("0.attn.y", lambda value, name: 0.25 * acts["0.attn.v"].cumsum(1))])
    torch.testing.assert_close(logits, cut)
    assert not torch.allclose(logits, model(ids))

    def in_place(value: Tensor, name: str) -> None:
        value.mul_(0)

    with torch.no_grad():
        silent = model.run_with_hooks(ids, [("0.attn.pattern", in_place)])
        torch.testing.assert_close(
            silent, model.run_with_hooks(ids, [("0.attn.y", lambda value, name: torch.zeros_like(value))])
        )


def test_it_is_part_of_the_graph_in_every_mode() -> None:
    model = build("sink").train()
    ids = tokens(model, 2, LENGTH)
    slopes = []
    for context in (torch.enable_grad(), fused_training()):
        with context:
            logits, acts = model.run_with_cache(ids, ["0.attn.pattern", "0.attn.v", "0.attn.y"])
            total = logits.square().sum()
            at_weights, at_y = torch.autograd.grad(total, [acts["0.attn.pattern"], acts["0.attn.y"]])
            values = acts["0.attn.v"].unflatten(-1, (3, -1)).transpose(1, 2)
            outputs = at_y.unflatten(-1, (3, -1)).transpose(1, 2)
            torch.testing.assert_close(by_head(model, at_weights), (outputs @ values.mT).tril())
            slopes.append(at_weights)
    torch.testing.assert_close(*slopes)


def test_a_stop_there_computes_nothing_after(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("plain")
    ids = tokens(model, 1, LENGTH)
    monkeypatch.setattr(model.transformer.h[1].attn.c_proj, "forward", lambda _: pytest.fail("was computed"))
    logits, acts = model.run_with_cache(ids, ["1.attn.pattern"], stop_at="1.attn.pattern")
    assert logits is None and list(acts) == ["1.attn.pattern"]
    assert model.run_with_cache(ids, ["1.attn.q"], stop_at="blocks.1.attn.hook_pattern")[0] is None
    with pytest.raises(ValueError, match=r"'1\.attn\.pattern' comes after stop_at '1\.attn\.v'"):
        model.run_with_cache(ids, ["1.attn.pattern"], stop_at="1.attn.v")


def test_half_precision_and_a_compiled_model() -> None:
    model = build("sink", torch.bfloat16)
    ids = tokens(model, 1, LENGTH)
    _, acts = model.run_with_cache(ids, ["0.attn.q", "0.attn.k", "0.attn.pattern"])
    assert acts["0.attn.pattern"].dtype == torch.bfloat16
    known = expected(model, acts["0.attn.q"], acts["0.attn.k"], 0)
    np.testing.assert_allclose(by_head(model, acts["0.attn.pattern"]).detach().double(), known, atol=0.02)
    whole = build("sink")
    seen: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    compiled = torch.compile(whole, backend="eager")
    with torch.no_grad():
        compiled(ids, tap=tap, patterns=["1.attn.pattern"])
        torch.testing.assert_close(
            seen["1.attn.pattern"], whole.run_with_cache(ids, "1.attn.pattern")[1]["1.attn.pattern"]
        )


def test_what_is_refused() -> None:
    model = build("plain")
    ids = tokens(model, 1, LENGTH)
    with pytest.raises(ValueError, match=r"unknown hook '2\.attn\.pattern'.*Close: .*1\.attn\.pattern"):
        model.run_with_cache(ids, ["2.attn.pattern"])
    with pytest.raises(ValueError, match=r"unknown hook 'blocks\.2\.attn\.hook_pattern'"):
        model.run_with_cache(ids, ["blocks.2.attn.hook_pattern"])
    with pytest.raises(ValueError, match=r"'0\.attn\.pattern' are attention weights.*run_with_hooks"):
        model.ablate("0.attn.pattern", "zero")
    with pytest.raises(ValueError, match=r"returned shape \(1,\)"):
        model.run_with_hooks(ids, [("0.attn.pattern", lambda value, name: value.new_zeros(1))])
    with pytest.raises(ValueError, match="matches no hook"):
        model.run_with_cache(ids, "pattern")
