"""Mixtures of experts with transformers' default experts, beside copies that compute their experts in a loop."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import scalpel
from decoder_cases import ids_of
from expert_cases import MODELS, experts_model, one_by_one
from running_cases import second_moment
from scalpel.hooks.grouped import GroupByGroup
from wrapper_cases import mapped

transformers = pytest.importorskip("transformers", minversion="5.0")
SOURCE, TARGET = "model.layers.0:in", "model.norm:in"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


def products(J: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    V, U = (torch.randn(2, *shape, generator=generator).to(J.dtype) for shape in (J.source_shape, J.target_shape))
    return [J.primal, J.jvp(V), J.vjp(U)]


def expected(model: Any, ids: Tensor, source: str = SOURCE, target: str = TARGET) -> list[Tensor]:
    """The same by plain autograd over a copy without grouped products."""
    value_of = mapped(one_by_one(model), ids, source, target)
    zero = torch.zeros(*ids.shape, model.config.hidden_size, dtype=torch.float64)
    primal = value_of(zero)
    generator = torch.Generator().manual_seed(0)
    V, U = (torch.randn(2, *shape, generator=generator).double() for shape in (zero.shape, primal.shape))
    pushed = [functional.jvp(value_of, zero, tangent)[1] for tangent in V]
    pulled = [functional.vjp(value_of, zero, cotangent)[1] for cotangent in U]
    return [each.detach() for each in (primal, torch.stack(pushed), torch.stack(pulled))]


def close(found: list[Tensor], wanted: list[Tensor], error: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).norm() <= error * theirs.norm()


@pytest.mark.parametrize("name", MODELS)
def test_products_in_float64(name: str) -> None:
    """The kernel itself takes no float64, in which derivatives are checked."""
    model, ids = experts_model(name), ids_of()
    close(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), expected(model, ids), 1e-6)
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("name", MODELS)
def test_products_in_float32(name: str) -> None:
    model, ids = experts_model(name, torch.float32), ids_of()
    before = model(ids).logits
    close(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), expected(model, ids), 1e-4)
    assert torch.equal(model(ids).logits, before), "the model's own forward pass is as before"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_tangent_beside_finite_differences(name: str) -> None:
    model, ids = experts_model(name), ids_of(1, 5)
    J = scalpel.jacobian(model, ids, SOURCE, "logits")
    tangent = torch.randn(J.source_shape, dtype=torch.float64)
    other, step = one_by_one(model), 1e-4  # the norms round to float32, so a smaller step measures their rounding
    embedded = other.get_input_embeddings()(ids)
    ahead, behind = (other(inputs_embeds=embedded + sign * step * tangent).logits for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    close([J.jvp(tangent[None])[0]], [difference], 5e-3)


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_an_implementation_that_the_user_chose(chosen: str) -> None:
    model, ids = experts_model("mixtral"), ids_of()
    model.set_experts_implementation(chosen)
    close(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), expected(model, ids), 1e-6)
    assert model.config._experts_implementation == chosen


def test_operators_of_transformers_in_place_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it falls back to with old PyTorch, and on GPUs that have no kernel."""
    monkeypatch.setattr(transformers.integrations.moe, "_can_use_grouped_mm", lambda *_: False)
    model, ids = experts_model("mixtral"), ids_of()
    close(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), expected(model, ids), 1e-6)


def test_models_of_several_kinds_side_by_side() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = experts_model("mixtral").model, one_by_one(experts_model("olmoe")).model
            self.head = nn.Linear(16, 3).double()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.first(input_ids, use_cache=False).last_hidden_state
            return self.head(self.second(inputs_embeds=x, use_cache=False).last_hidden_state)

    both, ids = Both(), ids_of()
    J = scalpel.jacobian(both, (ids,), "first.layers.0:in", "head")
    other = Both()
    other.load_state_dict(both.state_dict())
    other.first.set_experts_implementation("eager")
    zero = torch.zeros(*ids.shape, 16, dtype=torch.float64)
    tangent = torch.randn_like(zero)

    def value_of(delta: Tensor) -> Tensor:
        handle = other.first.layers[0].register_forward_pre_hook(lambda _, given: (given[0] + delta, *given[1:]))
        value = other(ids)
        handle.remove()
        return value

    with sdpa_kernel(SDPBackend.MATH):
        wanted = functional.jvp(value_of, zero, tangent)[1].detach()
    close([J.jvp(tangent[None])[0]], [wanted], 1e-6)
    kinds = [each.config._experts_implementation for each in (both.first, both.second)]
    assert kinds == ["grouped_mm", "eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_collected_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    model, ids = experts_model(name, dtype), ids_of()
    hook = "model.layers.1.mlp"
    found = scalpel.collect(model, [ids], [hook, f"{hook}.grad"], center=False, progress=False)
    other, held = one_by_one(model), []

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[0]

    handle = other.model.layers[1].mlp.register_forward_hook(keep)
    logits = other(ids).logits
    handle.remove()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (slope,) = torch.autograd.grad(loss, held[0])
    pairs = ((hook, held[0].detach()), (f"{hook}.grad", slope))
    for stream, rows in pairs:
        close([found[stream].covariance()], [second_moment(rows.flatten(0, 1))], 1e-4)


def test_lyapunov_and_singular_values() -> None:
    model, ids = experts_model("mixtral"), ids_of(1, 2)
    hooks = [SOURCE, "model.layers.1:in", TARGET]
    value_of = mapped(one_by_one(model), ids, SOURCE, TARGET)
    dense = functional.jacobian(value_of, torch.zeros(1, 2, 16, dtype=torch.float64)).reshape(32, 32)
    singular = torch.linalg.svdvals(dense)[:2]
    found = scalpel.lyapunov(model, ids, 2, hooks=hooks, cumulative=False, probes=0, draws=1)
    torch.testing.assert_close(found.exponents, singular.log() / 2, rtol=1e-5, atol=1e-6)
    _, S, _ = scalpel.jacobian(model, ids, SOURCE, TARGET).svd(2)
    torch.testing.assert_close(S, singular, rtol=1e-5, atol=1e-6)


# ---- nothing is left behind ----------------------------------------------------------------------


def takes_no_float64(model: Any, ids: Tensor) -> bool:
    """Whether the model's own forward pass goes through PyTorch's kernel, which refuses float64."""
    try:
        with torch.no_grad():
            model(ids)
    except RuntimeError as error:
        return "Double" in str(error)
    return False


def test_the_kernel_runs_again_after_a_call_and_after_an_error() -> None:
    model, ids = experts_model("mixtral"), ids_of()
    if not takes_no_float64(model, ids):
        pytest.skip("this PyTorch has no kernel, or one that takes float64")
    J = scalpel.jacobian(model, ids, SOURCE, TARGET)
    J.jvp(torch.ones(1, *J.source_shape, dtype=torch.float64))
    assert takes_no_float64(model, ids)

    def raising(value: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        scalpel.jacobian(model, ids, SOURCE, (TARGET, raising))
    handle = model.model.layers[1].register_forward_hook(lambda *_: raising(ids))
    with pytest.raises(ArithmeticError, match="on purpose"):
        scalpel.jacobian(model, ids, SOURCE, TARGET)
    with pytest.raises(ArithmeticError, match="on purpose"):
        scalpel.collect(model, [ids], ["model.layers.0"], progress=False)
    handle.remove()
    assert takes_no_float64(model, ids) and model.config._experts_implementation == "grouped_mm"


def test_another_thread_notices_nothing() -> None:
    model, ids = experts_model("mixtral"), ids_of()
    if not takes_no_float64(model, ids):
        pytest.skip("this PyTorch has no kernel, or one that takes float64")
    inside, leave = threading.Event(), threading.Event()

    def hold(value: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(60)
        return value

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scalpel.jacobian, model, ids, SOURCE, (TARGET, hold))
        assert inside.wait(60)
        assert takes_no_float64(model, ids), "the mode of the other thread is not in force here"
        leave.set()
        waiting.result()


def test_products_of_two_threads_beside_plain_passes() -> None:
    model = experts_model("qwen3_moe", torch.float32)
    batches = [ids_of(1, 5, seed) for seed in range(4)]
    wanted = [(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), model(ids).logits) for ids in batches]

    def job(number: int) -> list[Tensor]:
        ids = batches[number % 4]
        if number % 2:
            with torch.no_grad():
                return [model(ids).logits]
        return products(scalpel.jacobian(model, ids, SOURCE, TARGET))

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(job, range(16))):
            both = wanted[number % 4]
            for ours, theirs in zip(found, [both[1]] if number % 2 else both[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- experts of other kinds ----------------------------------------------------------------------


def test_experts_that_nothing_is_known_of_are_named() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope * 2

    def experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return Opaque.apply(x)

    functions = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    functions.register("of_a_library", experts)
    try:
        model, ids = experts_model("mixtral"), ids_of()
        model.set_experts_implementation("of_a_library")
        with pytest.raises(
            NotImplementedError, match=r"'of_a_library'.*model\.set_experts_implementation\('batched_mm'"
        ):
            J = scalpel.jacobian(model, ids, SOURCE, TARGET)
            J.vjp(torch.ones(1, *J.target_shape, dtype=torch.float64))
        model.set_experts_implementation("batched_mm")
        close(products(scalpel.jacobian(model, ids, SOURCE, TARGET)), expected(model, ids), 1e-6)
    finally:
        functions._global_mapping.pop("of_a_library", None)


# ---- the products by themselves ------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 0], [1, 4, 4], [3, 4, 7]])
def test_each_group_is_multiplied_by_its_matrix(ends: list[int]) -> None:
    rows, matrices = torch.randn(7, 4, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    offs = torch.tensor(ends, dtype=torch.int32)
    with GroupByGroup() as mode:
        found = torch._grouped_mm(rows, matrices, offs=offs)
    assert mode.used
    group = [sum(end <= i for end in ends) for i in range(7)]  # the group of each row; 3 where it has none
    for i, g in enumerate(group):
        wanted = rows[i] @ matrices[g] if g < 3 else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(found[i], wanted)
    empty = rows[:0]
    with GroupByGroup():
        assert torch._grouped_mm(empty, matrices, offs=torch.zeros(3, dtype=torch.int32)).shape == (0, 2)


def test_other_grouped_products_are_left_to_torch() -> None:
    a, b = torch.randn(3, 4, 8), torch.randn(3, 8, 16)
    with GroupByGroup():
        found = torch._grouped_mm(a, b)  # three products of equal size, which are no experts
    torch.testing.assert_close(found, torch.bmm(a, b), rtol=1e-4, atol=1e-4)
