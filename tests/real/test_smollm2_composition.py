"""The experiment on composition finds SmolLM2-135M by the path of its GGUF, and reads text with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scalpel
from scalpel.experiments.composition import asked

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]


def test_a_few_prompts_through_the_last_layers(
    smollm2: Any, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "plain_model", lambda file: {smollm2_gguf: smollm2}[file])
    options = {"prompts": 8, "tokens": 20, "skip_first": 8, "probes": 2, "resamples": 50}
    result = scalpel.experiments.run("composition", str(smollm2_gguf), **options, sources=[24, 26], middles=[27])
    assert result.provenance["text"] == "topics of Python's help"
    assert [(row["l"], row["m"]) for row in result.measured["after"]["pairs"]] == [(24, 27), (26, 27)]
    # A layer's own Jacobian differs from token to token, so the averages of a few tokens don't compose.
    assert 0 < result.measured["after"]["defect"] < 1 and 0 <= result.null["after"]["edges"] < 0.3
