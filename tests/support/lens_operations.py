"""The public operations of Jacobian lenses: their lines of the table in public_operations.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalpel
from analysis_cases import letters
from operation_inputs import Given, drawn
from scalpel.jacobian_lens import transported
from scalpel.jacobian_lens.reading.intervals import intervals


def llama_lens(g: Given) -> scalpel.JacobianLens:
    J = {layer: drawn(12, 12, seed=layer) for layer in (0, 1)}
    return scalpel.JacobianLens(J, 2, model=g.llama)


def changed(g: Given, intervention: Any) -> Tensor:
    with torch.no_grad(), intervention as model:
        return model(g.ids)


def generated(g: Given, intervention: Any) -> Tensor:
    with intervention as model:
        return model.generate(g.decoder_ids, max_new_tokens=2, do_sample=False)


def with_intervals(g: Given) -> Any:
    lens = scalpel.JacobianLens(g.lens.J, 3, about={"target": 1, "skip_first": 1}, model=g.model)
    read = lens.readout(g.ids[:1], positions=[-1], k=2)
    return lens.intervals(read, g.ids[:1], list(g.ids.split(1)), resamples=20).to_json()


def evaluated(g: Given) -> Any:
    items = [{"prompt": "abc", "intermediates": ["a", "d"]}, {"prompt": "cab", "intermediates": ["b"]}]
    return g.lens.evaluate(items, derangements=0).to_json()


def fitted(g: Given, seed: int = 6, **options: Any) -> scalpel.JacobianLens:
    ids = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(seed), device="cpu")
    return scalpel.jacobian_lens.fit(g.model, ids, skip_first=2, progress=False, **options)


def with_probes(g: Given) -> Any:
    width = g.model.config.d_model
    probes = torch.randn(2, width, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return vars(fitted(g, probes=probes).probe_intervals(0, ["a", 3], after=[1, "b"], resamples=20))


def fitted_folder(g: Given) -> Path:
    fitted(g, folder=(folder := g.new("fit")))
    return folder


def merged_lenses(g: Given) -> Any:
    exact = fitted(g).merge(fitted(g, seed=7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = g.lens.merge(scalpel.JacobianLens({0: drawn(12, 12, seed=8)}, 5, error={0: 0.25}))
    return exact.J[0], exact.error, means.J, means.error


def of_a_lens(g: Given) -> Any:
    found = transported(g.llama, [g.decoder_ids[:1], g.decoder_ids[1:]], {0: drawn(2, 12), 1: drawn(12)}, skip_first=1)
    of_circuit = transported(g.model, [g.ids[:1]], {0: drawn(2, g.model.config.d_model)}, skip_first=1, targets="same")
    read = intervals(lambda x: x[..., :5], found.per_prompt[0], [0, 3], resamples=9)
    return [found.mean, found.error, found.standard_error, of_circuit.mean, *vars(read).values()]


LENS_OPERATIONS: dict[str, Callable[[Given], Any]] = {
    "JacobianLens": lambda g: scalpel.JacobianLens({0: g.lens.J[0].half()}, 3).J,
    "JacobianLens.attach": lambda g: g.lens.attach(g.model, letters(13)).d_model,
    "JacobianLens.readout": lambda g: [g.lens.readout(g.ids[:1], [0, 1]), g.lens.readout("abc  ").to_json()],
    "JacobianLens.readout, llama": lambda g: llama_lens(g).readout(g.decoder_ids[:1], k=3),
    "JacobianLens.ranks": lambda g: g.lens.ranks(g.ids[:1], [1, "c"]),
    "JacobianLens.intervals": with_intervals,
    "JacobianLens.probe_intervals": with_probes,
    "JacobianLens.vector": lambda g: [g.lens.vector("a", 0), g.lens.vector(2, 0, norm_gain=True)],
    "JacobianLens.steer": lambda g: changed(g, g.lens.steer("a", 2.0, 0)),
    "JacobianLens.steer, llama": lambda g: generated(g, llama_lens(g).steer(3, 2.0, [0, 1], [1, -1], norm=3.0)),
    "JacobianLens.ablate": lambda g: changed(g, g.lens.ablate(["a", 3], 0, [0, -1])),
    "JacobianLens.swap": lambda g: [changed(g, g.lens.swap("a", 3, 0, clean=clean)) for clean in (None, g.ids)],
    "JacobianLens.permuted": lambda g: g.lens.permuted(1).J,
    "JacobianLens.random": lambda g: g.lens.random(1).J,
    "JacobianLens.deranged": lambda g: llama_lens(g).deranged(1).J,
    "JacobianLens.evaluate": lambda g: evaluated(g),
    "JacobianLens.merge": merged_lenses,
    "JacobianLens.from_sums": lambda g: (one := fitted(g), scalpel.JacobianLens.from_sums(one.sums, {}).J[0]),
    "JacobianLens.from_folder": lambda g: scalpel.JacobianLens.from_folder(fitted_folder(g)).J,
    "JacobianLens.save": lambda g: (g.lens.save(path := g.new("lens")), torch.load(path, weights_only=True)),
    "JacobianLens.load": lambda g: (one := scalpel.JacobianLens.load(g.lens_file), one.J, one.error, one.about),
    "jacobian_lens.fit": lambda g: (one := fitted(g), one.J, one.error),
    "jacobian_lens.token_vectors": lambda g: scalpel.jacobian_lens.token_vectors(
        g.model, [1, 2], g.ids[:1], skip_first=0
    ),
    "jacobian_lens.transported": of_a_lens,
}
