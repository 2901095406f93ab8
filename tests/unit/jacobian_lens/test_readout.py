"""What a lens reads is the model's own last norm and head on J h, each compared with the same written out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import scalpel
from lens_cases import KINDS, by_hand, layers_of, lens_model, logits_of, random_lens, states_of, width_of
from scalpel.jacobian_lens.attached import scores

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def ranked(logits: Tensor) -> Tensor:
    """Tokens by their logits, equal ones by their ids, by Python's own sort."""
    return torch.tensor([sorted(range(len(row)), key=lambda token: (-row[token], token)) for row in logits.tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_norm_and_head_written_out(kind: str) -> None:
    model = lens_model(kind)
    lens, states = random_lens(model), states_of(model, IDS)
    found = lens.readout(IDS, k=4)
    own = logits_of(model, IDS)[0]
    assert torch.allclose(found.model.logits, own.sort(descending=True).values[:, :4], atol=1e-6)
    for row, layer in enumerate(found.layers):
        for scores_of, x in (
            (found.jacobian, states[layer][0] @ lens.J[layer].double().T),
            (found.logit, states[layer][0]),
        ):
            right = by_hand(model, x, IDS[0])
            order = ranked(right)
            assert scores_of is not None and torch.equal(scores_of.tokens[row], order[:, :4])
            assert torch.allclose(scores_of.logits[row], right.gather(1, order[:, :4]), atol=1e-5)
            assert torch.allclose(scores_of.probabilities[row], right.softmax(1).gather(1, order[:, :4]), atol=1e-6)
            first = own.argmax(1, keepdim=True)
            assert torch.equal(scores_of.ranks[row], 1 + (order == first).nonzero()[:, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_is_the_logit_lens_and_the_target_the_model(kind: str) -> None:
    model = lens_model(kind)
    layers = layers_of(model)
    lens = scalpel.JacobianLens({i: torch.eye(width_of(model)) for i in range(layers - 1)}, 1).attach(model)
    found = lens.readout(IDS, layers=range(layers), k=3)
    assert torch.equal(found.jacobian.tokens, found.logit.tokens)
    assert torch.equal(found.jacobian.logits, found.logit.logits)
    assert torch.equal(found.jacobian.tokens[-1], found.model.tokens)
    assert bool((found.jacobian.ranks[-1] == 1).all()) and found.error[layers - 1] == 0


def test_ranks_count_from_one_and_break_ties_by_id() -> None:
    model = lens_model("gpt2").float()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone()[[0, 1, 1, 1, *range(4, 19)]])
    model.config.tie_word_embeddings = False
    lens = random_lens(model)
    ranks = lens.ranks(IDS, [1, 2, 3], positions=[-1, 0])
    assert ranks.shape == (2, 2, 3)
    assert torch.equal(ranks[..., 1], ranks[..., 0] + 1) and torch.equal(ranks[..., 2], ranks[..., 0] + 2)
    logit = lens.ranks(IDS, 7, lens="logit")
    states = states_of(model, IDS)
    for layer in range(2):
        order = ranked(by_hand(model, states[layer][0], IDS[0]))
        assert torch.equal(logit[layer, :, 0], 1 + (order == 7).nonzero()[:, 1])


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = random_lens(lens_model("llama"))
    whole = lens.readout(IDS, k=3)
    monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", 2 * 19)
    few = lens.readout(IDS, k=3)
    assert torch.equal(few.jacobian.tokens, whole.jacobian.tokens)
    assert torch.equal(few.jacobian.ranks, whole.jacobian.ranks)
    assert torch.allclose(few.jacobian.logits, whole.jacobian.logits)


def test_texts_ids_and_padded_batches_are_one() -> None:
    lens = random_lens(lens_model("llama"))
    by_ids = lens.readout([0, 2, 1], k=3)
    text = lens.readout("acb   ", k=3)
    assert text.stripped and not by_ids.stripped and "spaces at the end" in repr(text)
    assert text.tokens == ("a", "c", "b")
    padded = {"input_ids": torch.tensor([[7, 7, 0, 2, 1]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    of_numpy = np.array([0, 2, 1])
    others = [
        lens.readout(ids, k=3) for ids in (torch.tensor([0, 2, 1]), padded, of_numpy, list(of_numpy), [[0, 2, 1]])
    ]
    for other in (text, *others):
        assert other.positions == (0, 1, 2)
        assert torch.equal(other.jacobian.tokens, by_ids.jacobian.tokens)
        assert torch.equal(other.jacobian.logits, by_ids.jacobian.logits)


def test_numbers_may_be_those_of_numpy_and_torch() -> None:
    lens = random_lens(lens_model("llama"))
    last = lens.source_layers[-1]
    found = lens.readout([0, 2, 1], layers=np.int64(last), positions=np.int64(-1))
    assert found.layers == (last,) and found.positions == (2,) and type(found.layers[0]) is int
    assert torch.equal(lens.vector(np.int64(5), np.int64(last)), lens.vector(5, last))
    assert torch.equal(lens.ranks([0, 2, 1], torch.tensor([5, 6])), lens.ranks([0, 2, 1], [5, 6]))
    with pytest.raises(TypeError, match="a token is tensor"):
        lens.vector(torch.tensor(0.5), last)


def test_positions_below_skip_first_are_marked() -> None:
    model = lens_model("gpt2")
    lens = random_lens(model, about={"skip_first": 4})
    found = lens.readout(IDS, positions=[-1, 3, 4], k=2, lens="jacobian")
    assert found.positions == (5, 3, 4) and found.skipped == (False, True, False) and found.logit is None
    assert all(random_lens(model).readout(IDS).skipped)  # a file of others doesn't say, and their fits leave out 16


def test_a_readout_shows_itself() -> None:
    lens = random_lens(lens_model("llama"), about={"skip_first": 2})
    found = lens.readout("abcde", layers=[1], k=2)
    lines = repr(found).splitlines()
    assert lines[1].split() == ["layer", "'a'*", "'b'*", "'c'", "'d'", "'e'"] and lines[2].startswith("1 ")
    html = found._repr_html_()
    assert html.count("<td") == 10 and "rank" in html
    token, share = found.top(1, -1)[0]
    assert token == lens.attached.piece(int(found.jacobian.tokens[0, -1, 0])) and 0 < share <= 1
    assert found.to_json()["jacobian"]["top"][0][-1][0][1:] == [token, float(found.jacobian.logits[0, -1, 0]), share]
    with pytest.raises(ValueError, match=r"layer 0 isn't in this readout, which has \[1\]"):
        found.top(0, -1)


def _capped(name: str, **changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 19,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("Granite", {"logits_scaling": 7.0}),
        ("Cohere", {"logit_scale": 9.0}),
    ],
)
def test_what_a_model_does_to_its_logits_is_done(name: str, changes: dict[str, float]) -> None:
    model = _capped(name, **changes)
    lens = scalpel.JacobianLens({0: torch.eye(12)}, 1).attach(model)
    found = lens.readout(IDS, layers=[2], k=5)
    own = model(IDS).logits[0]
    assert torch.allclose(found.jacobian.logits[0], own.sort(descending=True).values[:, :5], atol=1e-5)


def test_logits_that_are_something_else_are_refused() -> None:
    model = _capped("Gemma2", final_logit_softcapping=None)
    model.lm_head.register_forward_hook(lambda module, given, output: output)
    before = model.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = before(*arguments, **keywords)
        output.logits = output.logits * 2
        return output

    model.forward = forward
    lens = scalpel.JacobianLens({0: torch.eye(12)}, 1).attach(model)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM makes other logits than its last norm and its head alone"):
        lens.readout(IDS)
    weight = model.lm_head.weight
    found = lens.attach(model, unembed=lambda x: 2 * (model.model.norm(x) @ weight.T)).readout(IDS, layers=2, k=19)
    assert torch.allclose(found.logit.logits[0], found.model.logits, atol=1e-5)


class Residual(nn.Module):
    """A model of no known kind, which takes vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.out = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        result: Tensor = self.out(x)
        return result


def test_any_module_with_a_head_that_is_given() -> None:
    model, x = Residual().eval(), torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    J = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    lens = scalpel.JacobianLens({"blocks.0": J}, 1).attach(model)
    with pytest.raises(ValueError, match="give unembed= to attach"):
        lens.readout(x)
    found = lens.attach(model, unembed=model.out).readout(x, k=7)
    right = model.out(model.blocks[0](x[0]) @ J.T)
    assert torch.allclose(found.jacobian.logits[0], right.sort(descending=True).values, atol=1e-6)
    assert torch.allclose(found.model.logits, model(x)[0].sort(descending=True).values, atol=1e-6)
    assert torch.equal(lens.vector(3, "blocks.0"), model.out.weight[3].detach() @ J)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "circuit"])
def test_a_vector_is_the_gradient_of_the_logit_before_the_norm(kind: str) -> None:
    model = lens_model(kind)
    lens, h = random_lens(model), torch.randn(width_of(model), dtype=torch.float64, requires_grad=True)
    head = dict(model.named_modules())["lm_head"].weight
    (right,) = torch.autograd.grad(head[5] @ (lens.J[0].double() @ h), h)
    assert torch.allclose(lens.vector("f", 0), right, atol=1e-12)
    norm = model.model.norm if kind == "llama" else model.transformer.ln_f
    (right,) = torch.autograd.grad((norm.weight * head[5]) @ (lens.J[0].double() @ h), h)
    assert torch.allclose(lens.vector(5, 0, norm_gain=True), right, rtol=1e-6)


def test_gains_of_norms_that_add_one_are_found() -> None:
    model = _capped("Gemma2")
    model.model.norm.weight.add_(torch.linspace(-0.3, 0.4, 12))
    lens = scalpel.JacobianLens({0: torch.eye(12)}, 1).attach(model)
    right = model.lm_head.weight[4] * (1 + model.model.norm.weight)
    assert torch.allclose(lens.vector(4, 0, norm_gain=True), right, rtol=1e-5)


def test_wrapped_models_are_read_as_what_they_wrap() -> None:
    from scalpel.models.transformers_classes import CircuitGPTForCausalLM

    core = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    stands = CircuitGPTForCausalLM.from_pretrained(core.folder)
    J = {0: torch.randn(128, 128, generator=torch.Generator().manual_seed(0))}
    right = scalpel.JacobianLens(J, 1).attach(core).readout("x = [[1", k=3)
    for model in (stands, nn.DataParallel(core)):
        found = scalpel.JacobianLens(J, 1).attach(model, core.tokenizer).readout("x = [[1", k=3)
        assert torch.equal(found.jacobian.logits, right.jacobian.logits)


def test_refusals() -> None:
    model = lens_model("llama")
    bare = scalpel.JacobianLens({0: torch.eye(12)}, 1)
    with pytest.raises(ValueError, match=r"isn't attached to a model: call lens\.attach\(model\)"):
        bare.readout(IDS)
    lens = random_lens(model)
    for call, message in (
        (lambda: lens.readout(IDS, layers=[0, 5]), r"no layer 5; it has 0, 1, and 2, its target"),
        (lambda: lens.readout(IDS, positions=6), "position 6 is outside the text of 6 tokens"),
        (lambda: lens.readout(IDS, k=0), "k is 0"),
        (lambda: lens.readout(IDS, lens="tuned"), "lens is 'tuned'; allowed: 'both', 'jacobian', 'logit'"),
        (lambda: lens.readout("   "), "give a text of at least one token"),
        (lambda: lens.readout(IDS.expand(2, 6)), r"shape \(2, 6\); token ids are those of one text"),
        (lambda: lens.ranks(IDS, ["ab"]), "'ab' is 2 tokens"),
        (lambda: lens.ranks(IDS, [19]), "token 19 is outside the vocabulary, whose ids are 0 to 18"),
        (lambda: lens.vector(99, 0), "outside the vocabulary"),
        (lambda: bare.attach(model).readout("ab"), "no tokenizer of its own: give tokenizer= to attach"),
        (lambda: scalpel.JacobianLens({3: torch.eye(12)}, 1).attach(model), "no layer 3; its layers are 0 to 2"),
        (
            lambda: scalpel.JacobianLens({0: torch.eye(9)}, 1).attach(model).readout(IDS),
            "width 12, and the lens is one of",
        ),
        (lambda: scalpel.JacobianLens({}, 1), "at least one layer"),
        (lambda: scalpel.JacobianLens({0: torch.ones(2, 3)}, 1), "must be square"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="text is int"):
        lens.readout(5)


def test_attaching_another_model_warns() -> None:
    model = lens_model("gpt2")
    from scalpel.models.marks import model_mark

    lens = scalpel.JacobianLens({0: torch.eye(12)}, 1, about={"model_sha256": model_mark(model)})
    lens.attach(model)
    other = copy.deepcopy(model)
    other.lm_head.weight[0, 0] += 1
    with pytest.warns(UserWarning, match="this GPT2LMHeadModel isn't the model that the lens was fitted on"):
        lens.attach(other)
    lens.attach(other, check=False)


def test_a_float32_model_is_read_in_float32() -> None:
    model = lens_model("llama").float()
    found = random_lens(model).readout(IDS, k=2)
    assert found.jacobian.logits.dtype == torch.float32
    narrow = random_lens(lens_model("llama").bfloat16()).readout(IDS, k=2)
    assert narrow.jacobian.logits.dtype == torch.float32
