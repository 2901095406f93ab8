"""Compiled models, and models used by several threads at once."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalpel
from circuitgpt_cases import build, tokens
from decoder_cases import exact_norms, ids_of, model_of
from running_cases import collected, gradient_of, products, second_moment
from scalpel.hooks.running import evaluating

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


def _in_place(model: Any) -> Any:
    model.compile(backend="aot_eager")
    return model


def _a_layer_in_place(model: Any) -> Any:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    layers[1].compile(backend="aot_eager")
    return model


def _a_layer(model: Any) -> Any:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    layers[1] = torch.compile(layers[1], backend="aot_eager")
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "the model, in place": _in_place,
    "the model, wrapped": lambda model: torch.compile(model, backend="aot_eager"),
    "a layer, in place": _a_layer_in_place,
    "a layer, wrapped": _a_layer,
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_model_gives_what_it_gave_before(name: str, how: str) -> None:
    torch._dynamo.reset()
    ids = ids_of()
    plain = model_of(name).requires_grad_(True)
    expected = second_moment(gradient_of(plain, ids, 1))
    assert float(expected.trace()) > 1e-3
    ends = {
        "gpt2": ("transformer.h.0", "transformer.h.1.mlp.c_fc"),
        "llama": ("model.layers.0", "model.layers.1.mlp.up_proj"),
    }
    by_rules, by_paths = products(plain, ids), products(plain, ids, *ends[name])
    model = COMPILED[how](model_of(name).requires_grad_(True))
    torch.testing.assert_close(collected(model, ids), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(products(model, ids), by_rules, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(products(model, ids, *ends[name]), by_paths, rtol=1e-7, atol=1e-9)
    assert collected(model, ids, ends[name][1]).shape == collected(plain, ids, ends[name][1]).shape
    found, before = (scalpel.lyapunov(each, ids, 2).exponents for each in (model, plain))
    torch.testing.assert_close(found, before, rtol=1e-6, atol=1e-8)


def test_a_compiled_circuitgpt() -> None:
    torch._dynamo.reset()
    plain = build("like_csp_yolo2")
    ids = tokens(plain)
    expected, tangents = collected(plain, ids), products(plain, ids)
    model = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    assert torch.equal(collected(model, ids), expected)
    assert torch.equal(products(model, ids), tangents)


# ---- several threads -----------------------------------------------------------------------------


def test_collecting_from_several_threads_on_one_model() -> None:
    model = model_of("llama")
    batches = [ids_of(2, 8, seed) for seed in range(8)]
    expected = [collected(model, ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(lambda ids: collected(model, ids), batches), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2, by torch.func", "circuitgpt"])
def test_jacobians_beside_collecting_and_plain_passes(name: str) -> None:
    model: Any = build("like_csp_yolo2") if name == "circuitgpt" else model_of(name.partition(",")[0])
    ids = ids_of() % 11
    ends = ("transformer.h.0", "transformer.h.1.mlp.c_fc") if "torch.func" in name else ()

    def plain(ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = model(ids)
        return output if isinstance(output, Tensor) else output.logits

    jobs: list[Callable[[], Tensor]] = [
        lambda: products(model, ids, *ends),
        lambda: collected(model, ids),
        lambda: plain(ids),
    ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for number, found in enumerate(pool.map(lambda i: jobs[i % 3](), range(24))):
            torch.testing.assert_close(found, expected[number % 3], rtol=1e-6, atol=1e-9)


def test_training_flags_are_put_back_by_the_last_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[0].eval()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with evaluating(model):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert not model[1].training, "the other thread still needs it"
    leave.set()
    thread.join()
    assert [module.training for module in model.modules()] == [True, False, True]
