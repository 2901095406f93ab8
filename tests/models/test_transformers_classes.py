"""CircuitGPT through transformers' Auto classes: the same weights, the same bits, and no code from the checkpoint."""

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import scalpel
from circuitgpt_cases import BASE, build, one_thread, tokens  # noqa: F401
from scalpel import CircuitGPT, CircuitGPTConfig
from scalpel.models.weight_files import CheckpointError

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

CASES = ["plain", "tied", "rms_norm", "sink", "bigram_buffer", "positions_concatenated", "topk_everywhere", "no_layer"]
PROMPTS = ["x = [[1, 2], [3", "y = [4"]


@pytest.fixture(scope="module")
def brackets():
    return CircuitGPT.from_pretrained("bracket-mini")


@pytest.fixture(scope="module")
def wrapped(brackets):
    return AutoModelForCausalLM.from_pretrained(brackets.folder)


def hub_layout(model, folder, **more):
    """The layout of the hub: names of weights begin with circuit_model, and there is code, which must not run."""
    fields = {
        "architectures": ["CircuitGPTForCausalLM"],
        "auto_map": {"AutoConfig": "config.Trap", "AutoModelForCausalLM": "modeling.Trap"},
        "model_type": "circuitgpt",
        "torch_dtype": "float32",
        "transformers_version": "4.49.0",
        "tie_word_embeddings": True,  # transformers' default once, which says nothing about this model
        "unembed_rank": None,
        "bigram_table_rank": None,
        "mup_width_multiplier": None,
        "afrac_ste": False,
        "rtopk": False,
        "mup": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | model.config.to_public_dict() | more))
    torch.save(
        {f"circuit_model.{key}": value for key, value in model.state_dict().items()}, folder / "pytorch_model.bin"
    )
    for name in ("config.py", "modeling.py"):
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Trap: pass\n")
    return folder


@pytest.mark.parametrize("layout", ["public", "hub", "saved by transformers"])
@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_the_same_bits(name, layout, tmp_path):
    model = build(name, torch.float32)
    folder = tmp_path / "model"
    if layout == "hub":
        hub_layout(model, folder)
    else:
        model.save_pretrained(folder)
    if layout == "saved by transformers":
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(model, batch=3, length=6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] * 3 + [0] * 3])
    for use_cache in (False, True):
        with torch.no_grad():
            assert torch.equal(loaded(ids, use_cache=use_cache).logits, model(ids))
            assert torch.equal(loaded(ids, attention_mask=mask, use_cache=use_cache).logits, model(ids, mask))
    assert torch.equal(CircuitGPT.from_pretrained(folder)(ids), model(ids))
    assert not loaded.training and not (folder / "ran").exists()
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (model.config.d_model, model.config.n_layer)
    assert config.circuitgpt().to_public_dict() == model.config.to_public_dict()


def test_code_of_the_checkpoint_does_not_run_even_if_it_is_trusted(tmp_path):
    model = build("sink", torch.float32)
    folder = hub_layout(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto")
    assert torch.equal(loaded(tokens(model)).logits, model(tokens(model)))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("layout", ["public", "hub"])
def test_loading_is_strict(layout, tmp_path):
    model = build("sink", torch.float32)
    folder = tmp_path / "model"
    hub_layout(model, folder) if layout == "hub" else model.save_pretrained(folder)
    file = folder / ("config.json" if layout == "hub" else "beeg_config.json")
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"sink": False}))
    with pytest.raises(CheckpointError, match="sinks"):
        AutoModelForCausalLM.from_pretrained(folder)
    file.write_text(json.dumps(fields | {"novel_attention": 3}))
    with pytest.raises(ValueError, match="novel_attention"):
        AutoModelForCausalLM.from_pretrained(folder)
    file.write_text(json.dumps(fields | {"n_layer": 3}))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.2"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "asked, found",
    [({}, torch.float32), ({"dtype": "auto"}, torch.bfloat16), ({"torch_dtype": torch.float64}, torch.float64)],
)
def test_the_dtype_is_ours_unless_another_is_asked_for(asked, found, tmp_path):
    build("plain", torch.float32).bfloat16().save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **asked)
    assert {value.dtype for value in loaded.state_dict().values()} == {found}
    assert CircuitGPT.from_pretrained(tmp_path / "model").dtype == torch.float32
    with pytest.raises(ValueError, match="int64"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="int64")


@pytest.mark.parametrize("shipped", ["bracket-mini", "python-small"])
def test_the_tokenizer_splits_as_ours(shipped, tmp_path):
    model = CircuitGPT.from_pretrained(shipped)
    ours, theirs = model.tokenizer, AutoTokenizer.from_pretrained(model.folder)
    texts = ["x = [1, [2, 3]]\n", "def f(a):\n    return a\n", "[[[]]]\n"]
    batch = theirs(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = ours.batch(texts, side="left")
    assert torch.equal(batch["attention_mask"], mask) and torch.equal(batch["input_ids"] * mask, ids * mask)
    assert [theirs.decode(theirs(text)["input_ids"]) for text in texts] == texts
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(model.folder))
    assert again(texts)["input_ids"] == theirs(texts)["input_ids"] and again.pad_token == theirs.pad_token


def test_the_public_pair_of_files_is_a_tokenizer(tmp_path):
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz[]()=,:0123456789ĠĊ"))
    vocabulary = {token: i for i, token in enumerate([*letters, "]]", "]]Ċ", "Ġ["])}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n] ]\n]] Ċ\nĠ [\n")
    CircuitGPT(CircuitGPTConfig.from_dict(BASE | {"vocab_size": len(vocabulary)})).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("x [12]]\n")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["x", " [", "1", "2", "]]\n"]


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    build("plain", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_greedy_generation_with_left_padding(brackets, wrapped):
    tokenizer = AutoTokenizer.from_pretrained(brackets.folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    width = batch["input_ids"].shape[1]
    ours = brackets.generate(batch["input_ids"], 20, attention_mask=batch["attention_mask"], use_cache=False)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = wrapped.generate(**batch, max_new_tokens=20, do_sample=False, **options)
        assert torch.equal(out[:, width:], ours[:, width:])
    alone = tokenizer(PROMPTS[1:], return_tensors="pt")
    out = wrapped.generate(**alone, max_new_tokens=20, do_sample=False)
    assert torch.equal(out[0, alone["input_ids"].shape[1] :], ours[1, width:])


def test_beams_are_those_of_a_search_by_hand(brackets, wrapped):
    ids, _ = brackets.tokenizer.batch(["x = [[1, 2], [3"])
    beams, steps = 3, 6
    best = [(0.0, ids[0].tolist())]
    for _ in range(steps):
        found = []
        for score, text in best:
            following = brackets(torch.tensor([text]))[0, -1].double().log_softmax(-1).tolist()
            found += [(score + value, [*text, token]) for token, value in enumerate(following)]
        best = sorted(found, reverse=True)[:beams]
    out = wrapped.generate(
        ids,
        max_new_tokens=steps,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences.tolist() == [text for _, text in best]
    scores = torch.tensor([score for score, _ in best], dtype=torch.float64)
    assert torch.allclose(out.sequences_scores.double() * steps, scores, atol=1e-4)


def test_a_pipeline_from_the_folder(brackets):
    generator = transformers.pipeline("text-generation", model=str(brackets.folder))
    texts = generator(PROMPTS, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, (found,) in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([brackets.tokenizer.encode(prompt)])
        assert found["generated_text"] == brackets.tokenizer.decode(brackets.generate(ids, 5, use_cache=False)[0])


@torch.no_grad()
def test_a_cached_step_is_the_end_of_the_whole(wrapped, brackets):
    ids, _ = brackets.tokenizer.batch(["x = [[1, 2], [3, 4], 5, [6"])
    first = wrapped(ids[:, :5], use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    for name in ("cache", "past_key_values"):
        step = wrapped(ids[:, 5:], use_cache=True, **{name: copy.deepcopy(cache)})
        assert (step.logits - brackets(ids)[:, 5:]).abs().max() < 1e-5
    kept = wrapped(ids, logits_to_keep=2, use_cache=False).logits
    assert kept.shape[1] == 2 and torch.allclose(kept, brackets(ids)[:, -2:], atol=1e-5)
    states = wrapped(ids, output_hidden_states=True, use_cache=False).hidden_states
    _, values = brackets.run_with_cache(ids)
    assert torch.equal(states[0], values["0.resid_in"]) and torch.equal(states[1], values["1.resid_in"])
    assert torch.equal(states[-1], brackets.transformer.ln_f(values["final_resid"])) and len(states) == 3
    q, k = (values[f"1.attn.{name}"].double().unflatten(-1, (8, 16)).transpose(1, 2) for name in "qk")
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(
        ~torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), -torch.inf
    )
    sink = brackets.transformer.h[1].attn.sink_logit.double().exp()[:, None, None]
    expected = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sink)
    found = wrapped(ids, output_attentions=True).attentions
    assert len(found) == 2 and (found[1] - expected).abs().max() < 1e-5


def test_the_loss_is_the_cross_entropy_of_the_next_token(wrapped, brackets):
    ids, mask = brackets.tokenizer.batch(PROMPTS)
    labels = ids.masked_fill(mask == 0, -100)
    loss = float(wrapped(ids, attention_mask=mask, labels=labels).loss.detach())
    logs = brackets(ids, mask).double().log_softmax(-1)
    terms = [
        -float(logs[row, t, ids[row, t + 1]])
        for row in range(len(ids))
        for t in range(ids.shape[1] - 1)
        if mask[row, t + 1]
    ]
    assert math.isclose(loss, sum(terms) / len(terms), rel_tol=1e-5)


def test_trainer_trains_saves_and_loads(tmp_path):
    pytest.importorskip("accelerate")
    model = build("topk_everywhere", torch.float32)
    model.save_pretrained(tmp_path / "start")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    data = [{"input_ids": row, "labels": row} for row in tokens(model, batch=8, length=10)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run",
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=0.01,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(trained, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "end")
    ids = torch.stack([row["input_ids"] for row in data])
    for _ in range(2):  # gradient descent on all texts at once, by hand
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
            parameter.data -= 0.01 * gradient
    again = CircuitGPT.from_pretrained(tmp_path / "end")
    start = CircuitGPT.from_pretrained(tmp_path / "start").state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, trained.circuitgpt.state_dict()[name]), name
        assert (value - model.state_dict()[name]).abs().max() < 1e-5, name
    assert (again.lm_head.weight - start["lm_head.weight"]).abs().max() > 1e-4


def test_model_and_core_are_one(tmp_path):
    build("tied", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    core = model.circuitgpt
    ids = tokens(core)
    assert {f"circuit_model.{key}" for key in core.state_dict()} == set(model.state_dict())
    model.double()
    assert core.dtype == torch.float64 and core.final_logits_bias.dtype == torch.float64
    with torch.no_grad():
        core.final_logits_bias += 1
    assert torch.equal(model(ids).logits, core(ids))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, core(ids))
        with torch.no_grad():
            twin.circuit_model.final_logits_bias += 1
        assert torch.equal(twin(ids).logits, twin.circuitgpt(ids)) and not torch.equal(twin(ids).logits, core(ids))
    with pytest.raises(NotImplementedError, match="can't be resized to 20"):
        model.resize_token_embeddings(20)


def test_what_it_cannot_take_is_refused(wrapped, brackets):
    ids, _ = brackets.tokenizer.batch(PROMPTS[:1])
    with pytest.raises(ValueError, match="inputs_embeds"):
        wrapped(inputs_embeds=torch.zeros(1, 3, 128))
    with pytest.raises(ValueError, match="all heads"):
        wrapped(ids, attention_mask=torch.ones(1, 8, ids.shape[1], ids.shape[1]))


def test_weights_drawn_from_a_config_follow_the_seed_of_torch():
    config = AutoConfig.for_model("circuitgpt", **BASE)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(AutoModelForCausalLM.from_config(config).circuit_model.lm_head.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).circuit_model.lm_head.weight.is_meta


@pytest.mark.parametrize("first", ["scalpel", "transformers"])
def test_whichever_is_imported_first(first, tmp_path):
    build("plain", torch.float32).save_pretrained(tmp_path)
    second = "transformers" if first == "scalpel" else "scalpel"
    between = "from transformers import AutoModelForCausalLM, AutoTokenizer\n" if first == "transformers" else ""
    code = (
        f"import sys\nimport {first}\n{between}import {second}\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__module__)"
    )
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert "scalpel.models.transformers_classes.modeling" in done.stdout, done.stderr


def test_importing_scalpel_imports_neither_torch_nor_transformers():
    code = "import sys, scalpel; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_class_that_cannot_be_added_leaves_transformers_usable():
    code = (
        "import sys, warnings\nimport scalpel\n"
        "sys.modules['scalpel.models.transformers_classes.registration'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import AutoConfig\n"
        "said = [str(warning.message) for warning in caught if 'Scalpel' in str(warning.message)]\n"
        "print(AutoConfig.for_model('gpt2').model_type, said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gpt2 ['Scalpel could not make itself known"), done.stdout + done.stderr


def test_other_models_load_as_before(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    shutil.copy(tmp_path / "config.json", tmp_path / "beeg_config.json")  # config.json wins
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "GPT2LMHeadModel"
    found, unused = AutoConfig.from_pretrained(tmp_path, use_cache=False, foo=1, return_unused_kwargs=True)
    assert found.use_cache is False and unused["foo"] == 1
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(tmp_path / "absent")


def test_functions_of_the_library_take_the_model_itself(wrapped, brackets):
    ids, mask = brackets.tokenizer.batch(PROMPTS)
    for source, target in (("0.attn.v", "1.attn.y"), ("circuit_model.transformer.h.0:in", "logits")):
        theirs = scalpel.jacobian(wrapped, {"input_ids": ids, "attention_mask": mask}, source, target)
        ours = scalpel.jacobian(brackets, ids, source.removeprefix("circuit_model."), target, attention_mask=mask)
        tangent = torch.randn(1, *ours.source_shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(theirs.jvp(tangent), ours.jvp(tangent))
    name = "circuit_model.transformer.h.1.mlp.c_proj:in"
    states = scalpel.collect(wrapped, [ids], ["1.mlp.post_act", name], progress=False)
    with torch.no_grad():
        _, values = brackets.run_with_cache(ids, ["1.mlp.post_act"])
    rows = values["1.mlp.post_act"].double().flatten(0, 1)
    for state in states.values():
        assert torch.allclose(state.covariance(), torch.cov(rows.T, correction=0), atol=1e-9)
    assert torch.equal(scalpel.lyapunov(wrapped, ids, 3).exponents, scalpel.lyapunov(brackets, ids, 3).exponents)
    task = scalpel.circuits.bracket_counting(wrapped, prompts=4, seed=0)
    effects = scalpel.circuits.ablation_effects(wrapped, task, hooks=["1.attn.v"])
    again = scalpel.circuits.ablation_effects(brackets, task, hooks=["1.attn.v"])
    assert (effects.hooks["1.attn.v"] == again.hooks["1.attn.v"]).all()
    guard = scalpel.HoleGuard(wrapped, scalpel.semigroup.ThresholdCounter("1/8"))
    assert guard.distance("x = [[1, 2").tokens_left > 0
    with pytest.raises(ValueError, match="two or more amounts"):  # the model is accepted, the option is not
        scalpel.experiments.run("dilution", wrapped, calibrate=(2,))
