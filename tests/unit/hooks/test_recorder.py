"""The recorder that stands in for the published one, and a model that is called as the published one is."""

import threading

import numpy as np
import pytest
import torch

from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from circuitgpt_oracle import forward
from scalpel import CircuitGPT
from scalpel.models import hook_recorder
from scalpel.models.transformers_classes.published import PublishedGPT


def slow_values(model, ids):
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    return forward(model.config.to_dict(), weights, ids[0].tolist())


@torch.no_grad()
def test_names_and_values_are_those_of_a_slow_implementation():
    model = build("like_csp_yolo2")
    ids = tokens(model, batch=1)
    _, values = slow_values(model, ids)
    with hook_recorder() as recorded:
        model(ids)
    assert list(recorded) == model.hook_names
    assert all(np.abs(recorded[name][0].numpy() - values[name]).max() < 1e-10 for name in recorded)
    with hook_recorder(regex=r"0\.attn\..*") as recorded:
        model(ids)
    expected = ["act_in", "k", "q", "v", "y", "resid_delta"]
    assert list(recorded) == [f"0.attn.{name}" for name in expected]


@torch.no_grad()
def test_the_published_call_gives_logits_loss_and_state():
    model = build("sink")
    ids = tokens(model, batch=1, length=5)
    logits, values = slow_values(model, ids)
    published = PublishedGPT(model)
    found, loss, state = published(ids)
    assert np.abs(found[0].numpy() - logits).max() < 1e-10
    assert torch.equal(loss, torch.zeros(1, dtype=torch.float64))
    assert [np.abs(x[0].numpy() - values[f"{i}.resid_in"]).max() < 1e-10 for i, x in enumerate(state)] == [True, True]
    targets = torch.tensor([[3, -1, 0, 12, -1]])
    _, loss, state = published(ids, targets, include_resid_mid=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert abs(float(loss) + (logs[0, 3] + logs[2, 0] + logs[3, 12]) / 3) < 1e-10
    names = ["0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid"]
    assert all(np.abs(x[0].numpy() - values[name]).max() < 1e-10 for x, name in zip(state, names, strict=True))
    assert published.config is model.config and published.hook_names == model.hook_names
    with pytest.raises(AttributeError, match="no_such_name"):
        published.no_such_name  # noqa: B018


def test_interventions_come_before_recording():
    model = build("plain")
    ids = tokens(model)
    double = {"0.attn.v": lambda value: 2 * value}
    with hook_recorder(r"0\.attn\.v|final", double) as recorded:
        changed = model(ids)
    _, plain = model.run_with_cache(ids, ["0.attn.v"])
    by_hand = model.run_with_hooks(ids, [("0.attn.v", lambda value, name: 2 * value)])
    assert torch.equal(recorded["0.attn.v"], 2 * plain["0.attn.v"]) and torch.equal(changed, by_hand)
    with model.ablate("0.attn.v", "zero"), hook_recorder(r"0\.attn\.v", {"0.attn.v": lambda value: value + 1}) as after:
        model(ids)
    assert torch.equal(after["0.attn.v"], torch.ones_like(after["0.attn.v"]))


def test_gradients_are_those_of_autograd():
    model = build("topk_everywhere")
    ids = tokens(model)
    with hook_recorder(r"0\.resid_in|1\.mlp\.post_act|1\.attn\.v$", save_grads=True) as recorded:
        loss = model(ids).square().mean()
        loss.backward()
    assert sorted(recorded) == ["0.resid_in", "0.resid_in.grad", "1.attn.v", "1.mlp.post_act", "1.mlp.post_act.grad"]
    kept = {}

    def keep(value, name):
        kept[name] = value.detach().requires_grad_()
        return kept[name]

    for name in ("0.resid_in", "1.mlp.post_act"):
        loss = model.run_with_hooks(ids, [(name, keep)]).square().mean()
        (expected,) = torch.autograd.grad(loss, kept[name])
        assert torch.allclose(recorded[f"{name}.grad"], expected, rtol=1e-10, atol=1e-12)


def test_one_recorder_at_a_time_in_each_thread():
    model = build("plain")
    ids = tokens(model)
    with hook_recorder("0.resid_in") as outer:
        with pytest.raises(RuntimeError, match="already in force"), hook_recorder():
            pass
        inside = {}

        def run():
            model(ids)  # recorded nowhere: the recorder belongs to the other thread
            with hook_recorder("1.resid_in") as recorded:
                model(ids)
            inside.update(recorded)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert list(inside) == ["1.resid_in"] and outer == {}
        model(ids)
    assert list(outer) == ["0.resid_in"]
    model(ids + 0)
    with pytest.raises(ValueError, match="not a regular expression"), hook_recorder("("):
        pass
    with pytest.raises(KeyError), hook_recorder():
        raise KeyError
    with hook_recorder("final") as recorded:
        model(ids)
    assert list(recorded) == ["final_resid"]


def test_the_snippets_of_the_seed_run(capsys):
    pytest.importorskip("transformers")
    folder = str(CircuitGPT.from_pretrained("bracket-mini").folder)
    scope = {}
    exec(
        f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

tok = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True, torch_dtype="auto")
model.to('cuda' if torch.cuda.is_available() else 'cpu')

prompt = "[[xxx"
inputs = tok(prompt, return_tensors='pt')['input_ids'].to(model.device)

with torch.no_grad():
    out = model.generate(inputs, max_new_tokens=1)

print(tok.decode(out[0], skip_special_tokens=True))

from scalpel.models import hook_recorder

input_ids = inputs
with hook_recorder(regex="0\\\\.attn\\\\..*") as recorded:
    logits, loss, _ = model.circuit_model(input_ids)

attention_queries = recorded["0.attn.q"]
attention_values = recorded["0.attn.v"]
""",
        scope,
    )
    core = scope["model"].circuitgpt
    assert capsys.readouterr().out.startswith("[[xxx")
    _, values = core.run_with_cache(scope["inputs"], ["0.attn.q", "0.attn.v"])
    assert torch.equal(scope["attention_queries"], values["0.attn.q"])
    assert torch.equal(scope["logits"], core(scope["inputs"]))
