"""Steering, ablating and swapping change a layer's output as their formulas say, token by token, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scalpel
from lens_cases import KINDS, blocks_of, by_hand, lens_model, logits_of, random_lens, states_of

IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


def with_replaced(model: Any, layer: int, change: Callable[[Tensor], Tensor], ids: Tensor, **inputs: Any) -> Tensor:
    """The model's logits when ``change`` acts on what a layer leaves, by the model's own hooks."""
    if hasattr(model, "run_with_hooks"):
        return model.run_with_hooks(ids, [(f"{layer + 1}.resid_in", lambda value, name: change(value))], **inputs)

    def hook(module: Any, given: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    try:
        return logits_of(model, ids, **inputs)
    finally:
        handle.remove()


def tokenwise(change: Callable[[Tensor, int, int], Tensor], columns: Any = None) -> Callable[[Tensor], Tensor]:
    """Apply ``change(h, row, column)`` to each token on its own."""

    def of_values(value: Tensor) -> Tensor:
        value = value.clone()
        for row in range(value.shape[0]):
            for column in range(value.shape[1]):
                if columns is None or column in columns:
                    value[row, column] = change(value[row, column], row, column)
        return value

    return of_values


def direction(model: Any, lens: scalpel.JacobianLens, token: int, layer: int) -> Tensor:
    v = lens.J[layer].double().T @ dict(model.named_modules())["lm_head"].weight.double()[token]
    return v / v.norm()


@pytest.mark.parametrize("positions", [None, [1, -1], slice(0, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_steer_adds_a_unit_vector_times_the_median_norm(kind: str, positions: Any) -> None:
    model = lens_model(kind)
    lens = random_lens(model)
    v = direction(model, lens, 6, 0)
    norms = states_of(model, IDS)[0].norm(dim=-1)
    columns = list(range(5))[positions] if isinstance(positions, slice) else positions and [c % 5 for c in positions]
    right = with_replaced(
        model, 0, tokenwise(lambda h, row, _: h + 1.5 * float(norms[row].sort().values[2]) * v, columns), IDS
    )
    with lens.steer(6, 1.5, 0, positions) as inside:
        assert inside is model
        found = logits_of(model, IDS)
    assert torch.allclose(found, right, atol=1e-6) and not torch.allclose(found, logits_of(model, IDS), atol=1e-2)


def test_padding_has_no_part_in_the_median() -> None:
    for kind in ("llama", "circuit"):
        model = lens_model(kind)
        lens = random_lens(model)
        alone = torch.tensor([[3, 1, 4]])
        padded = torch.tensor([[9, 9, 3, 1, 4]])
        mask = torch.tensor([[0, 0, 1, 1, 1]])
        positions = {} if kind == "circuit" else {"position_ids": torch.tensor([[0, 0, 0, 1, 2]])}
        with lens.steer("g", 2.0, 0):
            right = logits_of(model, alone)
            found = logits_of(model, padded, attention_mask=mask, **positions)
        assert torch.allclose(found[:, 2:], right, atol=1e-6), kind


def test_a_norm_that_is_given_and_vectors_that_are_given() -> None:
    model = lens_model("gpt2")
    lens = random_lens(model)
    v = torch.randn(12, generator=torch.Generator().manual_seed(5))
    unit = v.double() / v.double().norm()
    right = with_replaced(model, 1, lambda value: value - 3.0 * unit, IDS)
    for norm in (1.5, {1: 1.5}):
        with lens.steer(v, -2.0, [1], norm=norm):
            assert torch.allclose(logits_of(model, IDS), right, atol=1e-6)
    with lens.steer({1: v}, -2.0, 1, norm=1.5):
        assert torch.allclose(logits_of(model, IDS), right, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ablate_removes_the_span_once(kind: str) -> None:
    model = lens_model(kind)
    lens = random_lens(model)
    tokens = [6, 2, 6]  # one of them twice

    def without(h: Tensor, row: int, column: int) -> Tensor:
        V = torch.stack([direction(model, lens, token, 0) for token in tokens[:2]], 1)
        return h - V @ torch.linalg.lstsq(V, h[:, None]).solution[:, 0]

    right = with_replaced(model, 0, tokenwise(without, [0, 3]), IDS)
    with lens.ablate(tokens, 0, [0, 3]):
        found = logits_of(model, IDS)
    assert torch.allclose(found, right, atol=1e-6) and not torch.allclose(found, logits_of(model, IDS), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_swap_exchanges_coordinates(kind: str) -> None:
    model = lens_model(kind)
    lens = random_lens(model)
    V = torch.stack([direction(model, lens, token, 0) for token in (6, 2)], 1)

    def swapped(alpha: float) -> Callable[[Tensor, int, int], Tensor]:
        def change(h: Tensor, row: int, column: int) -> Tensor:
            c = torch.linalg.lstsq(V, h[:, None]).solution[:, 0]
            return h + alpha * (V[:, 0] * (c[1] - c[0]) + V[:, 1] * (c[0] - c[1]))

        return change

    for alpha in (1.0, 2.0):
        right = with_replaced(model, 0, tokenwise(swapped(alpha)), IDS)
        with lens.swap(6, 2, 0, alpha):
            assert torch.allclose(logits_of(model, IDS), right, atol=1e-6)
    u = V[:, 0] - V[:, 1]
    reflected = with_replaced(model, 0, lambda h: h - 2 * (h @ u)[..., None] * u / (u @ u), IDS)
    with lens.swap("g", "c", 0):
        assert torch.allclose(logits_of(model, IDS), reflected, atol=1e-6)


def test_the_clamp_sets_the_clean_coordinates_at_every_layer() -> None:
    model = lens_model("llama")
    lens = random_lens(model)
    clean = states_of(model, IDS)
    text = torch.tensor([[3, 1, 4, 1, 5]])
    with lens.swap(6, 2, [0, 1], clean=IDS), lens.swap(6, 2, [0, 1], clean=IDS):  # twice is once, unlike without clean
        changed = states_of(model, IDS)
    for layer in (0, 1):
        V = torch.stack([direction(model, lens, token, layer) for token in (6, 2)], 1)
        right = (clean[layer] @ torch.linalg.pinv(V).T).flip(-1)
        assert torch.allclose(changed[layer] @ torch.linalg.pinv(V).T, right, atol=1e-6)
    with lens.swap(6, 2, 0, clean="dbebf"), pytest.raises(ValueError, match="clean run has 1 texts of 5 tokens"):
        logits_of(model, torch.cat([text, text], 1))
    with lens.steer(3, 5.0, 0), lens.swap(6, 2, 0, clean=text):  # the clean run has no other intervention
        (state, *_) = states_of(model, text)
    V = torch.stack([direction(model, lens, token, 0) for token in (6, 2)], 1)
    right = (states_of(model, text)[0] @ torch.linalg.pinv(V).T).flip(-1)
    assert torch.allclose(state @ torch.linalg.pinv(V).T, right, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "circuit"])
def test_nothing_is_changed_by_zero_or_after_the_context(kind: str) -> None:
    model = lens_model(kind).float()
    lens, before = random_lens(model), logits_of(model, IDS)
    with lens.steer(6, 0.0, 0), lens.swap(6, 2, 0, 0.0), lens.swap(6, 2, 0, 0, clean=IDS):
        assert torch.equal(logits_of(model, IDS), before)
    with pytest.raises(RuntimeError, match="on purpose"), lens.steer(6, 1.0, 0), lens.ablate(6, 0):
        raise RuntimeError("on purpose")
    assert torch.equal(logits_of(model, IDS), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not getattr(model, "_interventions", [])
    one = lens.steer(6, 1.0, 0)
    with pytest.raises(RuntimeError, match="wasn't entered"):
        one.__exit__()


@pytest.mark.parametrize("kind", ["gpt2", "circuit"])
def test_contexts_nest_in_their_order(kind: str) -> None:
    model = lens_model(kind)
    lens = random_lens(model)
    u, v = (direction(model, lens, token, 0) for token in (6, 2))

    def both(h: Tensor) -> Tensor:
        h = h + 4.0 * u
        return h - (h @ v)[..., None] * v

    right = with_replaced(model, 0, both, IDS)
    pushed = with_replaced(model, 0, lambda h: h + 8.0 * u, IDS)
    steer = lens.steer(6, 2.0, 0, norm=2.0)
    with steer, lens.ablate(2, 0):
        assert torch.allclose(logits_of(model, IDS), right, atol=1e-6)
    with steer, steer:  # one context twice
        assert torch.allclose(logits_of(model, IDS), pushed, atol=1e-6)


def test_readouts_and_jacobians_see_what_is_changed() -> None:
    for kind in ("gpt2", "circuit"):
        model = lens_model(kind)
        lens, ids = random_lens(model), IDS[:1]
        with lens.steer(6, 5.0, 0), lens.ablate(2, 0):
            states = states_of(model, ids)
            found = lens.readout(ids, layers=0, lens="logit", k=3)
            J = scalpel.jacobian(model, ids, "0.resid_in", "1.resid_in")
            tangent = torch.randn(1, *J.source_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            moved = J.jvp(tangent)[0]
        assert torch.allclose(J.primal, states[0], atol=1e-9)
        v = direction(model, lens, 2, 0)
        assert float((moved @ v).abs().max()) < 1e-9 < float(moved.abs().max())
        right = by_hand(model, states[0][0], ids[0]).sort(descending=True).values[:, :3]
        assert torch.allclose(found.logit.logits[0], right, atol=1e-5)


def test_generation_with_a_cache_is_changed_as_without() -> None:
    model = lens_model("llama")
    lens, ids = random_lens(model), IDS[:1]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for positions in (None, [1, 2], slice(4, None), -1):
        with lens.steer(6, 3.0, [0, 1], positions, norm=2.0):
            cached = model.generate(ids, **settings)
            if positions == -1:  # without a cache the last token is another one at each step
                continue
            whole = model.generate(ids, use_cache=False, **settings)
        assert torch.equal(cached.sequences, whole.sequences)
        assert torch.allclose(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5)


def test_a_model_of_transformers_that_stands_for_a_circuit_is_steered() -> None:
    from scalpel.models.transformers_classes import CircuitGPTForCausalLM

    core = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    model = CircuitGPTForCausalLM.from_pretrained(core.folder)
    J = {0: torch.randn(128, 128, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([core.tokenizer.encode("x = [[1, 2")])
    with scalpel.JacobianLens(J, 1).attach(core).steer("]", 3.0, 0):
        right = core(ids)
    lens = scalpel.JacobianLens(J, 1).attach(model, core.tokenizer)
    with lens.steer("]", 3.0, 0):
        found = model(ids).logits
        lens.readout(ids, k=1)
    assert torch.equal(found, right) and not torch.equal(core(ids), right)


def test_layers_by_paths_are_changed_too() -> None:
    model = lens_model("llama")
    J = {"model.layers.1": torch.eye(12)}
    lens = scalpel.JacobianLens(J, 1, about={"target": "model.layers.2"}).attach(model)
    v = direction(model, random_lens(model), 6, 0)
    with lens.steer(v, 2.0, "model.layers.1", norm=1.0):
        found = logits_of(model, IDS)
    assert torch.allclose(found, with_replaced(model, 1, lambda h: h + 2.0 * v, IDS), atol=1e-6)


def test_directions_that_are_alike() -> None:
    model = lens_model("gpt2")
    lens, v = random_lens(model), torch.zeros(12)
    v[0] = 1
    near, same = v.clone(), v.clone()
    near[1], same[1] = 0.1, 0.01
    with pytest.warns(UserWarning, match=r"\|cosine\| 0\.9950 at layer 0"):
        lens.swap(v, near, 0)
    with pytest.raises(ValueError, match=r"\|cosine\| 1\.0000 at layer 0.*below 0\.999 is allowed"):
        lens.swap(v, -same, 0)


def test_refusals() -> None:
    model = lens_model("gpt2")
    lens = random_lens(model)
    for call, message in (
        (lambda: lens.steer(6, 1.0, 7), "no layer 7"),
        (lambda: lens.steer([6, 2], 1.0, 0), "2 vectors were given for layer 0; steer takes one"),
        (lambda: lens.steer(torch.zeros(12), 1.0, 0), "is zero, and has no direction"),
        (lambda: lens.steer(torch.ones(5), 1.0, 0), r"shape \(5,\)|shape \(1, 5\); expected \(12,\)"),
        (lambda: lens.steer({0: torch.ones(12)}, 1.0, [0, 1]), "no vector for layer 1"),
        (lambda: lens.steer(6, 1.0, [0, 1], norm={0: 1.0}), "norm has no entry for layer 1"),
        (lambda: lens.ablate(torch.full((12,), torch.nan), 0), "NaN"),
        (lambda: lens.ablate([], 0), "at least one"),
        (lambda: lens.swap(6, [2, 3], 0), "one token or vector for each"),
        (lambda: lens.steer("zzz", 1.0, 0), "'zzz'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with lens.steer(6, 1.0, 0, positions=[5]), pytest.raises(ValueError, match="position 5 is outside the text of 5"):
        logits_of(model, IDS)
