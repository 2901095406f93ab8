"""Recording, interventions and ablation, and the promised order in which they compose."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from scalpel.hooks.masks import watch_activations, watch_masks
from scalpel.models.circuitgpt.ablation import hook_means
from scalpel.models.circuitgpt.attention import _fused_training, fused_training


@pytest.fixture
def model():
    return build("like_csp_yolo2")


@pytest.fixture
def ids(model):
    return tokens(model)


@pytest.mark.parametrize(
    "names, expected",
    [
        (r"\d\.attn\.q", ["0.attn.q", "1.attn.q"]),
        ("0.mlp", ["0.mlp.act_in", "0.mlp.post_act", "0.mlp.resid_delta"]),
        (["1.attn.v", "final_resid"], ["1.attn.v", "final_resid"]),
        (lambda name: name.endswith("resid_in"), ["0.resid_in", "1.resid_in"]),
        ([], []),
    ],
)
def test_names_pick_what_is_recorded(model, ids, names, expected):
    logits, acts = model.run_with_cache(ids, names)
    assert list(acts) == expected
    assert torch.equal(logits, model(ids))


def test_stop_at_computes_nothing_after(model, ids, monkeypatch):
    def never(*_):
        raise AssertionError("was computed")

    monkeypatch.setattr(model.transformer.h[1].mlp, "forward", never)
    logits, acts = model.run_with_cache(ids, stop_at="1.resid_mid")
    assert logits is None
    assert list(acts) == model.hook_names[: model.hook_names.index("1.resid_mid") + 1]
    _, only = model.run_with_cache(ids, ["0.attn.y"], stop_at="0.attn.y")
    assert torch.equal(only["0.attn.y"], acts["0.attn.y"])
    assert model.run_with_cache(ids, [], stop_at="0.attn.y") == (None, {})


@pytest.mark.parametrize(
    "names, stop_at, says",
    [
        (["1.attn.vv"], None, r"unknown hook '1\.attn\.vv'.*Close: 1\.attn\.v.*final_resid"),
        (["2.attn.v"], None, r"\{0\.\.1\}"),
        ("blocks", None, "matches no hook"),
        ("(", None, "regular expression"),
        (lambda name: False, None, "matches no hook"),
        (".*", "3.resid_in", "unknown hook"),
        (["1.attn.v"], "0.attn.v", "after stop_at"),
        (["0.attn.q", "1.attn.v"], "0.attn.v", "after stop_at"),
        ("final_resid", "0.attn.v", "after stop_at"),
    ],
)
def test_bad_names_are_refused(model, ids, names, stop_at, says):
    with pytest.raises(ValueError, match=says):
        model.run_with_cache(ids, names, stop_at)


def test_hooks_see_and_change_values_in_order(model, ids):
    seen = []

    def double(value, name):
        seen.append((name, value.clone()))
        return value * 2

    def look(value, name):
        seen.append((name, value.clone()))

    plain = model(ids)
    hooked = model.run_with_hooks(ids, [("0.attn.v", double), ("0.attn.v", look), ("final_resid", look)])
    assert [name for name, _ in seen] == ["0.attn.v", "0.attn.v", "final_resid"]
    assert torch.equal(seen[1][1], seen[0][1] * 2)
    assert (hooked - plain).abs().max() > 1e-3
    assert torch.equal(model(ids), plain)
    _, acts = model.run_with_cache(ids, ["0.attn.v"], fwd_hooks=[("0.attn.v", double)])
    assert torch.equal(acts["0.attn.v"], seen[0][1] * 2)  # in the form in which the model uses them


@pytest.mark.parametrize(
    "given, error, says",
    [
        (lambda value, name: value[..., :-1], ValueError, r"0\.attn\.v.*shape"),
        (lambda value, name: value.float(), ValueError, "float32"),
        (lambda value, name: 0, TypeError, "int"),
    ],
)
def test_a_hook_that_returns_something_else_is_refused(model, ids, given, error, says):
    with pytest.raises(error, match=says):
        model.run_with_hooks(ids, [("0.attn.v", given)])
    with pytest.raises(ValueError, match="unknown hook"):
        model.run_with_hooks(ids, [("0.attn.w", given)])


# Ablation.


def test_zero_ablation_is_the_hook_that_writes_zero(model, ids):
    def zero(value, name):
        value = value.clone()
        value[..., [2, 5]] = 0
        return value

    by_hand = model.run_with_hooks(ids, [("1.attn.v", zero)])
    with model.ablate(["1.attn.v:2", "1.attn.v:5"], kind="zero") as same:
        assert same is model
        assert torch.equal(model(ids), by_hand)
    with model.ablate("1.attn.v", kind="zero"):
        _, acts = model.run_with_cache(ids, ["1.attn.v"])
        assert not acts["1.attn.v"].any()


def test_mean_ablation_uses_the_mean_over_real_tokens(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    _, acts = model.run_with_cache(ids, ["0.mlp.post_act"], attention_mask=mask)
    mean = acts["0.mlp.post_act"][mask.bool()].mean(0)
    rows = [ids[0].tolist(), ids[1, :4]]
    for reference in ((ids, mask), {"input_ids": ids, "attention_mask": mask}, rows):
        with model.ablate(["0.mlp.post_act:3"], kind="mean", reference=reference):
            _, now = model.run_with_cache(ids, ["0.mlp.post_act"])
        torch.testing.assert_close(now["0.mlp.post_act"][..., 3], mean[3].expand(2, 7), atol=1e-14, rtol=0)
    means = hook_means(model, (ids, mask))
    assert list(means) == model.hook_names
    torch.testing.assert_close(means["0.mlp.post_act"], mean, atol=1e-14, rtol=0)
    model.card["hook_means"] = {name: value.tolist() for name, value in means.items()}
    with model.ablate(["0.mlp.post_act:3"]) as ablated:
        from_card = ablated(ids)
    with model.ablate(["0.mlp.post_act:3"], reference=rows):
        assert torch.equal(model(ids), from_card)
    one_prompt = hook_means(model, [1, 2, 3], ["final_resid"])["final_resid"]
    assert torch.equal(one_prompt, hook_means(model, torch.tensor([[1, 2, 3]]), ["final_resid"])["final_resid"])


def test_resampling_draws_real_tokens_and_keeps_nodes_together(model, ids):
    reference = tokens(model, batch=20, length=5, seed=3)
    names = ["0.attn.q", "0.attn.v"]
    _, pool = model.run_with_cache(reference, names)
    joint = torch.cat([pool[name] for name in names], -1).flatten(0, 1)

    def resampled(seed):
        with model.ablate(names, kind="resample", reference=reference, seed=seed):
            _, acts = model.run_with_cache(ids, names)
        return torch.cat([acts[name] for name in names], -1)

    first = resampled(0)
    for row in first.flatten(0, 1):
        assert (joint == row).all(-1).any()  # both hooks take the same token of the reference
    assert torch.equal(first, resampled(0)) and not torch.equal(first, resampled(1))


def test_ablations_nest_and_end_whatever_happens(model, ids):
    plain = model(ids)
    with model.ablate("0.attn.v:1", kind="zero"):
        outer = model(ids)
        with model.ablate(["1.mlp.post_act"], kind="zero"):
            assert not torch.equal(model(ids), outer)
        assert torch.equal(model(ids), outer)
        with pytest.raises(KeyError), model.ablate("1.attn.v", kind="zero"):
            raise KeyError
        assert torch.equal(model(ids), outer)
        # The reference runs without the active interventions.
        with model.ablate("0.attn.v:1", kind="mean", reference=ids):
            mean = model(ids)
    assert torch.equal(model(ids), plain)
    with model.ablate("0.attn.v:1", kind="mean", reference=ids):
        assert torch.equal(model(ids), mean)
    first, second = model.ablate("0.attn.v", kind="zero"), model.ablate("1.attn.v", kind="zero")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # left in the wrong order
    with_second = model(ids)
    second.__exit__(None, None, None)
    with model.ablate("1.attn.v", kind="zero"):
        assert torch.equal(model(ids), with_second)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_an_ablation_can_be_entered_again(model, ids, kind):
    plain = model(ids)
    again = model.ablate("1.attn.v", kind=kind, reference=ids)
    with model.ablate("1.attn.v", kind=kind, reference=ids):
        ablated = model(ids)
    assert not torch.equal(ablated, plain)
    for _ in range(2):  # used one after the other
        with again as same:
            assert same is model and torch.equal(model(ids), ablated)
        assert torch.equal(model(ids), plain)
    with again, again:  # nested in itself: active until the outermost ends
        with pytest.raises(KeyError), again:
            assert torch.equal(model(ids), ablated)
            raise KeyError
        assert torch.equal(model(ids), ablated)
    assert torch.equal(model(ids), plain) and not model._interventions
    other = model.ablate("1.attn.v", kind="mean", reference=(ids + 1) % 13)
    with again, other:
        _, inner = model.run_with_cache(ids, ["1.attn.v"])
        with again:  # the context entered last applies last
            assert torch.equal(model(ids), ablated)
        assert torch.equal(model.run_with_cache(ids, ["1.attn.v"])[1]["1.attn.v"], inner["1.attn.v"])
    assert torch.equal(again(model)(ids), ablated)  # as a decorator
    with pytest.raises(RuntimeError, match="wasn't entered"):
        again.__exit__(None, None, None)


def test_jacobians_of_one_ablation_compose_whenever_it_was_entered(model, ids):
    ablation, J = model.ablate("0.attn.v:1", kind="zero"), []
    for hooks in (("0.resid_in", "1.resid_in"), ("1.resid_in", "final_resid")):
        with ablation:
            J.append(scalpel.jacobian(model, ids, *hooks))
    with ablation:
        whole = scalpel.jacobian(model, ids)
    torch.testing.assert_close((J[1] @ J[0]).to_dense(), whole.to_dense(), rtol=1e-9, atol=1e-12)


def test_watches_can_be_entered_again(model, ids):
    seen = []
    outer, inner = (watch_masks(lambda *_, name=name: seen.append(name)) for name in ("outer", "inner"))

    def told(*contexts, thread=False):
        seen.clear()
        with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
            for context in contexts:
                stack.enter_context(context)
            pool.submit(model, ids).result() if thread else model(ids)
        return set(seen)

    assert told(outer) == told(outer) == {"outer"} and told() == set()
    assert told(outer, inner) == {"inner"} and told(outer, inner, outer) == {"outer"}
    assert told(outer, thread=True) == set()
    with outer:
        assert told(outer) == {"outer"}
        seen.clear()
        model(ids)
        assert set(seen) == {"outer"}
        with ThreadPoolExecutor(1) as pool:  # a context affects only the thread that enters it
            assert pool.submit(told, inner, outer, inner).result() == {"inner"}
    assert told() == set()


def test_fused_training_can_be_entered_again():
    fused = fused_training()
    for _ in range(2):
        with fused, fused:
            assert _fused_training.get() == (True, True)
        assert not _fused_training.get()


def test_a_hook_comes_after_the_ablations(model, ids):
    seen = []
    with model.ablate("0.attn.v:1", kind="zero"):
        model.run_with_hooks(ids, [("0.attn.v", lambda value, name: seen.append(value))])
    assert not seen[0][..., 1].any() and seen[0].any()


def test_ablation_inside_torch_func(model, ids):
    start = model.run_with_cache(ids, ["0.resid_in"])[1]["0.resid_in"]

    def logits(x):
        return model.run_with_hooks(ids, [("0.resid_in", lambda value, name: x)])

    tangent = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=start.dtype)
    with model.ablate(["0.attn.resid_delta", "1.attn.q:3"], kind="mean", reference=ids):
        value, slope = torch.func.jvp(logits, (start,), (tangent,))
        step = 1e-6
        difference = (logits(start + step * tangent) - logits(start - step * tangent)) / (2 * step)
        assert torch.equal(value, model(ids))
    torch.testing.assert_close(slope, difference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "nodes, options, says",
    [
        (["0.attn.z:1"], {"kind": "zero"}, "unknown hook"),
        (["0.attn.v:12"], {"kind": "zero"}, "'12' is no channel.*0 to 11"),
        (["0.attn.v:-1"], {"kind": "zero"}, "'-1' is no channel"),
        (["0.attn.v:"], {"kind": "zero"}, "no channel"),
        (["0.attn.v:1"], {"kind": "median"}, "mean, zero, resample"),
        (["0.attn.v:1"], {"kind": "mean"}, "needs reference"),
        (["0.attn.v:1"], {"kind": "resample"}, "needs reference"),
        (["0.attn.v:1"], {"reference": []}, "empty"),
        (["0.attn.v:1"], {"reference": ["text"]}, "no tokenizer"),
        (["0.attn.v:1"], {"reference": [[1], []]}, "empty"),
        (["0.attn.v:1"], {"reference": {"ids": torch.ones(1, 3).long()}}, "needs input_ids"),
        (["0.attn.v:1"], {"reference": (torch.ones(1, 3).long(), torch.zeros(1, 3))}, "real"),
    ],
)
def test_bad_ablations_are_refused_before_they_start(model, nodes, options, says):
    with pytest.raises(ValueError, match=says):
        model.ablate(nodes, **options)
    assert not model._interventions


def test_ids_that_are_no_integers_are_not_rounded(model):
    with pytest.raises(TypeError, match="token ids are integers"):
        model.ablate(["0.attn.v:1"], reference=[[1.7, 2.0]])


def test_masks_are_watched() -> None:
    model = build("topk_everywhere_relu_residual")
    ids, seen = tokens(model, 2, 5), {}
    with watch_masks(lambda name, x, k: seen.__setitem__((name, k is None), (x, k))):
        _, recorded = model.run_with_cache(ids)
    count = len(seen)
    model(ids)  # outside the context nothing is recorded
    assert len(seen) == count == 2 * (10 + 2)  # ten TopKs per layer, and a ReLU after each block
    for (name, relu), (x, k) in seen.items():
        if not relu and name in recorded:
            assert torch.equal(scalpel.keep_topk(x, k), recorded[name])
    assert torch.equal(seen["0.resid_post_mlp", False][0], seen["0.resid_post_mlp", True][0].relu())


@pytest.mark.parametrize("name", ["plain", "relu", "topk_mlp_neuron"])
def test_activations_are_watched(name: str) -> None:
    """Of nested watches the inner one is called with what goes into each MLP's GELU or ReLU."""
    model = build(name)
    ids, seen, outer = tokens(model, 2, 5), {}, []
    with watch_activations(lambda name, x: outer.append(name)), watch_activations(seen.__setitem__):
        _, recorded = model.run_with_cache(ids)
    model(ids)
    assert list(seen) == ["0.mlp.post_act", "1.mlp.post_act"] and not outer
    for hook, x in seen.items():
        after = model.transformer.h[0].mlp.activation(x)
        k = model.config.k_at("mlp_neuron", x.shape[-1])
        assert torch.equal(after if k is None else scalpel.keep_topk(after, k), recorded[hook])
