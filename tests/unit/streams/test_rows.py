"""scalpel.collect with rows=: which tokens count. The oracle is a plain forward pass, and NumPy over chosen rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from covariance_states import assert_close, same_bits
from decoder_cases import model_of
from scalpel import Rows, collect

HOOKS = ["1.resid_in", "1.resid_in.grad"]
BOS, END = 0, 3
LENGTHS = (7, 4, 1, 6)

Counts = Callable[[list[int]], list[int]]  # from the ids of a text without padding to the places that count


def texts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[BOS, *draw.integers(1, 13, size=length - 1).tolist()] for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    ids, mask = torch.full((len(LENGTHS), 7), END), torch.zeros(len(LENGTHS), 7, dtype=torch.int64)
    for i, text in enumerate(texts()):
        at = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
        ids[i, at], mask[i, at] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(model: nn.Module, counts: Counts) -> dict[str, np.ndarray]:
    """The rows at HOOKS, by transformers and autograd: each text by itself, without padding."""
    rows: dict[str, list[np.ndarray]] = {hook: [] for hook in HOOKS}
    model = copy.deepcopy(model).requires_grad_(True)
    for text in texts():
        ids = torch.tensor([text])
        with torch.enable_grad():
            found = model(ids, output_hidden_states=True, use_cache=False)
            state = found.hidden_states[1]
            state.retain_grad()
            F.cross_entropy(found.logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        slope = torch.zeros_like(state) if state.grad is None else state.grad
        for hook, value in zip(HOOKS, (state, slope), strict=True):
            rows[hook].extend(value.detach()[0].double().numpy()[counts(text)])
    return {hook: np.array(each) for hook, each in rows.items()}


def check(state: scalpel.StreamingCovariance, rows: np.ndarray, tolerance: float = 1e-10) -> None:
    assert state.count == len(rows)
    np.testing.assert_allclose(state.mean, rows.mean(axis=0), rtol=0, atol=tolerance)
    np.testing.assert_allclose(state.covariance(), np.cov(rows.T, bias=True), rtol=0, atol=tolerance)


def all_but(*ids: int) -> Counts:
    return lambda text: [i for i, token in enumerate(text) if token not in ids]


CHOICES: dict[str, tuple[Any, Counts]] = {
    "first": (Rows(skip_first=1), lambda text: list(range(1, len(text)))),
    "first three": (Rows(skip_first=3), lambda text: list(range(3, len(text)))),
    "ids": (Rows(skip_ids=[BOS, 5, 7]), all_but(BOS, 5, 7)),
    "ids in a tensor": (Rows(skip_ids=torch.tensor([END])), all_but(END)),
    "both": (Rows(2, {5}), lambda text: [i for i in all_but(5)(text) if i >= 2]),
    "function": (lambda batch: batch["input_ids"] % 2 == 0, lambda text: [i for i, t in enumerate(text) if t % 2 == 0]),
    "nothing": (Rows(), lambda text: list(range(len(text)))),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_left_out_and_all_tokens_attended_to(name: str, side: str) -> None:
    """Padding has id END, so that a token id that is left out and padding are told apart."""
    model = model_of("gpt2")
    rows, counts = CHOICES[name]
    states = collect(model, [padded(side)], HOOKS, rows=rows, progress=False)
    expected = by_hand(model, counts)
    assert len(expected[HOOKS[0]]) > 0
    for hook in HOOKS:
        check(states[hook], expected[hook])


def test_values_are_not_those_of_a_shortened_text() -> None:
    model = model_of("gpt2").double()
    ids = torch.tensor([texts()[0]])
    kept = collect(model, [ids], ["1.resid_in"], rows=Rows(skip_first=3), center=False)["1.resid_in"]
    full = model(ids, output_hidden_states=True).hidden_states[1][0, 3:].detach()
    short = model(ids[:, 3:], output_hidden_states=True).hidden_states[1][0].detach()
    torch.testing.assert_close(kept.covariance(), full.T @ full / 4, rtol=0, atol=1e-12)
    assert not torch.allclose(kept.covariance(), short.T @ short / 4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_narrow_models(dtype: torch.dtype, train: bool) -> None:
    model = model_of("llama").to(dtype).train(train)
    ids = torch.tensor([texts()[0]])
    state = collect(model, [ids], ["1.resid_in"], rows=Rows(skip_ids=[5]))["1.resid_in"]
    value = model(ids, output_hidden_states=True).hidden_states[1][0].detach().double().numpy()
    check(state, value[all_but(5)(texts()[0])], 1e-5)
    assert model.training == train


def test_a_mask_in_the_batch_is_not_handed_to_the_model() -> None:
    model, seen = model_of("gpt2"), []
    batch = padded("left")
    mask = torch.randint(0, 2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    handle = model.register_forward_pre_hook(lambda _, __, given: seen.append(set(given)), with_kwargs=True)
    states = [
        collect(model, [{**batch, "answer": each}], HOOKS, rows="answer") for each in (mask, mask.bool(), mask.double())
    ]
    handle.remove()
    assert all("answer" not in names and "input_ids" in names for names in seen)
    function = collect(model, [{**batch, "special_tokens_mask": 1 - mask}], HOOKS, rows=_not_special)
    counted = mask.bool() & batch["attention_mask"].bool()
    places = [each[real.bool()].nonzero()[:, 0].tolist() for each, real in zip(counted, batch["attention_mask"])]  # noqa: B905
    order = {tuple(text): at for text, at in zip(texts(), places, strict=True)}
    expected = by_hand(model, lambda text: order[tuple(text)])
    for hook in HOOKS:
        check(states[0][hook], expected[hook])
        assert all(same_bits(states[0][hook], other[hook]) for other in (*states[1:], function))


def _not_special(batch: Any) -> Tensor:
    return batch["special_tokens_mask"] == 0


def test_the_loss_sees_the_whole_batch() -> None:
    model, batch = model_of("gpt2"), padded("right")
    seen: list[Any] = []

    def loss(logits: Tensor, given: Any) -> Tensor:
        seen.append(given)
        return logits[given["kept"].bool()].square().sum()

    given = {**batch, "kept": batch["attention_mask"]}
    states = collect(model, [given], HOOKS, rows=Rows(skip_first=2, mask="kept"), loss=loss)
    assert seen and all(each is given for each in seen)
    assert states[HOOKS[1]].count == sum(max(0, length - 2) for length in LENGTHS)


def test_a_circuitgpt() -> None:
    model = build("like_csp_yolo2")
    batches = [tokens(model, 3, 7, seed=i) for i in range(3)]
    hooks = ["0.resid_in", "1.mlp.post_act", "final_resid", "final_resid.grad"]
    states = collect(model, batches, hooks, rows=Rows(skip_first=2, skip_ids=[4]))
    values: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for ids in batches:
        with torch.enable_grad():
            logits, acts = model.run_with_cache(ids)
            acts["final_resid"].retain_grad()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        acts["final_resid.grad"] = acts["final_resid"].grad
        for hook in hooks:
            values[hook] += [acts[hook][b, i] for b in range(3) for i in range(2, 7) if ids[b, i] != 4]
    for hook in hooks:
        check(states[hook], torch.stack(values[hook]).detach().double().numpy())


def test_groups_and_sketches() -> None:
    model, batches = model_of("gpt2"), [padded("left"), padded("right")]
    whole = collect(model, batches, HOOKS, rows=Rows(skip_first=1))
    grouped = collect(model, batches, HOOKS, rows=Rows(skip_first=1), memory="60KiB")
    assert type(grouped).__name__ == "Stored"
    for hook in HOOKS:
        assert_close(grouped[hook], whole[hook], 1e-12)
    sketch = collect(model, batches, HOOKS, rows=Rows(skip_first=1), rank=12)
    assert sketch[HOOKS[0]].count == whole[HOOKS[0]].count == 2 * sum(length - 1 for length in LENGTHS)


# ---- batches and corpora without rows ------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("empty_first", [True, False])
def test_a_batch_without_rows_adds_nothing(rank: int | None, empty_first: bool) -> None:
    model = model_of("gpt2")
    short, long = torch.tensor([[1, 2]]), torch.tensor([texts()[0]])
    batches = [short, long] if empty_first else [long, short]
    found = collect(model, batches, HOOKS, rows=Rows(skip_first=2), rank=rank)
    alone = collect(model, [long], HOOKS, rows=Rows(skip_first=2), rank=rank)
    assert all(same_bits(found[hook], alone[hook]) and found[hook].count == 5 for hook in HOOKS)


@pytest.mark.parametrize("memory", ["1GiB", "60KiB"])
def test_a_corpus_without_rows(memory: str, tmp_path: Path) -> None:
    batches = [torch.tensor([[1, 2]])] * 3
    for folder in (None, tmp_path / "states"):
        with pytest.raises(ValueError, match=r"no token of the whole corpus counts at 1\.resid_in.*longer texts"):
            collect(model_of("llama"), batches, HOOKS, memory, rows=Rows(skip_first=2), folder=folder)


# ---- resuming ------------------------------------------------------------------------------------


def kept_numbers(batch: Any) -> Tensor:
    return batch["input_ids"] > 4


def other_numbers(batch: Any) -> Tensor:
    return batch["input_ids"] > 5


def test_states_of_another_choice_are_refused(tmp_path: Path) -> None:
    model, batches = model_of("gpt2"), [padded("left")] * 3
    choices = [None, Rows(), Rows(1), Rows(2), Rows(skip_ids=[1]), kept_numbers, other_numbers, "kept"]
    batches = [{**batch, "kept": batch["attention_mask"]} for batch in batches]
    without = [padded("left")] * 3
    for i, choice in enumerate(choices):
        folder, given = tmp_path / f"{i}", batches if choice == "kept" else without
        first = collect(model, given, HOOKS, rows=choice, folder=folder)
        again = collect(model, given, HOOKS, rows=choice, folder=folder)
        assert all(same_bits(first[hook], again[hook]) for hook in HOOKS)
        for j, other in enumerate(choices):
            if i != j:
                with pytest.raises(ValueError, match="rows"):
                    collect(model, batches if other == "kept" else without, HOOKS, rows=other, folder=folder)


def test_a_stopped_call_goes_on(tmp_path: Path) -> None:
    model = model_of("gpt2")
    batches = [padded("left"), torch.tensor([[1, 2]]), padded("right"), padded("left")]
    rows = Rows(skip_first=2, skip_ids=[5])

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, batches, HOOKS, rows=rows, folder=tmp_path / "stopped", save_every=1, progress=stop)
    found = collect(model, batches, HOOKS, rows=rows, folder=tmp_path / "stopped", save_every=1)
    straight = collect(model, batches, HOOKS, rows=rows, folder=tmp_path / "other", save_every=1)
    assert all(same_bits(found[hook], straight[hook]) for hook in HOOKS)


# ---- values of other shapes ----------------------------------------------------------------------


class _Joined(nn.Module):
    """Tokens of all texts in one dimension, as in a mixture of experts; ``some`` are the tokens of one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.expert, self.some, self.turned = nn.Embedding(13, 5), nn.Linear(5, 3), nn.Identity(), nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.e(input_ids)
        self.turned(x.transpose(0, 1))
        flat = self.expert(x.reshape(-1, 5))
        self.some(flat[input_ids.flatten() > 6])
        return flat


def test_a_mixture_of_experts_joins_batch_and_length() -> None:
    model, batch = _Joined().double(), padded("left")
    state = collect(model, [batch], ["expert"], rows=Rows(skip_first=1, skip_ids=[5]))["expert"]
    rows = [model.expert(model.e(torch.tensor(t))) for text in texts() for t in text[1:] if t != 5]
    check(state, torch.stack(rows).detach().numpy())


def test_values_in_which_no_row_is_a_tokens() -> None:
    ids = torch.tensor([[7, 8, 1], [9, 2, 3]])
    assert collect(_Joined(), [ids], ["some"])["some"].count == 3
    with pytest.raises(ValueError, match=r"^some: .*\(3, 3\), without a row for each of the \(2, 3\) tokens"):
        collect(_Joined(), [ids], ["some"], rows=Rows(skip_first=1))
    with pytest.raises(ValueError, match=r"^turned: .*\(3, 2, 5\), its length before its batch.*no rows=, or leave"):
        collect(_Joined(), [ids], ["turned"], rows=Rows(skip_first=1))


def test_inputs_that_are_no_ids() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    state = collect(model, [x], ["0"], rows=Rows(skip_first=2))["0"]
    check(state, model[0](x[:, 2:]).detach().flatten(0, 1).numpy())
    with pytest.raises(ValueError, match=r"leaves out token ids, and the model's input is torch.float64.*\(2, 5, 4\)"):
        collect(model, [x], ["0"], rows=Rows(skip_ids=[1]))


# ---- encoder and decoder -------------------------------------------------------------------------


def _bart() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 6, "vocab_size": 13}
    config = transformers.BartConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return transformers.BartForConditionalGeneration(config).double().eval()


ENCODER, DECODER = "model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2"


def test_an_encoder_and_its_decoder_have_tokens_of_their_own() -> None:
    model = _bart()
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "decoder_input_ids": torch.tensor([[2, 5, 9], [2, 10, 5]]),
    }
    values: dict[str, Tensor] = {}
    for name in (ENCODER, DECODER):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: values.update({name: out.detach()}))
    model(**batch)
    states = collect(model, [batch], [ENCODER, DECODER], rows=Rows(skip_first=1, skip_ids=[2, 5]))
    check(states[ENCODER], values[ENCODER][[0, 0, 1], [2, 3, 1]].numpy())
    check(states[DECODER], values[DECODER][[0, 1], [2, 1]].numpy())
    masks = {"kept": torch.tensor([[1, 0, 0, 0, 1], [1, 0, 0, 1, 1]]), "decoder_kept": torch.tensor([[0, 1, 1]] * 2)}
    states = collect(model, [batch | masks], [ENCODER, DECODER], rows="kept")
    check(states[ENCODER], values[ENCODER][[0, 0, 1], [0, 4, 0]].numpy())
    check(states[DECODER], values[DECODER][[0, 0, 1, 1], [1, 2, 1, 2]].numpy())
    with pytest.raises(ValueError, match="takes the mask 'decoder_kept' from each batch"):
        collect(model, [batch | {"kept": masks["kept"]}], [DECODER], rows="kept")
    with pytest.raises(ValueError, match="chooses tokens of input_ids"):
        collect(model, [batch], [DECODER], rows=lambda given: given["attention_mask"])
    made = {name: value for name, value in batch.items() if name != "decoder_input_ids"}  # Bart shifts input_ids
    with pytest.raises(ValueError, match="give decoder_input_ids"):
        collect(model, [made], [DECODER], rows=Rows(skip_ids=[2]))


def test_a_module_named_decoder_without_an_encoder() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Embedding(13, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.decoder(input_ids)

    model, ids = Alone().double(), torch.tensor([[1, 2, 3, 2]])
    state = collect(model, [ids], ["decoder"], rows=Rows(skip_ids=[2]))["decoder"]
    check(state, model.decoder(ids)[0, [0, 2]].detach().numpy())
    assert collect(model, [ids], ["decoder"], rows=lambda batch: batch > 2)["decoder"].count == 1


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: Rows(skip_first=-1), ValueError, "skip_first is -1; it must be 0 or more"),
        (lambda: Rows(skip_first=True), TypeError, "skip_first is True"),
        (lambda: Rows(skip_first=1.5), TypeError, "skip_first is 1.5"),  # type: ignore[arg-type]
        (lambda: Rows(skip_ids=1), TypeError, "skip_ids is 1; it must be a collection"),  # type: ignore[arg-type]
        (lambda: Rows(skip_ids="<s>"), TypeError, "skip_ids is '<s>'; it must be a collection"),  # type: ignore[arg-type]
        (lambda: Rows(skip_ids=[None]), TypeError, "an id in skip_ids is None"),  # type: ignore[list-item]
        (lambda: Rows(skip_ids=[-1, 2]), ValueError, "skip_ids holds -1"),
        (lambda: Rows(skip_ids=torch.tensor([0.5])), TypeError, r"a tensor of torch.float32 and shape \(1,\)"),
        (lambda: Rows(mask=torch.ones(1, 7)), TypeError, "mask is Tensor"),  # type: ignore[arg-type]
        (lambda: Rows(mask="attention_mask"), ValueError, "which the model itself reads"),
        (lambda: Rows(mask="special_tokens_mask"), ValueError, "is 1 at special tokens.*== 0"),
    ],
)
def test_rows_that_cannot_be(make: Callable[[], Rows], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "rows,error,words",
    [
        (1, TypeError, r"rows is 1; it must be None.*Rows\(skip_first=1\).*Rows\(skip_ids="),
        ([0], TypeError, r"rows is \[0\]"),
        ("kept", ValueError, r"'kept' from each batch, and the batch has the keys \['attention_mask', 'input_ids'\]"),
        (lambda batch: [1], TypeError, "what the function of rows returns is list"),
        (lambda batch: batch["input_ids"][:1] > 0, ValueError, r"has shape \(1, 7\); it must be \(4, 7\)"),
        (lambda batch: batch["input_ids"], ValueError, "holds 0 to 11; it must hold True or 1"),
    ],
)
def test_rows_that_do_not_fit_the_batch(rows: Any, error: type[Exception], words: str) -> None:
    model = model_of("llama")
    with pytest.raises(error, match=words):
        collect(model, [padded("right")], HOOKS, rows=rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mask_needs_a_batch_with_names() -> None:
    with pytest.raises(ValueError, match="the batch is a tensor of ids: give a mapping"):
        collect(model_of("llama"), [padded("right")["input_ids"]], HOOKS, rows="kept")


def test_equal_choices_are_equal() -> None:
    assert Rows(skip_ids=[3, 1, 3]) == Rows(skip_ids=torch.tensor([1, 3])) == Rows(skip_ids={np.int64(3), 1})
    assert Rows(skip_first=np.int64(2)) == Rows(2) and Rows(1) != Rows(2)  # type: ignore[arg-type]
