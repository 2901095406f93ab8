"""How far a readout depends on the prompts that its lens was fitted on: intervals of logits and ranks.

The states of the text go through each of some prompts' own Jacobians, by tangents that go forward, without a matrix.
How these products scatter from prompt to prompt says how far the mean over the lens's prompts may be off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fits.prompts import length_of, read_prompts
from ..matrices import Lens, matrix_of
from .intervals import Intervals, intervals
from .readout import SKIPPED, Readout, transported
from .transported import transported as pushed

__all__ = ["ReadoutIntervals", "intervals_of", "intervals_of_probes"]


@dataclass(frozen=True)
class ReadoutIntervals:
    """The 95 % intervals of what a Jacobian lens reads of one text.

    Attributes:
        n_prompts: How many prompts told the scatter.
        logits: (layers, positions, k, 2), float64: of the logits of the tokens that the readout lists.
        ranks: (layers, positions, 2), float64: of the rank, from 1, of the token that the model itself puts first.
    """

    n_prompts: int
    logits: Tensor
    ranks: Tensor

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; ranks are integers."""
        return {
            "n_prompts": self.n_prompts,
            "logits": self.logits.tolist(),
            "ranks": self.ranks.round().to(torch.int64).tolist(),
        }


def intervals_of(
    lens: Lens,
    readout: Readout,
    text: Any,
    prompts: Any,
    *,
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReadoutIntervals:
    """Compute intervals of a readout: :meth:`scalpel.JacobianLens.intervals`."""
    about, model = lens.about, lens.attached
    if readout.jacobian is None:
        raise ValueError("the readout is of the logit lens alone, which no prompt decides: read with lens='both'")
    layers = [layer for layer in readout.layers if layer in lens.J]
    values, columns = model.values(model.text(text), layers), list(readout.positions)
    if max(columns) >= len(values):
        raise ValueError(f"the readout has positions up to {max(columns)}, and this text has {len(values)} tokens")
    if values.ids is not None and readout.tokens != tuple(map(model.piece, values.ids[columns].tolist())):
        raise ValueError("the readout is of another text, whose tokens are others: give the text that was read")
    if lens.n_prompts < 1:
        raise ValueError("this lens doesn't say how many prompts it is the mean of, so its scatter isn't known")
    vectors = {layer: values.states[layer][columns] for layer in layers}
    options = {name: about[name] for name in ("target", "skip_first", "targets", "precision") if name in about}
    if about.get("estimator", "jacobian") != "jacobian":
        raise ValueError(
            "a relevance lens is no Jacobian, and only a Jacobian takes a vector forward: it has no intervals"
        )
    products: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    shortest = int(options.get("skip_first", SKIPPED)) + 2
    place = next((weight.device for weight in model.inside.parameters()), torch.device("cpu"))
    short = 0
    for number, prompt in enumerate(read_prompts(prompts, model.words, int(about.get("max_tokens", 128))), start=1):
        if length_of(prompt) < shortest:
            short += 1
        else:
            given = prompt if place.type == "meta" else prompt.to(place)
            for layer, each in pushed(model.model, [given], vectors, **options).per_prompt.items():
                products[layer].append(each[0].cpu())
        if progress is not None:
            progress(number)
    count = len(products[layers[0]]) if layers else 0
    if short:
        warnings.warn(f"{short} prompts have fewer than {shortest} tokens and don't count", stacklevel=3)
    if count < 2:
        raise ValueError(
            f"intervals need two prompts or more of at least {shortest} tokens, and {count} were given: give more "
            "prompts, or longer ones"
        )
    ids = None if values.ids is None else values.ids[columns]

    def unembed(place: int) -> Callable[[Tensor], Tensor]:
        own = None if ids is None else ids[place]

        def logits(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            read = model.head.logits(rows, None if own is None else own.expand(len(rows)))
            return read.reshape(*x.shape[:-1], -1).cpu()

        return logits

    k = readout.jacobian.tokens.shape[-1]
    found = torch.zeros(len(readout.layers), len(columns), k, 2, dtype=torch.float64, device="cpu")
    ranks = torch.zeros(len(readout.layers), len(columns), 2, dtype=torch.float64, device="cpu")
    for row, layer in enumerate(readout.layers):
        for place in range(len(columns)):
            if layer not in products:  # the target, which is read as it is
                found[row, place] = readout.jacobian.logits[row, place, :, None].double()
                ranks[row, place] = readout.jacobian.ranks[row, place].double()
                continue
            own = transported(matrix_of(lens, layer), vectors[layer][place : place + 1]).cpu()
            scattered = torch.stack([each[place : place + 1] for each in products[layer]])
            listed = [*readout.jacobian.tokens[row, place].tolist(), int(readout.model.tokens[place, 0])]
            of_cell = intervals(
                unembed(place), scattered, listed, resamples=resamples, seed=seed, mean=own, n_prompts=lens.n_prompts
            )
            found[row, place] = torch.stack([of_cell.logits_low[0, :k], of_cell.logits_high[0, :k]], dim=-1)
            ranks[row, place] = torch.stack([of_cell.ranks_low[0, k], of_cell.ranks_high[0, k]])
    return ReadoutIntervals(count, found, ranks)


def intervals_of_probes(lens: Any, layer: Any, tokens: Any, after: Any, *, resamples: int, seed: int) -> Intervals:
    """Compute intervals of the probes of a fit: :meth:`scalpel.JacobianLens.probe_intervals`."""
    sums = lens.sums
    if sums is None or not sums.probes:
        raise ValueError("this lens has no probes: give probes= to scalpel.jacobian_lens.fit, or use lens.intervals")
    if layer not in sums.layers:
        raise ValueError(f"layer {layer!r} isn't among the lens's layers, {list(sums.layers)}")
    model = lens.attached
    listed, before = (
        _tokens(model, tokens),
        None if after is None else torch.tensor(_tokens(model, after), dtype=torch.int64, device="cpu"),
    )
    if before is not None and len(before) != sums.probes:
        raise ValueError(f"after has {len(before)} tokens; give one for each of the {sums.probes} probes")
    products = torch.from_numpy(sums.probed[:, sums.layers.index(layer)])

    def unembed(x: Tensor) -> Tensor:
        ids = None if before is None else before[: x.shape[-2]].expand(x.shape[:-1]).reshape(-1)
        logits: Tensor = model.head.logits(x.reshape(-1, x.shape[-1]).to(model.head.dtype), ids)
        return logits.reshape(*x.shape[:-1], -1).cpu()

    return intervals(unembed, products, listed, resamples=resamples, seed=seed)


def _tokens(model: Any, tokens: Any) -> list[int]:
    """The ids of one token or several, given as ids or texts."""
    return [model.token(token) for token in ([tokens] if isinstance(tokens, int | str) else list(tokens))]
