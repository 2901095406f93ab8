"""The number of forward passes of an analysis: each chunk passes through each layer once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from analysis_cases import SIZES
from scalpel.analysis import analyze
from scalpel.jacobians.rows import trace


@pytest.mark.parametrize("untrained", [False, True])
def test_each_chunk_goes_through_a_circuitgpt_once(
    untrained: bool, circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of its norms show that: there are two in each of two layers. No figure needs the norm before the
    logits.
    """
    norms: list[nn.Module] = []
    plain = nn.RMSNorm.forward

    def forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
        norms.append(self)
        return plain(self, x)

    monkeypatch.setattr(nn.RMSNorm, "forward", forward)
    analysis = analyze(circuit, text, tmp_path / "out", untrained=untrained, **SIZES)
    models = 2 if untrained else 1
    assert len({id(norm) for norm in norms}) == models * 4
    assert len(norms) == (len(analysis.chunks) + models - 1) * 4  # the untrained model sees the first chunk alone
    assert analysis.trained["active"] and analysis.trained["margins"]


@pytest.mark.parametrize("stream", [False, True])
def test_each_chunk_goes_through_a_decoder_once(
    stream: bool, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception is the first chunk, because part of it is also compared with transformers' own forward pass."""
    tokens: list[int] = []
    through = trace.through_layer

    def layer(decoder: Any, i: int, weights: Any, x: Tensor, *rest: Any) -> Tensor:
        tokens.append(x.shape[1])
        return through(decoder, i, weights, x, *rest)

    monkeypatch.setattr(trace, "through_layer", layer)
    analyze(llama, text, tmp_path / "out", length=18, chunks=2, tangents=2, stretches=0, untrained=False, stream=stream)
    compared = [] if stream else [14] * 3
    assert tokens == compared + [18] * 2 * 3
