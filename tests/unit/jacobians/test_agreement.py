"""The first call on a decoder compares it with its family's rules, on a few tokens but with full power."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoder_cases import ids_of, model_of
from edited_decoders import EDITS
from scalpel import jacobian
from scalpel.hooks.inputs import Inputs
from scalpel.jacobians.rows import agreement, trace
from scalpel.jacobians.rows.decoder_pass import DecoderPass

pytest.importorskip("transformers")

DEPTH = 3
# Close to the largest supported position.
LENGTHS = {"gpt2": 16, "gpt_neox": 30, "llama": 30, "mistral": 30, "qwen2": 30}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Record the number of tokens that pass through each layer, of transformers' code and of ours."""
    own: list[int] = []
    ours: list[int] = []
    family = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    rotated, through = family.apply_rotary_pos_emb, trace.through_layer  # each is called once per layer

    def rotate(q: Tensor, *rest: Any, **options: Any) -> Any:
        own.append(q.shape[0] * q.shape[-2])
        return rotated(q, *rest, **options)

    def layer(decoder: Any, i: int, weights: Any, x: Tensor, *rest: Any) -> Tensor:
        ours.append(x.shape[0] * x.shape[1])
        return through(decoder, i, weights, x, *rest)

    # A function of the tests' own would be seen, and all of the batch compared.
    as_theirs = {**rotate.__globals__, "__name__": "transformers.counted"}
    rotate = FunctionType(rotate.__code__, as_theirs, closure=rotate.__closure__)
    monkeypatch.setattr(family, "apply_rotary_pos_emb", rotate)
    monkeypatch.setattr(trace, "through_layer", layer)
    return own, ours


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_the_first_call_runs_the_text_through_each_layer_once(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(name), ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    own, ours = counted(name, monkeypatch)
    J = jacobian(model, ids, "1.resid_in", attention_mask=mask if padded else None)
    assert isinstance(J._source.run, DecoderPass)
    # To go past windows of 2 and 3 tokens, the last 10 and 11 tokens are needed.
    part = 7 + {"llama": 7, "mistral": 11, "qwen2": 10}[name] + 2 * padded
    assert own == [part] * DEPTH
    assert ours == [part] * DEPTH + [60] * DEPTH
    own.clear()
    ours.clear()
    jacobian(model, ids, "1.resid_in")
    assert own == [] and ours == [60] * DEPTH


def test_a_text_as_short_as_that_is_compared_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own, ours = counted("llama", monkeypatch)
    jacobian(model_of("llama"), ids_of(1, 14))
    assert own == [14] * DEPTH and ours == [14] * 2 * DEPTH


@pytest.mark.parametrize("edit", EDITS)
def test_edits_show_in_a_part_of_a_longer_text(edit: str) -> None:
    """Whatever the comparison decides, the values must be those of the edited model."""
    kind, change = EDITS[edit]
    model, ids = model_of(kind), ids_of(1, LENGTHS[kind])
    before = jacobian(model, ids, target="logits")
    assert isinstance(before._source.run, DecoderPass)
    with torch.no_grad():
        change(model)
    J = jacobian(model, ids, "0.resid_in", "logits")
    torch.testing.assert_close(J.primal, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["the module's own", "its class"])
def test_code_that_treats_positions_unlike_is_compared_on_all_of_the_text(way: str) -> None:
    """The difference does not appear at either end of the text."""
    model, ids = model_of("llama"), ids_of(1, 30)
    mlp = model.model.layers[DEPTH - 1].mlp
    plain = type(mlp).forward

    class Steered(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            steered = plain(self, x)
            steered[:, 12:15] += 1.0
            return steered

    jacobian(model, ids)
    if way == "its class":
        mlp.__class__ = Steered
    else:
        mlp.forward = lambda x: Steered.forward(mlp, x)
    J = jacobian(model, ids, "1.resid_in", "logits")
    assert not isinstance(J._source.run, DecoderPass)
    torch.testing.assert_close(J.primal, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_wrapper_that_bears_the_name_of_what_it_wraps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    model, ids = model_of("gpt_neox"), ids_of(1, 30)
    assert agreement._runs_library_code(model)
    mlp = type(model.gpt_neox.layers[0].mlp)
    plain = mlp.forward

    @functools.wraps(plain)
    def forward(self: Any, x: Tensor) -> Tensor:
        return plain(self, x) * torch.where((torch.arange(x.shape[1]) == 14)[:, None], 2.0, 1.0)

    monkeypatch.setattr(mlp, "forward", forward)
    assert not agreement._runs_library_code(model)
    J = jacobian(model, ids, "0.resid_in", "logits")
    assert not isinstance(J._source.run, DecoderPass)


@pytest.mark.parametrize("window", [20, 40])
def test_a_layer_that_has_the_window_of_another_is_found_where_the_text_crosses_it(window: int) -> None:
    model, ids = model_of("qwen2"), ids_of(1, 30)
    model.config.sliding_window = window
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    jacobian(model, ids)
    before = model(ids).logits
    if hasattr(model.model.layers[0], "attention_type"):
        model.model.layers[0].attention_type = "sliding_attention"
    own = model(ids).logits
    J = jacobian(model, ids, "1.resid_in", "logits")
    torch.testing.assert_close(J.primal, own, rtol=1e-5, atol=1e-5)
    assert isinstance(J._source.run, DecoderPass) == torch.equal(own, before)


def test_padding_is_compared_where_it_begins_and_ends() -> None:
    ids = ids_of(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, 30:] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    part = agreement._part(Inputs(ids, mask, positions), [])
    columns = [0, *range(1, 8), *range(23, 30), 39]  # the row with most padding
    assert torch.equal(part.ids, ids[2:, columns])
    assert torch.equal(part.mask, mask[2:, columns]) and torch.equal(part.positions, positions[2:, columns])


def _clipped_in_the_middle(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own modules, which act only where a value is large: at a token in the middle of the first row."""
    mlp = model.model.layers[0].mlp
    gates: list[Tensor] = []
    for seed in range(100):
        ids.copy_(torch.randint(0, 19, ids.shape, generator=torch.Generator().manual_seed(seed)))
        handle = mlp.act_fn.register_forward_hook(lambda _, inputs, output: gates.append(output.detach()))
        model(ids)
        handle.remove()
        largest = gates.pop()[0].amax(-1)  # (L,)
        middle, outer = float(largest[8:-13].max()), float(torch.cat([largest[:8], largest[-13:]]).max())
        if middle > 1.05 * outer:
            break
    else:
        raise AssertionError("no text has its largest value in the middle")
    limit = (middle + outer) / 2
    mlp.act_fn = nn.Sequential(mlp.act_fn, nn.Hardtanh(-limit, limit))


def _masked_by_distance(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def near(config: Any, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:
        places = torch.arange(inputs_embeds.shape[1])
        apart = places[:, None] - places
        return torch.where((apart >= 0) & (apart < 16), 0.0, float("-inf")).to(inputs_embeds.dtype)[None, None]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", near)


def _rotated_in_another_row(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.apply_rotary_pos_emb

    def rotate(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = plain(q, *rest, **options)
        return torch.cat([q[:1], 2 * q[1:]]), k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)


def _called_otherwise(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = model.model.layers[0].mlp
    plain = mlp._call_impl

    def call(x: Tensor) -> Tensor:
        return plain(x) * (1 + 0.5 * (torch.arange(x.shape[1]) == 15)[:, None])

    mlp._call_impl = call


@pytest.mark.parametrize(
    "edit", [_clipped_in_the_middle, _masked_by_distance, _rotated_in_another_row, _called_otherwise]
)
def test_what_a_part_of_a_text_cannot_show_is_compared_on_all_of_it(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of("llama"), ids_of(2, LENGTHS["llama"])
    edit(model, ids, monkeypatch)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    J = jacobian(model, ids, "1.resid_in", "logits")
    torch.testing.assert_close(J.primal, own, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_changes_its_weights_runs_as_it_would() -> None:
    """With ``max_norm`` a forward pass rescales the rows that it looks up, and only these."""
    model, ids = model_of("llama"), ids_of(2, LENGTHS["llama"])
    model.model.embed_tokens.max_norm = 0.5
    J = jacobian(model, ids, "1.resid_in", "logits")
    torch.testing.assert_close(J.primal, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
