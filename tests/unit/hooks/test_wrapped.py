"""Names of hooks in decoders that are wrapped, adapted, compiled or without a head, each beside a plain model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional

import scalpel
from decoder_cases import exact_norms, ids_of, model_of
from scalpel.jacobians.rows.decoder_pass import DecoderPass
from wrapper_cases import BY_RULES, PLACES, TRANSFORMER_LENS, WRAPPERS, headless, mapped, values_at, with_saved_norm

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("wrapped")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A job of this process alone, which DistributedDataParallel needs."""
    import torch.distributed as dist

    path = Path(tmp_path_factory.mktemp("job")) / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(wrapper: str, name: str) -> tuple[Any, Any]:
    if "LoRA" in wrapper or "IA3" in wrapper:
        pytest.importorskip("peft")
    if "accelerate" in wrapper or "dispatched" in wrapper:
        pytest.importorskip("accelerate")
    torch._dynamo.reset()
    return WRAPPERS[wrapper](name)


def check(model: Any, plain: Any, name: str, ids: Tensor, spelled: dict[str, str], targets: list[str]) -> None:
    """Products and second moments of the wrapped model, beside plain autograd and forward hooks of the plain one."""
    places = PLACES[name]
    for target in targets:
        J = scalpel.jacobian(model, ids, spelled["0.resid_in"], spelled[target])
        V, U = (torch.randn(shape, dtype=torch.float64) for shape in (J.source_shape, J.target_shape))
        value_of = mapped(plain, ids, places["0.resid_in"], places[target])
        primal, pushed = functional.jvp(value_of, torch.zeros_like(V), V)
        _, pulled = functional.vjp(value_of, torch.zeros_like(V), U)
        torch.testing.assert_close(J.primal, primal.detach(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(J.jvp(V[None])[0], pushed.detach(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(J.vjp(U[None])[0], pulled.detach(), rtol=1e-7, atol=1e-9)
    hooks = [spelled[target] for target in targets if target != "logits"]
    found = scalpel.collect(model, [ids], hooks, center=False, progress=False)
    for target, hook in zip(targets, hooks, strict=False):
        rows = values_at(plain, ids, places[target]).detach().flatten(0, 1)
        torch.testing.assert_close(found[hook].covariance(), rows.T @ rows / len(rows), rtol=1e-7, atol=1e-9)


def targets_of(wrapper: str, name: str) -> list[str]:
    without_head = "headless" in wrapper
    return [hook for hook in PLACES[name] if hook != "0.resid_in" and not (hook == "logits" and without_head)]


# A family decides where its base model and its layers are, and which of them an adapter changes. So each kind of
# wrapper meets each family, while two wrappers of one kind meet only Llama.
OF_EVERY_KIND = (
    "one layer compiled",
    "all but the head compiled",
    "headless and compiled",
    "DistributedDataParallel",
    "accelerate, dispatched",
    "LoRA",
    "LoRA, merged",
    "LoRA of a headless model",
    "IA3",
)
WRAPPED = [("llama", wrapper) for wrapper in WRAPPERS] + [
    (name, wrapper) for name in ("gpt2", "gpt_neox") for wrapper in OF_EVERY_KIND
]


@pytest.mark.parametrize(("name", "wrapper"), WRAPPED)
def test_our_names_mean_the_same_in_a_wrapper(wrapper: str, name: str) -> None:
    model, plain = made(wrapper, name)
    check(model, plain, name, ids_of(), {hook: hook for hook in PLACES[name]}, targets_of(wrapper, name))
    by_rules = isinstance(scalpel.jacobian(model, ids_of())._source.run, DecoderPass)
    assert by_rules == (wrapper in BY_RULES)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_transformer_lens_and_module_paths(wrapper: str) -> None:
    model, plain = made(wrapper, "llama")
    # A name is read before the model is looked at, so every name is asked for in a few wrappers only.
    every = targets_of(wrapper, "llama")
    lens = every if wrapper in ("headless", "LoRA", "compiled") else ["1.mlp.post_act", every[-1]]
    check(model, plain, "llama", ids_of(), TRANSFORMER_LENS, lens)
    prefix = "model." if "headless" in wrapper else ""
    paths = {hook: place.removeprefix(prefix) for hook, place in PLACES["llama"].items()} | {"logits": "logits"}
    check(model, plain, "llama", ids_of(), paths, every[:3] if lens is every else every[:1])
    beyond_rules = {"0.resid_in": paths["0.resid_in"], "1.mlp.resid_delta": paths["1.mlp.resid_delta"]}
    check(model, plain, "llama", ids_of(), beyond_rules, ["1.mlp.resid_delta"])  # the output of down_proj is no hook


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_module_paths_as_the_wrapper_has_them(wrapper: str) -> None:
    model, plain = made(wrapper, "llama")
    prefix = "model." if "headless" in wrapper else ""
    given = {}
    for hook in ("0.resid_in", "1.attn.q", "1.mlp.resid_delta"):
        path, colon, end = PLACES["llama"][hook].removeprefix(prefix).partition(":")
        modules = dict(model.named_modules(remove_duplicate=False))
        whole = [name for name in modules if _without_compilation(name).endswith(path)]
        given[hook] = min(whole, key=len) + colon + end
    check(model, plain, "llama", ids_of(), given, ["1.attn.q", "1.mlp.resid_delta"])


def _without_compilation(name: str) -> str:
    return ".".join(step for step in name.split(".") if step != "_orig_mod")


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_other_models_without_a_head(name: str) -> None:
    plain = model_of(name)
    model, ids = headless(copy.deepcopy(plain)), ids_of()
    check(model, plain, name, ids, {hook: hook for hook in PLACES[name]}, targets_of("headless", name))
    assert isinstance(scalpel.jacobian(model, ids)._source.run, DecoderPass)


@pytest.mark.parametrize("wrapper", ["LoRA", "headless", "DistributedDataParallel", "LoRA of a headless model"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left(name: str, wrapper: str) -> None:
    model, plain = made(wrapper, name)
    ids = ids_of(1, 4)
    batch = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], dim=1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    }
    J = scalpel.jacobian(model, batch, "0.resid_in", "final_resid", positions=slice(2, None))
    V = torch.randn(J.source_shape, dtype=torch.float64)
    value_of = mapped(plain, ids, PLACES[name]["0.resid_in"], PLACES[name]["final_resid"])
    expected = functional.jvp(value_of, torch.zeros_like(V), V)[1].detach()
    torch.testing.assert_close(J.jvp(V[None])[0], expected, rtol=1e-6, atol=1e-8)
    rows = values_at(plain, ids, PLACES[name]["1.attn.y"]).detach()[0]
    found = scalpel.collect(model, [batch], ["1.attn.y"], center=False, progress=False)["1.attn.y"]
    torch.testing.assert_close(found.covariance(), rows.T @ rows / 4, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wrapper", ["headless", "DataParallel", "LoRA", "LoRA, compiled"])
def test_lyapunov_finds_the_layers(wrapper: str) -> None:
    model, plain = made(wrapper, "llama")
    ids = ids_of(1, 3)
    found = scalpel.lyapunov(model, ids, 2, cumulative=False, draws=1, probes=0)
    ends = [PLACES["llama"]["0.resid_in"], PLACES["llama"]["final_resid"]]
    value_of = mapped(plain, ids, *ends)
    width = 12
    dense = functional.jacobian(value_of, torch.zeros(1, 3, width, dtype=torch.float64)).reshape(3 * width, 3 * width)
    expected = torch.linalg.svdvals(dense)[:2].log() / 3
    assert found.depth == 3
    torch.testing.assert_close(found.exponents, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("how", ["plain", "LoRA"])
def test_autocast_by_accelerate(how: str) -> None:
    """Its forward pass computes in bfloat16, which no rule does, so that values have bfloat16's error."""
    accelerate = pytest.importorskip("accelerate")
    plain = model_of("llama")
    if how == "LoRA":
        pytest.importorskip("peft")
        model, plain = WRAPPERS["LoRA"]("llama")
        model = model.float()
    else:
        model = copy.deepcopy(plain).float()
    accelerate.state.AcceleratorState._reset_state(True)
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    ids = ids_of()
    for target in ("1.attn.q", "1.mlp.post_act", "1.resid_mid", "final_resid", "logits"):
        J = scalpel.jacobian(model, ids, "0.resid_in", target)
        V = torch.randn(J.source_shape, dtype=torch.float64)
        value_of = mapped(plain, ids, PLACES["llama"]["0.resid_in"], PLACES["llama"][target])
        expected = functional.jvp(value_of, torch.zeros_like(V), V)[1].detach()
        error = (J.jvp(V[None].to(J.dtype))[0].double() - expected).norm() / expected.norm()
        assert 1e-5 < error < 0.05, target
    rows = values_at(plain, ids, PLACES["llama"]["1.attn.q"]).detach().flatten(0, 1)
    expected = rows.T @ rows / len(rows)
    found = scalpel.collect(model, [ids], ["1.attn.q"], center=False, progress=False)["1.attn.q"].covariance()
    assert (found - expected).norm() / expected.norm() < 0.05
    accelerate.state.AcceleratorState._reset_state(True)


def test_a_norm_that_is_trained_beside_the_adapters() -> None:
    pytest.importorskip("peft")
    model, plain = with_saved_norm()
    check(model, plain, "llama", ids_of(), {hook: hook for hook in PLACES["llama"]}, ["final_resid", "logits"])


# ---- what a wrapper can't do ---------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_unknown_name_is_told_what_is_near(wrapper: str) -> None:
    model, _ = made(wrapper, "llama")
    with pytest.raises(ValueError, match=r"unknown source '0\.atn\.q'.*near it: .*'0\.attn\.q'"):
        scalpel.jacobian(model, ids_of(), "0.atn.q")
    with pytest.raises(ValueError, match=r"unknown target '7\.resid_in'"):
        scalpel.jacobian(model, ids_of(), "0.resid_in", "7.resid_in")
    with pytest.raises(ValueError, match=r"unknown hook '0\.atn\.q'.*near it: .*'0\.attn\.q'"):
        scalpel.collect(model, [ids_of()], ["0.atn.q"], progress=False)
    with pytest.raises(TypeError, match="source is 3"):
        scalpel.jacobian(model, ids_of(), 3)  # type: ignore[arg-type]


def test_a_model_without_a_head_has_no_logits() -> None:
    model, ids = headless(model_of("llama")), ids_of()
    wanted = r"LlamaModel has no output matrix.*load the model as a LlamaForCausalLM.*'final_resid'.*'norm'"
    for target in ("logits", lambda logits: logits.sum()):
        with pytest.raises(ValueError, match=wanted):
            scalpel.jacobian(model, ids, "0.resid_in", target)
    with pytest.raises(ValueError, match=wanted):
        scalpel.collect(model, [ids], ["logits"], progress=False)
    with pytest.raises(ValueError, match="no output matrix.*no loss by default.*give loss="):
        scalpel.collect(model, [ids], ["1.resid_in.grad"], progress=False)
    found = scalpel.collect(
        model, [ids], ["final_resid.grad"], loss=lambda output, _: output.square().sum(), center=False, progress=False
    )["final_resid.grad"]
    x = values_at(model, ids, "norm:in").detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.norm(x).square().sum(), x)
    rows = slope.flatten(0, 1)
    torch.testing.assert_close(found.covariance(), rows.T @ rows / len(rows), rtol=1e-7, atol=1e-9)


def test_a_hook_that_no_module_has_in_an_adapted_model() -> None:
    pytest.importorskip("peft")
    model, _ = WRAPPERS["LoRA"]("gpt2")
    with pytest.raises(ValueError, match=r"'1\.attn\.q' is no module's value in this PeftModel.*rules can't be used"):
        scalpel.jacobian(model, ids_of(), "1.attn.q")
    with pytest.raises(ValueError, match=r"'1\.attn\.q' is no module's value in this PeftModel"):
        scalpel.collect(model, [ids_of()], ["1.attn.q"], progress=False)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_virtual_tokens_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(model_of("llama"), config).double().eval(), ids_of()
    for name in ("0.resid_in", "blocks.0.hook_resid_pre", "model.layers.0:in", "model.layers.0.mlp.up_proj"):
        with pytest.raises(ValueError, match="3 virtual tokens.*before each text.*disable_adapter"):
            scalpel.jacobian(model, ids, name)
        with pytest.raises(ValueError, match="3 virtual tokens.*before each text.*disable_adapter"):
            scalpel.collect(model, [ids], [name], progress=False)
    own = "base_model.model.layers.1"
    tokens = 9 if kind == "PromptTuning" else 6
    assert scalpel.jacobian(model, ids, f"{own}:in", own).source_shape == (2, tokens, 12)
    assert scalpel.collect(model, [ids], [own], progress=False)[own].count == 2 * tokens
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    if kind == "PromptTuning":
        with pytest.raises(ValueError, match="3 virtual tokens.*rows at padding.*without padding"):
            scalpel.collect(model, [batch], [own], progress=False)
    else:
        assert scalpel.collect(model, [batch], [own], progress=False)[own].count == 10
    with model.disable_adapter():
        found = scalpel.jacobian(model, ids, "0.resid_in", "1.resid_mid").primal
    expected = values_at(model_of("llama"), ids, PLACES["llama"]["1.resid_mid"]).detach()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_adapters_that_begin_at_zero_are_no_reason_to_trust_the_rules() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"])).double().eval()
    ids = ids_of()
    scalpel.jacobian(model, ids, "0.resid_in", "logits")  # the adapters change nothing yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = model(ids).logits
    found = scalpel.jacobian(model, ids, "0.resid_in", "logits").primal
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("switch", ["off", "merged", "another", "scaled"])
def test_adapters_that_are_switched_after_the_jacobian(switch: str) -> None:
    peft = pytest.importorskip("peft")
    model, _ = WRAPPERS["LoRA"]("llama")
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.double()
    J = scalpel.jacobian(model, ids_of())
    V = torch.ones(1, *J.source_shape, dtype=torch.float64)
    before = J.jvp(V)
    if switch == "off":
        with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters were switched"):
            J.jvp(V)
        assert torch.equal(J.jvp(V), before)
    elif switch == "merged":
        model.merge_adapter()
        with pytest.raises(RuntimeError, match="changed|switched"):
            J.jvp(V)
    elif switch == "another":
        model.set_adapter("second")
        with pytest.raises(RuntimeError, match="adapters were switched"):
            J.jvp(V)
        model.set_adapter("default")
        assert torch.equal(J.jvp(V), before)
    else:
        model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(2.0)
        with pytest.raises(RuntimeError, match="adapters were switched"):
            J.vjp(V)


@pytest.mark.parametrize("kind", ["DataParallel", "DistributedDataParallel", "compiled"])
def test_a_hook_on_the_wrapper_counts(kind: str) -> None:
    model, plain = made(kind, "llama")

    def doubled(module: nn.Module, given: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(doubled)
    found = scalpel.jacobian(model, ids_of(), "0.resid_in", "logits")
    expected = scalpel.jacobian(plain, ids_of(), "0.resid_in", "logits")
    V = torch.randn(1, *expected.source_shape, dtype=torch.float64)
    torch.testing.assert_close(found.jvp(V), 2 * expected.jvp(V), rtol=1e-7, atol=1e-9)


def test_a_circuitgpt_inside_a_wrapper() -> None:
    from circuitgpt_cases import build, tokens

    plain = build("like_csp_yolo2")
    ids = tokens(plain)
    model = nn.DataParallel(copy.deepcopy(plain))
    V = torch.ones(1, *scalpel.jacobian(plain, ids).source_shape, dtype=plain.dtype)
    assert torch.equal(scalpel.jacobian(model, ids).jvp(V), scalpel.jacobian(plain, ids).jvp(V))
    found, expected = (scalpel.collect(each, [ids], ["1.resid_in"], progress=False) for each in (model, plain))
    assert torch.equal(found["1.resid_in"].covariance(), expected["1.resid_in"].covariance())
