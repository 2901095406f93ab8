"""A model's abilities: accuracies on held-out files show which tasks it can do, with an interval over files."""

import numpy as np
import torch

from bracket_fixtures import small_tokenizer
from circuitgpt_cases import one_thread
from scalpel.experiments import abilities
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.tasks import held_out

__all__ = ["one_thread"]


class Oracle(torch.nn.Module):
    """Answers with the last quote that was opened: it can do one of the tasks and none of the others."""

    def __init__(self):
        super().__init__()
        self.tokenizer = small_tokenizer()
        self.config = CircuitGPTConfig(256, self.tokenizer.vocab_size, 1, 1, d_model=16, d_mlp=16)
        self.quotes = [small_tokenizer().single(quote) for quote in "'\""]

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        place = torch.arange(ids.shape[1])
        for quote in self.quotes:
            logits[..., quote] = torch.where(ids == quote, place, -1).cummax(-1).values.float()
        return logits


def test_accuracies_tell_who_can_do_what(monkeypatch):
    monkeypatch.setattr(held_out, "literals", lambda: ())
    by_task = abilities.accuracies(Oracle(), prompts=64)
    assert by_task["single_double_quote"]["accuracy"] == 1.0 == by_task["single_double_quote"]["interval"][0]
    assert by_task["single_double_quote"]["prompts"] == {"'": 32, '"': 32}
    assert by_task["set_or_string"]["accuracy"] == 0.5 and 0 < by_task["set_or_string"]["real"] < 1
    assert "reason" in by_task["bracket_counting"]  # no list was found
    nobody = Oracle()
    nobody.tokenizer = None
    assert all("no tokenizer" in task["reason"] for task in abilities.accuracies(nobody).values())


def test_the_interval_is_wider_where_files_agree_with_themselves():
    labels = np.tile([0, 1], 60)
    alone = np.random.default_rng(0).random(120) < 0.7
    files = np.arange(120) // 2
    together = np.repeat(np.random.default_rng(0).random(12) < 0.7, 10)
    narrow, wide = abilities.by_file(alone, labels, files), abilities.by_file(together, labels, np.arange(120) // 10)
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
