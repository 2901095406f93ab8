"""Training: the recipe's arithmetic, interruptions that lose nothing, and a model folder with its card."""

import json
from dataclasses import replace

import pytest
import torch

from bracket_fixtures import SOURCES, small_tokenizer
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.models.sparsity import prune_
from scalpel.training import bracket_mini
from scalpel.training.loop import train
from scalpel.training.recipe import Recipe, clip_rms_, density_table, sparse_matrices
from scalpel.training.text import TextCourse, batches

TINY = Recipe(
    d_model=16, n_layer=1, d_head=8, block_size=320, vocab_size=small_tokenizer().vocab_size, steps=20, batch=4, seed=3
)


def train_text(recipe, state_file, progress=None):
    return train(recipe, TextCourse(recipe, SOURCES, small_tokenizer()), state_file, progress)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use a fixed number of threads, because sums are only reproducible to the bit for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_prune_keeps_the_largest_and_a_few_in_every_row_and_column():
    weight = torch.randn(40, 30)
    weight[7] *= 1e-3
    weight[:, 5] *= 1e-3
    pruned = weight.clone()
    prune_(pruned, 0.1, 2)
    kept = pruned != 0
    assert torch.equal(pruned[kept], weight[kept])
    assert int(kept.sum(0).min()) >= 2 and int(kept.sum(1).min()) >= 2
    largest = weight.abs() >= weight.abs().flatten().kthvalue(1200 - 120 + 1).values
    assert bool((kept | ~largest).all()) and int(kept.sum()) < 120 + 2 * 70
    plain = weight.clone()
    prune_(plain, 0.1, 0)
    assert int(plain.count_nonzero()) == 120
    prune_(plain, 0.0, 0)
    assert int(plain.count_nonzero()) == 0


def test_density_and_learning_rate_follow_the_schedule():
    recipe = replace(TINY, steps=1000, density=0.2, anneal=0.5, lr=1.0, warmup=0.01)
    assert recipe.density_at(499) == pytest.approx(0.2) and recipe.density_at(999) == pytest.approx(0.2)
    assert recipe.density_at(249) == pytest.approx(0.6)
    assert recipe.lr_at(0) == pytest.approx(0.1, rel=1e-2)
    assert recipe.lr_at(500) == pytest.approx(0.5 / 0.2**0.5, rel=1e-6)


def test_gradients_are_clipped_to_a_root_mean_square():
    parameters = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(3, 2))]
    for p in parameters:
        p.grad = torch.randn_like(p) * 100
    clip_rms_(parameters, 1.0)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    assert flat.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)
    before = flat.clone() * 0.1
    for p, g in zip(parameters, before.split([5, 6]), strict=True):
        p.grad = g.view_as(p).clone()
    clip_rms_(parameters, 1.0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), before)


def test_any_step_can_be_reached_without_the_ones_before():
    from itertools import islice

    whole = list(islice(batches(TINY, SOURCES, small_tokenizer()), 20))
    for start in (0, 5, 16, 18):
        for one, other in zip(batches(TINY, SOURCES, small_tokenizer(), start), whole[start:], strict=False):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.positions, other.positions)


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    whole = train_text(TINY, tmp_path / "whole.pt")

    def stop_at_seven(step, steps, loss):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(TINY, tmp_path / "stopped.pt", stop_at_seven)
    seen = []
    resumed = train_text(TINY, tmp_path / "stopped.pt", lambda step, *_: seen.append(step))
    assert seen == list(range(8, 21))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert resumed.longest == whole.longest and resumed.loss == whole.loss
    density = {n: row["density"] for n, row in density_table(resumed.model).items()}
    assert all(0 < d < 0.8 for d in density.values()), density


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch):
    import os
    import signal

    from scalpel.training import loop

    whole = train_text(TINY, tmp_path / "whole.pt")
    calls = []

    def prune_and_interrupt(*given):
        calls.append(1)
        if len(calls) == 23:  # at some point inside a step
            os.kill(os.getpid(), signal.SIGINT)
        prune_(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prune_", prune_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_text(TINY, tmp_path / "stopped.pt")
    assert len(calls) < 20 * 7
    resumed = train_text(TINY, tmp_path / "stopped.pt")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_state_of_another_recipe_is_refused(tmp_path):
    short = replace(TINY, steps=2)
    train_text(short, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another recipe"):
        train_text(replace(short, seed=9), tmp_path / "state.pt")


def test_learning_lowers_the_loss(tmp_path):
    first = []
    recipe = replace(TINY, steps=60, batch=8, lr=5e-3)
    trained = train_text(recipe, tmp_path / "s.pt", lambda step, n, loss: first.append(loss))
    assert trained.loss < first[0] - 0.5


def test_the_matrices_that_are_pruned():
    model = CircuitGPT(TINY.config())
    names = {name for name, _ in sparse_matrices(model, embeddings=True)}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} < names
    assert all(".h." in name for name, _ in sparse_matrices(model, embeddings=False))


def test_a_model_is_trained_into_a_folder_with_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(bracket_mini, "interpreter_sources", lambda: SOURCES)
    monkeypatch.setattr(bracket_mini, "TOKENIZER_TEXTS", 500)
    questions = [("x = [1, 2", 1), ("y = [[1", 2), ("z = [[1], [2", 2)]
    monkeypatch.setattr(bracket_mini, "held_out_questions", lambda: (questions, {"numpy": "0"}))
    monkeypatch.setattr(bracket_mini, "Recipe", lambda **given: replace(TINY, vocab_size=330, steps=3, **given))
    steps = []
    card = bracket_mini.train_model(
        tmp_path / "m", control="no-positions", seed=5, progress=lambda step, n, loss: steps.append((step, n))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not (tmp_path / "m" / "training-state.pt").exists()
    model = CircuitGPT.from_pretrained(tmp_path / "m")
    assert model.card["recipe"]["seed"] == 5 and model.card["name"] == "bracket-mini-no-positions"
    assert not model.transformer.wpe.weight.any()
    assert json.loads((tmp_path / "m" / "card.json").read_text())["accuracy"]["prompts_depth_2"] == 2
    assert card["matrices"]["lm_head.weight"]["nonzero"] == int(model.lm_head.weight.count_nonzero())
    with pytest.raises(ValueError, match="no-positions, no-topk"):
        bracket_mini.train_model(tmp_path / "x", control="nonsense")
