"""What can go wrong with a CircuitGPT as transformers knows it: saved over, adapted, hooked, configured, offloaded."""

import json
import shutil

import pytest
import torch

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from scalpel import CircuitGPT
from scalpel.models import hook_recorder
from scalpel.models.weight_files import CheckpointError

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from scalpel.models.transformers_classes import CircuitGPTForCausalLM  # noqa: E402


@pytest.fixture(scope="module")
def brackets():
    return CircuitGPT.from_pretrained("bracket-mini")


@pytest.fixture
def wrapped(brackets):
    return AutoModelForCausalLM.from_pretrained(brackets.folder)


@pytest.fixture
def ids():
    return torch.tensor([[5, 6, 7, 8, 9, 10]])


def lora(model, *targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[*targets], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


def test_saving_over_another_layout_leaves_one_model(wrapped, brackets, ids, tmp_path):
    shutil.copytree(brackets.folder, tmp_path / "it")
    with torch.no_grad():
        wrapped.circuitgpt.lm_head.weight.zero_()
    wrapped.save_pretrained(tmp_path / "it")
    for loaded in (CircuitGPT, AutoModelForCausalLM):
        model = loaded.from_pretrained(tmp_path / "it")
        assert not getattr(model, "circuitgpt", model).lm_head.weight.any()
    assert CircuitGPT.from_pretrained(tmp_path / "it").card["hook_means"] == brackets.card["hook_means"]
    brackets.save_pretrained(tmp_path / "it")
    for loaded in (CircuitGPT, AutoModelForCausalLM):
        model = loaded.from_pretrained(tmp_path / "it")
        assert torch.equal(getattr(model, "circuitgpt", model)(ids), brackets(ids))
    transformers.GPT2Config().save_pretrained(tmp_path / "other")
    brackets.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "config.json").is_file()  # it is no CircuitGPT's


@pytest.mark.parametrize("asked", [torch.float64, "float64", torch.bfloat16])
def test_the_class_itself_takes_a_dtype(asked, brackets):
    model = CircuitGPTForCausalLM.from_pretrained(brackets.folder, dtype=asked)
    assert model.dtype == (getattr(torch, asked) if isinstance(asked, str) else asked)


@pytest.mark.parametrize("changed", [{"n_layer": 1}, {"n_layer": 3}, {"sink": False}, {"vocab_size": 600}])
def test_weights_have_to_fit_the_final_config(changed, brackets):
    for loaded in (CircuitGPTForCausalLM, AutoModelForCausalLM):
        with pytest.raises(CheckpointError):
            loaded.from_pretrained(brackets.folder, ignore_mismatched_sizes=True, **changed)


def test_a_state_dict_is_read_as_strictly(wrapped, ids):
    weights = wrapped.state_dict()
    model = CircuitGPTForCausalLM.from_pretrained(None, config=wrapped.config, state_dict=weights)
    assert torch.equal(model(ids).logits, wrapped(ids).logits)
    del weights["circuit_model.transformer.h.1.mlp.c_fc.weight"]
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc"):
        CircuitGPTForCausalLM.from_pretrained(None, config=wrapped.config, state_dict=weights)


def test_a_fixed_table_of_positions_stays_fixed(tmp_path):
    build("sinusoids_even", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not model.circuitgpt.transformer.wpe.weight.requires_grad
    assert model.circuitgpt.transformer.wte.weight.requires_grad


def test_training_is_switched_everywhere(wrapped):
    for mode in (True, False):
        wrapped.train(mode)
        assert wrapped.circuit_model.training == wrapped.circuitgpt.training == wrapped.training == mode


def test_a_model_without_layers_generates_from_padded_texts(tmp_path):
    core = build("no_layer", torch.float32)
    core.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = tokens(core, length=3), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, core.generate(ids, 5, attention_mask=mask))


def test_a_cache_is_refused_where_whole_texts_are_needed(wrapped, ids):
    core = wrapped.circuitgpt
    options = {"max_new_tokens": 6, "do_sample": False}
    with core.ablate("0.attn.v", "resample", reference=ids.repeat(3, 1), seed=1):
        assert torch.equal(wrapped.generate(ids, **options), core.generate(ids, 6))
        with pytest.raises(ValueError, match="leave use_cache out"):
            wrapped.generate(ids, use_cache=True, **options)
    with hook_recorder("0.attn.k") as recorded:
        out = wrapped.generate(ids, **options)
    assert recorded["0.attn.k"].shape[1] == out.shape[1] - 1


# ---- adapters and hooks --------------------------------------------------------------------------


def test_an_adapter_counts_and_its_weights_are_not_taken_for_the_model_s(brackets, wrapped, ids, tmp_path):
    adapted = lora(wrapped, "c_attn", "c_fc", "c_proj")
    core = adapted.base_model.model.circuitgpt
    x = torch.randn(1, 1, 6, 128, generator=torch.Generator().manual_seed(0))
    found = scalpel.jacobian(adapted, ids, "0.resid_in", "final_resid").jvp(x)
    covariance = scalpel.collect(adapted, [ids], ["final_resid"], progress=False)["final_resid"].covariance()
    parts, saved = (lambda: core.logit_attribution(ids, 7)), (lambda: core.save_pretrained(tmp_path / "core"))
    for refused in (core.edges, parts, saved):
        with pytest.raises(ValueError, match="merge_and_unload"):
            refused()
    with pytest.raises(ValueError, match="merge_and_unload"):
        scalpel.circuits.circuit_graph(adapted, ["1.attn.v:7"])
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(again(ids).logits, adapted(ids).logits, atol=1e-5)
    merged = adapted.merge_and_unload().circuitgpt
    expected = scalpel.jacobian(merged, ids, "0.resid_in", "final_resid").jvp(x)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (expected - scalpel.jacobian(brackets, ids).jvp(x)).norm() > 0.1 * expected.norm()
    states = scalpel.collect(merged, [ids], ["final_resid"], progress=False)
    assert torch.allclose(covariance, states["final_resid"].covariance(), rtol=1e-3, atol=1e-4)
    assert len(merged.edges()) > len(brackets.edges())


def test_an_adapter_of_positions_counts_with_a_mask_and_without(wrapped, ids):
    adapted = lora(wrapped, "wpe")
    logits = adapted(input_ids=ids).logits
    assert torch.equal(logits, adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    with adapted.disable_adapter():
        assert not torch.allclose(logits, adapted(input_ids=ids).logits, atol=1e-2)


def test_virtual_tokens_are_refused(wrapped, ids):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(wrapped, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    for refused in (
        lambda: scalpel.jacobian(tuned, ids),
        lambda: scalpel.collect(tuned, [ids], ["final_resid"], progress=False),
    ):
        with pytest.raises(ValueError, match="3 virtual tokens"):
            refused()


def test_a_wrapper_that_hands_on_attributes_is_no_circuitgpt(wrapped, ids):
    class Tripled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids):
            return self.inner(input_ids, use_cache=False).logits * 3

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    J = scalpel.jacobian(Tripled(wrapped), ids, "inner.circuit_model.transformer.h.0:in", "")
    plain = scalpel.jacobian(wrapped, ids, "0.resid_in", "logits")
    x = torch.ones(1, *plain.source_shape)
    assert torch.allclose(J.jvp(x), 3 * plain.jvp(x), rtol=1e-3, atol=1e-3)


def test_a_hook_outside_of_what_is_analysed_is_refused(wrapped, brackets, ids):
    for module in (wrapped, wrapped.circuit_model):
        handle = module.register_forward_pre_hook(lambda module, inputs: None)
        with pytest.raises(ValueError, match="there is a hook on the module"):
            scalpel.jacobian(wrapped, ids)
        handle.remove()
    seen = []
    handle = wrapped.circuit_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    logits = wrapped(ids).logits
    handle.remove()
    assert torch.equal(seen[0], logits)
    x = torch.ones(1, 1, 6, 128)
    assert torch.equal(scalpel.jacobian(wrapped, ids).jvp(x), scalpel.jacobian(brackets, ids).jvp(x))


# ---- messages ------------------------------------------------------------------------------------


def test_other_folders_fail_as_they_do_without_this_library(tmp_path):
    for text in ("{", json.dumps({"architectures": 5}), "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises((OSError, ValueError)) as error:
            AutoConfig.from_pretrained(tmp_path)
        assert not isinstance(error.value, CheckpointError)
    before = AutoConfig.from_pretrained
    from scalpel.models.transformers_classes.registration import register_config

    register_config(transformers.models.auto.configuration_auto)
    assert AutoConfig.from_pretrained == before


def test_offloaded_weights_are_refused_by_name(wrapped, ids):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(wrapped, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        wrapped(ids)


def test_names_that_no_hook_has_are_named(brackets, ids):
    with (
        pytest.warns(UserWarning, match=r"'0\.attn\.qq', which is no hook. Close: 0\.attn\.q"),
        hook_recorder("0.attn.k", {"0.attn.qq": lambda value: value}),
    ):
        brackets(ids)
    with pytest.warns(UserWarning, match="matches no hook"), hook_recorder("resid"):
        brackets(ids)


@pytest.mark.parametrize(
    "call, kind, says",
    [
        (lambda m, ids: m.near_ties([[1, 2]]), TypeError, "int64 tensor"),
        (lambda m, ids: m.near_ties(ids, within="x"), ValueError, "within is 'x'"),
        (lambda m, ids: m.generate(ids, 2, attention_mask=[[1, 1]]), TypeError, "attention_mask is list"),
        (lambda m, ids: m.generate(ids, 2.5), TypeError, "max_new_tokens"),
        (lambda m, ids: m.generate(ids, 2, use_cache="no"), TypeError, "use_cache is 'no'"),
    ],
)
def test_bad_arguments_are_named(call, kind, says, brackets, ids):
    with pytest.raises(kind, match=says):
        call(brackets, ids)


def test_the_tokenizer_knows_the_context_and_guesses_no_bos(brackets):
    for tokenizer in (
        AutoTokenizer.from_pretrained(brackets.folder),
        type(AutoTokenizer.from_pretrained(brackets.folder)).from_pretrained("bracket-mini"),
    ):
        assert tokenizer.model_max_length == 512 and tokenizer.bos_token is None and tokenizer.pad_token == "<s>"
        assert len(tokenizer("[1, " * 600, truncation=True)["input_ids"]) == 512
