"""The weights of attention as a target: compared with autograd through weights that the test writes out itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitgpt_cases import build, one_thread, tokens, torch_func  # noqa: F401
from decoder_cases import MODELS, exact_norms, ids_of, model_of
from pairs import pairs
from scalpel import jacobian
from scalpel.hooks.names import module_path
from scalpel.jacobians.rows import products as row_products
from scalpel.models.decoders.families import decoder_of, hooks_of

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
LENGTH = 6
PADDING = ["no padding", "left", "right"]
POSITIONS = [(None, None), ([3], [5, 1, 3]), (slice(1, 4), [-1])]


def inputs_of(ids: Tensor, padding: str) -> dict[str, Tensor]:
    """The mask and the positions of a batch whose second text has two tokens of padding."""
    if padding == "no padding":
        return {}
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def check(J: Any, weights: Callable[[Tensor], Tensor], at: tuple[Any, Any], real: Tensor | None) -> None:
    """Compare primal and both products with ``weights``, a function of what is added to all tokens of the source.

    At queries that are padding, where ``real`` (B, L) is 0, only their independence of the other ones is asked.
    """
    source, target = (slice(None) if chosen is None else chosen for chosen in at)
    batch, _, width = J.source_shape
    zero = torch.zeros(batch, LENGTH, width, dtype=torch.float64)
    rows = torch.ones(J.target_shape[:2], dtype=torch.bool) if real is None else real.bool()[:, target]
    torch.testing.assert_close(J.primal[rows], weights(zero)[:, target][rows], **EXACT)
    expected = torch.autograd.functional.jacobian(lambda delta: weights(delta)[:, target][rows], zero, vectorize=True)
    expected = expected[..., source, :].reshape(-1, J.shape[1])
    assert bool(expected.any())
    V = torch.eye(J.shape[1], dtype=torch.float64).view(-1, *J.source_shape)
    torch.testing.assert_close(J.jvp(V)[:, rows].flatten(1).T, expected, **EXACT)
    U = torch.zeros(len(expected), *J.target_shape, dtype=torch.float64)
    U[:, rows] = torch.eye(len(expected), dtype=torch.float64).view(len(expected), -1, J.target_shape[-1])
    torch.testing.assert_close(J.vjp(U).flatten(1), expected, **EXACT)


# ---- CircuitGPT ----------------------------------------------------------------------------------


def written_out(model: Any, q: Tensor, k: Tensor, mask: Tensor | None, sink: Tensor | None) -> Tensor:
    """The weights of each query and head as quotients of exponentials, (B, L, heads * L)."""
    reads = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(len(q), -1, -1)
    if mask is not None:
        reads = reads & mask.bool()[:, None, :]
        reads = reads | (~reads.any(-1, keepdim=True) & torch.eye(LENGTH, dtype=torch.bool))
    width = q.shape[-1] // model.config.n_head
    heads = []
    for head in range(model.config.n_head):
        part = slice(head * width, (head + 1) * width)
        shares = (q[..., part] @ k[..., part].mT / width**0.5).exp() * reads
        total = shares.sum(-1, keepdim=True) + (0 if sink is None else sink[head].exp())
        heads.append(shares / total)
    return torch.cat(heads, -1)


CASES = ["plain", "narrow_heads", "like_csp_yolo2", "topk_everywhere_relu_residual"]


@pytest.mark.parametrize(("case", "padding", "at"), pairs(CASES, PADDING, POSITIONS), ids=str)
def test_a_circuitgpt(case: str, padding: str, at: tuple[Any, Any]) -> None:
    model = build(case)
    ids = tokens(model, 2, LENGTH)
    inputs = inputs_of(ids, padding)
    sink = model.transformer.h[1].attn.sink_logit

    for source in ("0.resid_in", "1.attn.act_in", "1.attn.k"):

        def weights(delta: Tensor, source: str = source) -> Tensor:
            moved = [(source, lambda value, _: value + delta)]
            _, acts = model.run_with_cache(ids, ["1.attn.q", "1.attn.k"], fwd_hooks=moved, **inputs)
            return written_out(model, acts["1.attn.q"], acts["1.attn.k"], inputs.get("attention_mask"), sink)

        J = jacobian(model, ids, source, "1.attn.pattern", at, **inputs)
        check(J, weights, at, None)  # a padding query reads itself, and counts as any other
        dense = J.to_dense()
        with torch_func(model):
            slow = jacobian(model, ids, source, "blocks.1.attn.hook_pattern", at, **inputs)
            torch.testing.assert_close(slow.to_dense(), dense, **EXACT)


def test_its_ablations_and_composition() -> None:
    model = build("like_csp_yolo2")
    ids = tokens(model, 2, LENGTH)
    with model.ablate(["1.attn.q:3", "0.attn.v"], "zero"):
        J = jacobian(model, ids, "0.resid_in", "1.attn.pattern")
        with torch_func(model):
            slow = jacobian(model, ids, "0.resid_in", "1.attn.pattern")
            dense = slow.to_dense()
    torch.testing.assert_close(J.to_dense(), dense, **EXACT)
    plain = jacobian(model, ids, "0.resid_in", "1.attn.pattern", ([2], [4]))
    assert not torch.allclose(J.primal[:, 4:5], plain.primal)
    first = jacobian(model, ids, "0.resid_in", "1.resid_in", ([2], None))
    second = jacobian(model, ids, "1.resid_in", "1.attn.pattern", (None, [4]))
    torch.testing.assert_close((second @ first).to_dense(), plain.to_dense(), **EXACT)


def test_its_masks_on_the_way_are_watched() -> None:
    model = build("like_csp_yolo2")
    J = jacobian(model, tokens(model, 1, LENGTH), "1.attn.act_in", "1.attn.pattern")
    V = torch.randn(3, *J.source_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = J.validity_radius(V)
    assert bool(found.verified.all()) and bool(found.flips.all())
    assert set(found.first) <= {"1.attn.q", "1.attn.k"}  # the weights do not read v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_other_dtypes(dtype: torch.dtype) -> None:
    model, exact = build("plain", dtype), build("plain", dtype).double()
    ids = tokens(model, 1, LENGTH)
    J, precise = (jacobian(each, ids, "1.resid_in", "1.attn.pattern") for each in (model, exact))
    assert J.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for found, expected in ((J.primal, precise.primal), (J.to_dense(), precise.to_dense())):
        assert float((found.double() - expected).norm() / expected.norm()) < bound


# ---- decoders of transformers --------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep float64 in transformers' eager attention, which would round to float32, and refuse torch.func."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="scalpel.jacobian differentiates")
        yield


def path(model: Any, hook: str) -> str:
    decoder = decoder_of(model)
    assert decoder is not None
    return module_path(hook, decoder.family.PATHS, hooks_of(decoder.config))


class Eager(nn.Module):
    """The attention weights of a layer as transformers' eager attention gives them, (B, L, heads * L)."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        model.config._attn_implementation = "eager"
        self.model, self.layer = model, layer

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        given = self.model(input_ids, **inputs, output_attentions=True, use_cache=False)
        weights: Tensor = given.attentions[self.layer]
        return weights.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("name", "padding", "at"), pairs([*MODELS], PADDING, POSITIONS), ids=str)
def test_decoders(name: str, padding: str, at: tuple[Any, Any], exact: None) -> None:
    model, eager = model_of(name), Eager(model_of(name), 1)
    ids = ids_of(2, LENGTH)
    inputs = inputs_of(ids, padding)
    layer = eager.model.get_submodule(path(eager.model, "0.resid_in").removesuffix(":in"))

    def weights(delta: Tensor) -> Tensor:
        moved = layer.register_forward_pre_hook(lambda _, given: (given[0] + delta, *given[1:]))
        try:
            return eager(ids, **inputs)
        finally:
            moved.remove()

    J = jacobian(model, ids, "0.resid_in", "1.attn.pattern", at, **inputs)
    check(J, weights, at, inputs.get("attention_mask"))
    J = jacobian(model, ids, "0.resid_in", "blocks.1.attn.hook_pattern", **inputs)
    heads = J.primal.unflatten(-1, (-1, LENGTH))
    if padding == "left":  # a query that may read no key
        assert not heads[1, :2].any()
    full = heads.sum(-1) if padding == "no padding" else heads[0].sum(-1)
    torch.testing.assert_close(full, torch.ones_like(full))


@pytest.mark.parametrize("name", MODELS)
def test_sources_inside_the_layer(name: str, exact: None) -> None:
    """Some families have no modules for q and k, so these are compared with the chain through them."""
    model, ids = model_of(name), ids_of(2, LENGTH)
    at = ([1, 4], [5, 4])
    through = jacobian(model, ids, "1.resid_in", "1.attn.pattern", at).to_dense()
    chain = torch.zeros_like(through)
    for part in "qk":
        before = jacobian(model, ids, "1.resid_in", f"1.attn.{part}", ([1, 4], None))
        chain += (jacobian(model, ids, f"1.attn.{part}", "1.attn.pattern", (None, [5, 4])) @ before).to_dense()
    torch.testing.assert_close(chain, through, **EXACT)


def test_chunks_of_one_tangent_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with exact_norms():
        J = jacobian(model_of("qwen3"), ids_of(2, LENGTH), "0.resid_in", "2.attn.pattern", (None, [1, 5]))
        whole, adjoint = J.to_dense(), J.T.to_dense()
        monkeypatch.setattr(row_products, "_CHUNK_BYTES", 1)
        torch.testing.assert_close(J.to_dense(), whole, **EXACT)
        torch.testing.assert_close(J.T.to_dense(), adjoint, **EXACT)
        torch.testing.assert_close(adjoint.T, whole, **EXACT)


@pytest.mark.parametrize("name", ["llama", "a CircuitGPT"])
def test_a_function_of_the_weights(name: str) -> None:
    with exact_norms():
        circuit = name == "a CircuitGPT"
        model: Any = build("sink") if circuit else model_of(name)
        ids = tokens(model, 2, LENGTH) if circuit else ids_of(2, LENGTH)

        def entropy(weights: Tensor) -> Tensor:
            per_head = weights.unflatten(-1, (-1, LENGTH))[:, -1]
            return -(per_head * per_head.log()).sum(-1)

        at = (None, [2, -1])
        J = jacobian(model, ids, "0.resid_in", ("1.attn.pattern", entropy), at)
        plain = jacobian(model, ids, "0.resid_in", "1.attn.pattern", at)
        torch.testing.assert_close(J.primal, entropy(plain.primal))
        slope = torch.autograd.functional.jacobian(entropy, plain.primal).reshape(J.shape[0], -1)
        torch.testing.assert_close(J.to_dense(), slope @ plain.to_dense(), **EXACT)
        torch.testing.assert_close(J.T.to_dense().T, slope @ plain.to_dense(), **EXACT)


def test_products_in_bfloat16_are_near() -> None:
    model, ids = model_of("llama").float(), ids_of(2, LENGTH)
    exact, near = (
        jacobian(model, ids, "0.resid_in", "1.attn.pattern", precision=precision) for precision in (None, "bfloat16")
    )
    assert torch.equal(near.primal, exact.primal)
    error = float((near.to_dense() - exact.to_dense()).norm() / exact.to_dense().norm())
    assert 0 < error < (2 * 7 * 2) ** 0.5 * 2.0**-8


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "a CircuitGPT"])
@pytest.mark.parametrize("source", ["0.attn.pattern", "blocks.0.attn.hook_pattern"])
def test_weights_are_no_source(name: str, source: str) -> None:
    model: Any = build("plain") if name == "a CircuitGPT" else model_of(name)
    with pytest.raises(ValueError, match=r"'0\.attn\.pattern', and attention weights are a target only.*'0\.attn\.v'"):
        jacobian(model, ids_of(1, 4) % 13, source, "final_resid")


def test_values_do_not_lead_to_weights() -> None:
    for model in (build("plain"), model_of("llama")):
        with pytest.raises(ValueError, match=r"no path from '0\.attn\.v' to '0\.attn\.pattern'"):
            jacobian(model, ids_of(1, 4) % 13, "0.attn.v", "0.attn.pattern")
        with pytest.raises(ValueError, match="no path.*position 2.*position 1"):
            jacobian(model, ids_of(1, 4) % 13, "0.resid_in", "0.attn.pattern", (2, 1))
        with pytest.raises(ValueError, match=r"unknown target '2\.attn\.patern'|is no hook|'2\.attn\.pattern'"):
            jacobian(model, ids_of(1, 4) % 13, "0.resid_in", "2.attn.patern")


def test_where_there_are_no_rules_the_message_says_what_to_do() -> None:
    model, ids = model_of("llama"), ids_of(2, LENGTH)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no module's value.*eager.*output_attentions.*there is a hook on"):
        jacobian(model, ids, "0.resid_in", "1.attn.pattern")
    handle.remove()
    with pytest.raises(ValueError, match="no module's value.*Sequential is none of"):
        jacobian(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)), ids % 5, "0", "0.attn.pattern")
    with exact_norms():
        rules = jacobian(model, ids, "0.resid_in", "1.attn.pattern")
        wrapped = jacobian(Eager(model_of("llama"), 1), ids, "model.model.layers.0:in", "")
    # Softmax is float32 in transformers' eager attention.
    torch.testing.assert_close(wrapped.to_dense(), rules.to_dense(), rtol=1e-4, atol=1e-6)
