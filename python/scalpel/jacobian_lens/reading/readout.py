"""What a lens reads at each layer and token of a text: the model's own last norm and head on J_l h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hooks.positions import select
from ..attached.model import AttachedModel, Values
from ..attached.scores import Scores, of_logits, score
from ..matrices import Lens, check_width, chosen_layers, matrix_of

__all__ = ["SKIPPED", "Readout", "ranks", "readout", "transported"]

SKIPPED = 16  # the first tokens that the published fits leave out, where a file doesn't say
_KINDS = ("both", "jacobian", "logit")
_SHOWN = 8  # the columns of a table in a terminal


@dataclass(frozen=True, eq=False)
class Readout:
    """What a lens reads of one text: for each layer and token the likeliest next tokens.

    Attributes:
        layers: The layers, one a row.
        positions: The tokens that were read, counted from the first real one, one a column.
        tokens: The text of each token of ``positions``, or its place where the model takes no token ids.
        k: How many tokens are kept of each readout.
        jacobian: What the Jacobian lens reads, (layers, positions, k); None if it wasn't asked for. ``.tokens`` are
            ids, ``.logits`` and ``.probabilities`` theirs, and ``.ranks`` (layers, positions, 1) the rank, from 1, of
            the token that the model itself puts first.
        logit: The same for the logit lens, which reads h in place of J_l h; None if it wasn't asked for.
        model: What the model itself says, (positions, k).
        skipped: For each position, whether it lies below the lens's ``skip_first``, so that the lens wasn't fitted at
            such tokens.
        stripped: Whether spaces at the end of the text were taken away.
        error: The relative error of each layer's matrix; NaN where it is unknown, 0 at the target.
        pieces: The text of each token that occurs here.
    """

    layers: tuple[Any, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    k: int
    jacobian: Scores | None
    logit: Scores | None
    model: Scores
    skipped: tuple[bool, ...]
    stripped: bool
    error: dict[Any, float]
    pieces: dict[int, str] = field(repr=False)

    def top(self, layer: Any, position: int, lens: str = "jacobian") -> list[tuple[str, float]]:
        """List the likeliest tokens of one readout.

        Args:
            layer: One of :attr:`layers`.
            position: One of :attr:`positions`; negative ones count from the last of them.
            lens: ``"jacobian"`` or ``"logit"``, or ``"model"`` for what the model itself says.

        Returns:
            Pairs (text of the token, probability), the likeliest first.

        Raises:
            ValueError: The layer, the position or the lens isn't in this readout.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> (first, share), *others = lens.readout("x = [[1", positions=-1, k=9).top(0, -1, "model")
            >>> len(others), all(share >= other for _, other in others)
            (8, True)
        """
        scores, row, column = self._scores(lens), self._row(layer) if lens != "model" else 0, self._column(position)
        ids = scores.tokens[column] if lens == "model" else scores.tokens[row, column]
        shares = scores.probabilities[column] if lens == "model" else scores.probabilities[row, column]
        return [(self.pieces[token], share) for token, share in zip(ids.tolist(), shares.tolist(), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the whole readout as plain data.

        Returns:
            A mapping with the attributes by their names; each readout is a list of [id, text, logit, probability].

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> found = lens.readout("x = [[1", positions=-1, k=2).to_json()
            >>> found["layers"], found["positions"], len(found["jacobian"]["top"][0][0])
            ([0], [6], 2)
        """
        lenses = {name: self._plain(scores) for name in ("jacobian", "logit") if (scores := getattr(self, name))}
        return {
            "layers": list(self.layers),
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "skipped": list(self.skipped),
            "stripped": self.stripped,
            "error": [None if math.isnan(self.error[layer]) else self.error[layer] for layer in self.layers],
            "model": {"top": self._listed(self.model)},
            **lenses,
        }

    def _plain(self, scores: Scores) -> dict[str, Any]:
        return {"top": self._listed(scores), "rank": scores.ranks[..., 0].tolist()}

    def _listed(self, scores: Scores) -> Any:
        def nested(ids: Any, logits: Any, shares: Any) -> Any:
            if ids and isinstance(ids[0], list):
                return [nested(*parts) for parts in zip(ids, logits, shares, strict=True)]
            return [[i, self.pieces[i], logit, share] for i, logit, share in zip(ids, logits, shares, strict=True)]

        return nested(scores.tokens.tolist(), scores.logits.tolist(), scores.probabilities.tolist())

    def _scores(self, lens: str) -> Scores:
        found = getattr(self, lens) if lens in ("jacobian", "logit", "model") else None
        if found is None:
            there = [name for name in ("jacobian", "logit", "model") if getattr(self, name) is not None]
            raise ValueError(f"lens is {lens!r}; this readout has {', '.join(map(repr, there))}")
        return found

    def _row(self, layer: Any) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer!r} isn't in this readout, which has {list(self.layers)}")
        return self.layers.index(layer)

    def _column(self, position: int) -> int:
        if -len(self.positions) <= position < 0:
            return len(self.positions) + position
        if position not in self.positions:
            raise ValueError(f"position {position} isn't in this readout, which has {list(self.positions)}")
        return self.positions.index(position)

    def __repr__(self) -> str:
        shown = range(max(0, len(self.positions) - _SHOWN), len(self.positions))
        scores = self.jacobian or self.logit
        heads = ["layer", *(self._head(column) for column in shown)]
        rows = []
        for row, layer in enumerate(self.layers):
            rows.append([str(layer), *(self._cell(scores, (row, column)) for column in shown)])
        rows.append(["model", *(self._cell(self.model, (column,)) for column in shown)])
        widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [heads, *rows]]
        return "\n".join([self._title(len(shown)), *("  ".join(line).rstrip() for line in padded), *self._notes()])

    def _title(self, shown: int) -> str:
        kind = "Jacobian lens" if self.jacobian is not None else "logit lens"
        part = "" if shown == len(self.positions) else f", of which the last {shown} are shown"
        where = f"{len(self.layers)} layers and {len(self.positions)} tokens"
        return f"Readout of the {kind}: the likeliest token at {where}{part}"

    def _notes(self) -> list[str]:
        notes = []
        if any(self.skipped):
            notes.append("* below skip_first: the lens wasn't fitted at such tokens")
        if self.stripped:
            notes.append("spaces at the end of the text were taken away")
        return notes

    def _head(self, column: int) -> str:
        return f"{self.tokens[column]!r}{'*' if self.skipped[column] else ''}"

    def _cell(self, scores: Scores | None, place: tuple[int, ...]) -> str:
        return "" if scores is None else repr(self.pieces[int(scores.tokens[(*place, 0)])])

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{escape(self._head(column))}</th>" for column in range(len(self.positions)))
        body = []
        for row, layer in enumerate(self.layers):
            cells = "".join(self._html_cell((row, column)) for column in range(len(self.positions)))
            body.append(f"<tr><th>{escape(str(layer))}</th>{cells}</tr>")
        own = "".join(f"<td>{escape(self._cell(self.model, (column,)))}</td>" for column in range(len(self.positions)))
        body.append(f"<tr><th>model</th>{own}</tr>")
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        title = escape(self._title(len(self.positions)))
        return f"<table><caption>{title}</caption><tr><th>layer</th>{heads}</tr>{''.join(body)}</table>{notes}"

    def _html_cell(self, place: tuple[int, int]) -> str:
        """A cell: shaded by probability, with the whole list and the rank of the model's own choice on hovering."""
        scores = self.jacobian or self.logit
        assert scores is not None
        pairs = zip(scores.tokens[place].tolist(), scores.probabilities[place].tolist(), strict=True)
        listed = ", ".join(f"{self.pieces[token]!r} {share:.3f}" for token, share in pairs)
        hint = f"{listed}; the model's own choice has rank {int(scores.ranks[place][0])}"
        share = float(scores.probabilities[place][0])
        style = f"background:rgba(70,130,180,{0.7 * share:.2f})"
        return f'<td style="{style}" title="{escape(hint, quote=True)}">{escape(self._cell(scores, place))}</td>'


def readout(lens: Lens, text: Any, layers: Any, positions: Any, k: int, kind: str) -> Readout:
    """Read a text: :meth:`scalpel.JacobianLens.readout`."""
    if kind not in _KINDS:
        raise ValueError(f"lens is {kind!r}; allowed: {', '.join(map(repr, _KINDS))}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; it counts tokens, and is at least 1")
    chosen = chosen_layers(lens, layers, end=True)
    model = lens.attached
    values = model.values(model.text(text), chosen)
    check_width(lens, values.states)
    columns = _columns(values, positions)
    own = _own(model, values, columns, k)
    ids, first = _at(values.ids, columns), own.tokens[:, :1]
    found: dict[str, list[Scores]] = {"jacobian": [], "logit": []}
    for layer in chosen:
        h = values.states[layer][columns]
        for name, rows in _rows(lens, layer, h, kind):
            found[name].append(score(model.head, rows, ids, k, first))
    count = len(chosen), len(columns)
    scores = {name: Scores.joined(parts).shaped(*count) if parts else None for name, parts in found.items()}
    everything = [own.tokens, *(each.tokens for each in scores.values() if each is not None)]
    kept = sorted({token for part in everything for token in part.unique().tolist()})
    text_ids = values.text.ids
    return Readout(
        tuple(chosen),
        tuple(columns),
        tuple(str(column) if text_ids is None else model.piece(text_ids[column]) for column in columns),
        min(k, own.tokens.shape[1]),
        scores["jacobian"],
        scores["logit"],
        own,
        tuple(column < lens.about.get("skip_first", SKIPPED) for column in columns),
        values.text.stripped,
        {layer: lens.error.get(layer, 0.0) for layer in chosen},
        {token: model.piece(token) for token in kept},
    )


def ranks(lens: Lens, text: Any, tokens: Sequence[Any], layers: Any, positions: Any, kind: str) -> Tensor:
    """Find the ranks of some tokens: :meth:`scalpel.JacobianLens.ranks`."""
    if kind not in _KINDS[1:]:
        raise ValueError(f"lens is {kind!r}; allowed: {', '.join(map(repr, _KINDS[1:]))}")
    model, chosen = lens.attached, chosen_layers(lens, layers, end=True)
    listed = [tokens] if isinstance(tokens, int | str | np.integer) else list(tokens)
    wanted = torch.tensor([model.token(token) for token in listed], dtype=torch.int64, device="cpu")
    if (wanted < 0).any():
        raise ValueError(f"tokens holds {int(wanted.min())}; ids are 0 or more")
    values = model.values(model.text(text), chosen, last=False)
    check_width(lens, values.states)
    columns = _columns(values, positions)
    watch, ids = wanted.expand(len(columns), -1), _at(values.ids, columns)
    found = []
    for layer in chosen:
        ((_, rows),) = _rows(lens, layer, values.states[layer][columns], kind)
        found.append(score(model.head, rows, ids, 0, watch).ranks)
    return torch.stack(found)


def transported(matrix: Tensor | None, h: Tensor) -> Tensor:
    """Carry rows (rows, width) to the target: J h, in float32, or in float64 for a model of that dtype."""
    h = h if h.dtype == torch.float64 else h.float()
    return h if matrix is None else h @ matrix.to(h.device, h.dtype).T


def _rows(lens: Lens, layer: Any, h: Tensor, kind: str) -> list[tuple[str, Tensor]]:
    """What the head reads of one layer, for each lens that is wanted."""
    wanted = ["jacobian", "logit"] if kind == "both" else [kind]
    with torch.no_grad():
        return [(name, transported(matrix_of(lens, layer) if name == "jacobian" else None, h)) for name in wanted]


def _own(model: AttachedModel, values: Values, columns: list[int], k: int) -> Scores:
    """What the model itself says at some tokens."""
    if values.last is None:
        assert values.logits is not None
        return of_logits(values.logits[columns].float(), k)
    return score(model.head, values.last[columns], _at(values.ids, columns), k)


def _columns(values: Values, positions: Any) -> list[int]:
    chosen = select(positions, len(values), "readout")
    return list(range(len(values))) if chosen is None else list(chosen)


def _at(ids: Tensor | None, columns: list[int]) -> Tensor | None:
    return None if ids is None else ids[columns]
