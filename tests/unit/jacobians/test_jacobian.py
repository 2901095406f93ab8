"""scalpel.jacobian over CircuitGPT against the dense twin and finite differences: every variant and hook."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from scalpel import CircuitGPT, jacobian, topk_mask
from scalpel.hooks.masks import watch_masks
from scalpel.hooks.names import hook_names
from scalpel.models.circuitgpt.ablation import Ablation
from scalpel.reference.jacobian import jacobian_dense

EXACT = 1e-9


def check(model: CircuitGPT, ids: Tensor, source: str, target: str, positions=None, **inputs) -> Tensor:
    """Compare forward and backward products on every unit vector with the dense twin, and return the matrix."""
    dense = jacobian_dense(model, ids, source, target, positions, **inputs)
    scale = max(1e-3, float(dense.abs().max()))
    for through in (nullcontext(), torch_func(model)):
        with through:
            J = jacobian(model, ids, source, target, positions, **inputs)
            assert J.shape == dense.shape
            m, n = J.shape
            forward = J.jvp(torch.eye(n, dtype=J.dtype).reshape(n, *J.source_shape)).reshape(n, m).T
            back = J.vjp(torch.eye(m, dtype=J.dtype).reshape(m, *J.target_shape)).reshape(m, n)
        assert float((forward - dense).abs().max()) <= EXACT * scale
        assert float((back - dense).abs().max()) <= EXACT * scale
    return dense


@pytest.mark.parametrize("case", [name for name in CASES if name != "no_layer"])
def test_every_variant_matches_the_dense_twin(case: str) -> None:
    model = build(case)
    check(model, tokens(model, 1, 4), "0.resid_in", "final_resid")
    check(model, tokens(model, 2, 4), "0.attn.v", "logits", (slice(0, 2), [-1]))


@pytest.mark.parametrize("case", ["plain", "like_csp_yolo2"])
def test_from_every_hook_and_to_every_hook(case: str) -> None:
    model = build(case)
    ids = tokens(model, 1, 3)
    for source in hook_names(2):
        dense = check(model, ids, source, "logits", (None, -1))
        assert bool(dense.any())
    for target in hook_names(2):
        check(model, ids, "0.resid_in", target, (1, None))


@pytest.mark.parametrize(
    "alias,hook",
    [
        ("blocks.1.hook_resid_pre", "1.resid_in"),
        ("blocks.0.hook_resid_post", "1.resid_in"),
        ("blocks.1.attn.hook_z", "1.attn.y"),
        ("transformer.h.0.mlp", "0.mlp.resid_delta"),
        ("transformer.h.1.mlp.c_proj:in", "1.mlp.post_act"),
    ],
)
def test_other_names_of_a_hook(alias: str, hook: str) -> None:
    model = build("plain")
    ids = tokens(model, 1, 3)
    named, ours = jacobian(model, ids, alias), jacobian(model, ids, hook)
    assert torch.equal(named.to_dense(), ours.to_dense())
    assert (jacobian(model, ids, hook, "blocks.1.hook_resid_post") @ jacobian(model, ids, alias, alias)).shape
    with pytest.raises(ValueError, match="unknown source 'transformer.h.1.ln_2:in'"):
        jacobian(model, ids, "transformer.h.1.ln_2:in")  # a change there does not affect the residual stream


def test_no_layer() -> None:
    model = build("no_layer")
    check(model, tokens(model, 2, 3), "final_resid", "logits")


def test_a_tangent_is_added_after_the_topk_unmasked_and_parallel_paths_are_fixed() -> None:
    model = build("topk_everywhere")
    ids = tokens(model, 1, 4)
    _, acts = model.run_with_cache(ids)
    off = int((acts["1.mlp.post_act"][0, 2] == 0).nonzero()[0])
    J = jacobian(model, ids, "1.mlp.post_act", "1.mlp.post_act")
    assert torch.equal(J.to_dense(), torch.eye(J.shape[0], dtype=J.dtype))  # including entries that TopK dropped
    D = jacobian_dense(build("plain"), ids, "1.mlp.post_act", "final_resid", 2)
    assert bool((D[:, off] != 0).any())
    # Only q moves, so the value at v does not matter.
    into_v = jacobian(model, ids, "0.attn.q", "1.attn.v").to_dense()
    assert into_v.shape == (4 * 12, 4 * 12)
    with pytest.raises(ValueError, match="no path"):
        jacobian(model, ids, "0.attn.q", "0.attn.v")


@pytest.mark.parametrize("case", ["topk_everywhere", "like_csp_yolo2", "relu_residual", "positions_concatenated"])
def test_finite_differences_with_the_supports_fixed(case: str) -> None:
    model = build(case)
    ids = tokens(model, 1, 5)
    J = jacobian(model, ids, "0.attn.act_in", "logits")
    direction = torch.randn(J.source_shape, dtype=torch.float64)
    step = 1e-6
    values, supports = [], []
    for sign in (1, -1):
        move = [("0.attn.act_in", lambda value, name, sign=sign: value + sign * step * direction)]
        logits, acts = model.run_with_cache(ids, fwd_hooks=move)
        values.append(logits.detach())
        supports.append({name: value != 0 for name, value in acts.items() if name != "0.attn.act_in"})
    assert all(torch.equal(supports[0][name], supports[1][name]) for name in supports[0])
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(J.jvp(direction[None])[0], slope, rtol=1e-6, atol=1e-7)


def test_the_primal_is_what_the_hook_records() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model)
    with torch.no_grad():  # with gradients, attention uses another kernel, which rounds differently
        logits, acts = model.run_with_cache(ids)
    for name in (*hook_names(2), "logits"):
        J = jacobian(model, ids, "0.resid_in", name, (None, [4, 1]))
        value = logits if name == "logits" else acts[name]
        assert torch.equal(J.primal, value[:, [4, 1]])
        assert not J.primal.requires_grad
        assert J.target_shape == J.primal.shape
    assert torch.equal(J.T.primal, acts["0.resid_in"])


def test_active_ablations_count_and_stay_with_the_operator() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model)
    free = jacobian(model, ids).to_dense()
    with model.ablate(["0.attn.v:1", "0.attn.v:4", "1.mlp.post_act:2"], kind="zero"):
        inside = jacobian(model, ids)
        dense = jacobian_dense(model, ids)
        assert float((inside.to_dense() - dense).abs().max()) < EXACT
    assert float((inside.to_dense() - dense).abs().max()) < EXACT  # also after the context has ended
    assert not torch.allclose(free, dense)
    with model.ablate(["1.mlp.post_act:2"], kind="zero"), pytest.raises(ValueError, match="ablations"):
        jacobian(model, ids, "1.resid_in", "final_resid") @ jacobian_outside(model, ids)
    with model.ablate(["0.attn.v:1"], kind="zero"):  # at the source, where the tangent is added after it
        J = jacobian(model, ids, "0.attn.v", "0.attn.y")
        assert bool(J.to_dense().reshape(-1, 2, 7, 12)[..., 1].any())


def jacobian_outside(model: CircuitGPT, ids: Tensor):
    active, model._interventions = model._interventions, []
    try:
        return jacobian(model, ids, "0.resid_in", "1.resid_in")
    finally:
        model._interventions = active


def test_user_hooks_on_modules_count() -> None:
    model = build("plain")
    ids = tokens(model, 1, 3)
    handle = model.transformer["h"][0].mlp.register_forward_hook(lambda module, given, output: 3 * output)
    check(model, ids, "0.resid_mid", "1.resid_in")
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[1, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[1] = torch.tensor([1, 1, 1, 1, 0, 0, 0])
    check(model, ids, "0.resid_in", "final_resid", (None, -1), attention_mask=mask)
    real = slice(3, 7) if side == "left" else slice(0, 4)
    padded = jacobian(model, ids, "0.resid_in", "logits", real, attention_mask=mask).to_dense()
    alone = jacobian(model, ids[1:, real], "0.resid_in", "logits").to_dense()
    half = (padded.shape[0] // 2, padded.shape[1] // 2)
    torch.testing.assert_close(padded[half[0] :, half[1] :], alone, rtol=EXACT, atol=1e-12)
    assert not padded[: half[0], half[1] :].any()  # rows of the batch are independent
    first, last = (0, 6) if side == "left" else (4, 6)
    if side == "left":
        with pytest.raises(ValueError, match="no path"):
            jacobian(model, ids[1:], "0.resid_in", "logits", (first, last), attention_mask=mask[1:])


def test_a_batch_as_tokenizers_give_it() -> None:
    model = build("plain")
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    places = torch.arange(7).flip(0).expand(2, 7)
    beside = jacobian(model, ids, attention_mask=mask, position_ids=places).to_dense()
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "token_type_ids": 0 * ids}
    assert torch.equal(jacobian(model, batch).to_dense(), beside)
    assert float((jacobian_dense(model, ids, attention_mask=mask, position_ids=places) - beside).abs().max()) < EXACT
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        jacobian(model, batch, attention_mask=mask)
    with pytest.raises(ValueError, match="inputs_embeds"):
        jacobian(model, {"inputs_embeds": mask})


def test_a_function_of_the_value_is_a_target() -> None:
    model = build("sink")
    ids = tokens(model)
    difference = lambda logits: logits[:, -1, 3] - logits[:, -1, 5]  # noqa: E731
    J = jacobian(model, ids, target=difference)
    assert (J.target_shape, J.shape) == ((2,), (2, 2 * 7 * 12))
    dense = jacobian_dense(model, ids, target="logits", function=difference)
    assert float((J.to_dense() - dense).abs().max()) < EXACT
    total = jacobian(model, ids, "1.attn.q", ("1.attn.y", lambda y: (y**2).sum()), (None, [1, 2]))
    assert total.primal.shape == ()
    dense = jacobian_dense(model, ids, "1.attn.q", "1.attn.y", (slice(None), [1, 2]), function=lambda y: (y**2).sum())
    assert float((total.to_dense() - dense).abs().max()) < EXACT
    assert total.jvp(torch.zeros(3, *total.source_shape, dtype=torch.float64)).shape == (3,)
    assert total.vjp(torch.ones(2, dtype=torch.float64)).shape == (2, 2, 7, 12)
    with pytest.raises(TypeError, match="must give a tensor"):
        jacobian(model, ids, target=lambda logits: 3)
    with pytest.raises(TypeError, match=r"int64.*floating"):
        jacobian(model, ids, target=lambda logits: logits.argmax(-1))
    with pytest.raises(TypeError, match="target is 3"):
        jacobian(model, ids, target=3)


def test_one_token_and_full_context() -> None:
    model = build("like_csp_yolo2")
    check(model, tokens(model, 1, 1), "0.resid_in", "logits")
    check(model, tokens(model, 1, 12), "0.resid_in", "1.resid_in")


def test_bad_names_and_inputs() -> None:
    model = build("plain")
    ids = tokens(model)
    with pytest.raises(ValueError, match=r"unknown source '0.resid_inn'.*'0.resid_in'"):
        jacobian(model, ids, "0.resid_inn")
    with pytest.raises(ValueError, match="unknown source 'logits'"):
        jacobian(model, ids, "logits", "logits")
    with pytest.raises(ValueError, match="unknown target '7.resid_in'"):
        jacobian(model, ids, target="7.resid_in")
    with pytest.raises(TypeError, match="source is 0"):
        jacobian(model, ids, source=0)
    with pytest.raises(TypeError, match="input_ids"):
        jacobian(model, ids.double())
    with pytest.raises(ValueError, match="empty"):
        jacobian(model, ids[:, :0])
    with pytest.raises(TypeError, match="model is str"):
        jacobian("gpt2", ids)


def test_nan_in_the_primal() -> None:
    model = build("plain")
    ids = tokens(model)
    with torch.no_grad():
        model.transformer["h"][1].mlp.c_proj.bias[4] = float("nan")
    with pytest.raises(ValueError, match=r"14 NaN at 'final_resid', the first at index \(0, 0, 4\)"):
        jacobian(model, ids)
    jacobian(model, ids, target="1.mlp.post_act")  # the pass stops before the NaN


def test_the_pass_stops_at_the_target() -> None:
    model = build("plain")
    handle = model.transformer["h"][1].register_forward_pre_hook(lambda *_: pytest.fail("went on"))
    J = jacobian(model, tokens(model), "0.resid_in", "0.resid_mid")
    V = torch.ones(1, *J.source_shape, dtype=J.dtype)
    assert J.jvp(V).shape == J.vjp(V).shape
    handle.remove()


def test_a_changed_weight_is_noticed() -> None:
    model = build("plain")
    J = jacobian(model, tokens(model))
    V = torch.ones(1, *J.source_shape, dtype=J.dtype)
    J.jvp(V)
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight.mul_(2)
    for product in (J.jvp, J.vjp):
        with pytest.raises(RuntimeError, match="weights changed"):
            product(V)


def test_the_callers_state_is_left_alone_and_does_not_matter() -> None:
    model = build("topk_everywhere").train()
    ids = tokens(model)
    V = torch.randn(2, 2, 7, 12, dtype=torch.float64)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        J = jacobian(model, ids)
        out = J.jvp(V), J.vjp(V)
    assert not any(each.requires_grad for each in out)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            K = jacobian(model, ids.clone())
            assert torch.equal(K.jvp(V), out[0]) and torch.equal(K.vjp(V.clone()), out[1])
    ids[0, 0] = (ids[0, 0] + 1) % 13  # the operator keeps its own copy
    assert torch.equal(J.jvp(V), out[0])


def test_float32() -> None:
    double, single = build("sink"), build("sink", torch.float32)
    ids = tokens(double)
    J = jacobian(single, ids)
    assert J.dtype == J.primal.dtype == J.to_dense().dtype == torch.float32
    right = jacobian(double, ids).to_dense()
    # About 150 sums and products follow one another, and each is rounded by at most 2^-24.
    assert float((J.to_dense().double() - right).norm() / right.norm()) <= 150 * 2.0**-24


@pytest.mark.parametrize("case", ["plain", "topk_everywhere", "like_csp_yolo2"])
def test_float32_layer_by_layer_with_the_masks_given(case: str) -> None:
    """Each layer starts from the same value in both precisions, and the kept entries must agree.

    In float32 a TopK near a tie may choose differently, and the difference would cascade through the layers.
    """
    single, double = build(case, torch.float32), build(case)
    double.load_state_dict(single.double().state_dict())
    single = single.float()
    ids = tokens(single, 2, 7)
    _, values = single.run_with_cache(ids)

    def masks(model: CircuitGPT) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        with watch_masks(lambda name, x, k: seen.__setitem__(name, topk_mask(x, k) if k is not None else x > 0)):
            model.run_with_cache(ids, [])
        return seen

    for i in range(2):
        start, end = f"{i}.resid_in", "1.resid_in" if i == 0 else "final_resid"
        given = values[start].double()
        with Ablation(double, lambda name, value, at=start, given=given: given if name == at else value):
            kept = {name: mask for name, mask in masks(double).items() if name.startswith(f"{i}.")}
            assert all(torch.equal(mask, masks(single)[name]) for name, mask in kept.items())
            right = jacobian(double, ids, start, end).to_dense()
        found = jacobian(single, ids, start, end).to_dense()
        assert float((found.double() - right).norm() / right.norm()) <= 1e-5


@settings(max_examples=20, deadline=None)
@given(
    case=st.sampled_from([name for name in CASES if name != "no_layer"]),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    length=st.integers(1, 5),
    data=st.data(),
)
def test_random_configurations(case: str, seed: int, batch: int, length: int, data) -> None:
    model = build(case, seed=seed)
    names = [*model.hook_names, "logits"]
    source = data.draw(st.sampled_from(names[:-1]))
    target = data.draw(st.sampled_from(names[names.index(source) :]))
    picks = st.one_of(st.none(), st.lists(st.integers(0, length - 1), min_size=1, max_size=2, unique=True))
    positions = (data.draw(picks), data.draw(picks))
    ids = tokens(model, batch, length, seed)
    dense = jacobian_dense(model, ids, source, target, positions)
    try:
        J = jacobian(model, ids, source, target, positions)
    except ValueError as error:
        assert "no path" in str(error)
        assert not dense.any()
        return
    T = data.draw(st.integers(0, 3))
    V = torch.randn(T, *J.source_shape, dtype=torch.float64)
    U = torch.randn(T, *J.target_shape, dtype=torch.float64)
    scale = max(1e-3, float(dense.abs().max()))
    assert J.jvp(V).shape == (T, *J.target_shape) and J.vjp(U).shape == (T, *J.source_shape)
    for got, want in ((J.jvp(V), V.flatten(1) @ dense.T), (J.vjp(U), U.flatten(1) @ dense)):
        if T:
            assert float((got.flatten(1) - want).abs().max()) <= 1e-9 * scale * dense.shape[1]


def test_a_model_that_an_intervention_runs_is_not_taken_for_the_traced_one() -> None:
    model, other = build("like_csp_yolo2"), build("like_csp_yolo2")
    torch.nn.init.normal_(other.transformer.h[0].attn.c_attn.weight)
    ids = tokens(model)

    def scaled(name: str, value: Tensor) -> Tensor:
        return value * 1.1 if name == "0.mlp.act_in" else value

    def nested(name: str, value: Tensor) -> Tensor:
        if name == "0.mlp.act_in":
            other(ids)
        return scaled(name, value)

    products = []
    for intervention in (scaled, nested):
        model._interventions.append(intervention)
        J = jacobian(model, ids)
        products.append(J.jvp(torch.ones(1, *J.source_shape, dtype=J.dtype)))
        model._interventions.pop()
    assert torch.equal(*products)
