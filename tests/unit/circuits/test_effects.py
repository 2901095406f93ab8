"""Ablation effects per node: computed in batches from the hook on, and compared with one full pass per node."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitgpt_cases import CASES, build, one_thread, tokens
from scalpel.circuits import Task, ablation_effects

__all__ = ["one_thread"]


def task_of(model, lengths=(6, 3, 1)):
    rows = [tokens(model, 1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    return Task.of("tiny", rows, [i % 3 for i in range(len(rows))], (2, 5, 11))


def one_pass_a_node(model, task, kind, reference, step=1):
    """Compute the effects slowly, with ``ablate`` and a full forward pass for every ``step``-th node.

    Returns {hook: {channel: (prompts, answers)}}.
    """
    found = {}
    _, values = model.run_with_cache(task.ids)
    for hook, value in values.items():
        found[hook] = {}
        for channel in range(value.shape[-1] - 1, -1, -step):
            with torch.no_grad(), model.ablate([f"{hook}:{channel}"], kind, reference=reference):
                logits = model(task.ids)
            at = logits[torch.arange(len(task)), task.asked][:, list(task.answers)]
            found[hook][channel] = at.numpy()
    return found


@pytest.mark.parametrize(("name", "kind"), [*((name, "mean") for name in CASES), ("like_csp_yolo2", "zero")])
def test_every_hook_of_every_variant(name, kind):
    """Check every node of one variant, and every third node of the others, since nodes of one hook share their code."""
    model = build(name)
    task = task_of(model)
    reference = [[1, 2, 3, 4], [7, 8, 9]]
    expected = one_pass_a_node(model, task, kind, reference, 1 if name == "like_csp_yolo2" else 3)
    effects = ablation_effects(model, task, kind=kind, reference=reference)
    assert list(effects.hooks) == model.hook_names
    moved = 0.0
    for hook, nodes in expected.items():
        assert len(effects.hooks[hook]) == max(nodes) + 1
        for channel, values in nodes.items():
            np.testing.assert_allclose(effects.hooks[hook][channel], values, rtol=0, atol=1e-9, err_msg=hook)
            moved = max(moved, np.abs(values - effects.base).max())
    assert moved > 1e-3


def test_resampled_values_come_from_the_reference():
    model = build("like_csp_yolo2")
    task = task_of(model, lengths=(5, 5))
    once = ablation_effects(model, task, kind="resample", reference=[[3]], hooks=["0.attn.v"])
    # A reference of one token leaves no choice to draw from.
    expected = one_pass_a_node(model, task, "resample", [[3]])["0.attn.v"]
    for channel, values in expected.items():
        np.testing.assert_allclose(once.hooks["0.attn.v"][channel], values, atol=1e-9)
    many = [[1, 2, 3, 4, 5, 6]]
    one = ablation_effects(model, task, kind="resample", reference=many, seed=1).hooks["0.attn.v"]
    other = ablation_effects(model, task, kind="resample", reference=many, seed=2).hooks["0.attn.v"]
    assert np.abs(one - other).max() > 1e-6


def test_derived_figures():
    model = build("plain")
    task = task_of(model)
    effects = ablation_effects(model, task, kind="zero", hooks=["1.mlp.post_act"])
    after = torch.from_numpy(effects.hooks["1.mlp.post_act"])
    losses = torch.stack([torch.nn.functional.cross_entropy(a, task.labels, reduction="none") for a in after])
    base = torch.nn.functional.cross_entropy(torch.from_numpy(effects.base), task.labels, reduction="none")
    rise = effects.loss_change()["1.mlp.post_act"]
    np.testing.assert_allclose(rise, (losses - base).mean(1), atol=1e-12)
    error = effects.standard_error()["1.mlp.post_act"]
    np.testing.assert_allclose(error, (losses - base).std(1) / 3**0.5, atol=1e-12)
    top = effects.largest(3)
    assert [node for node, *_ in top] == [f"1.mlp.post_act:{c}" for c in np.argsort(-np.abs(rise))[:3]]


def test_a_stopped_call_goes_on_and_another_is_refused(tmp_path):
    model = build("sink")
    task = task_of(model)
    seen = []

    def stop(what, done):
        seen.append(what)
        if what == "1.attn.q":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablation_effects(model, task, kind="zero", folder=tmp_path, progress=stop)
    first = (tmp_path / "0.attn.q.npy").stat().st_mtime_ns
    resumed = ablation_effects(model, task, kind="zero", folder=tmp_path)
    assert (tmp_path / "0.attn.q.npy").stat().st_mtime_ns == first
    whole = ablation_effects(model, task, kind="zero")
    assert all(np.array_equal(resumed.hooks[hook], whole.hooks[hook]) for hook in whole.hooks)
    for other in ({"kind": "mean"}, {"kind": "mean", "reference": [[1]]}):
        with pytest.raises(ValueError, match="another measurement of effects .*values"):
            ablation_effects(model, task, folder=tmp_path, **other)
    relabelled = task.relabelled(1 - task.labels.clamp(max=1), "other")
    with pytest.raises(ValueError, match="another measurement of effects .*task"):
        ablation_effects(model, relabelled, kind="zero", folder=tmp_path)
    relu = build("sink")
    relu.config = replace(relu.config, activation_type="relu")
    with pytest.raises(ValueError, match="another measurement of effects .*model"):
        ablation_effects(relu, task, kind="zero", folder=tmp_path)


def test_the_error_is_over_groups_of_prompts():
    model = build("plain")
    rows = [tokens(model, 1, 5, seed=i)[0].tolist() for i in (0, 0, 1, 1, 2, 2)]
    paired = Task.of("t", rows, [0, 0, 1, 1, 0, 0], (2, 5), [0, 0, 1, 1, 2, 2])
    single = Task.of("t", rows[::2], [0, 1, 0], (2, 5))
    one, other = (ablation_effects(model, t, kind="zero", hooks="0.attn.v").standard_error() for t in (paired, single))
    # Copies of the prompts add no information.
    np.testing.assert_allclose(one["0.attn.v"], other["0.attn.v"], rtol=1e-9)
    alone = Task.of("t", rows[:1], [0], (2, 5))
    assert np.isnan(ablation_effects(model, alone, kind="zero", hooks="0.attn.v").standard_error()["0.attn.v"]).all()


def test_unknown_hooks_are_refused():
    model = build("plain")
    with pytest.raises(ValueError, match="unknown hook"):
        ablation_effects(model, task_of(model), hooks=["9.attn.q"])
