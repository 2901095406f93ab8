"""Changing what a model has at some layers, in the directions of tokens: steer, ablate and swap.

Each is a context in which the attached model computes with changed values, whoever runs it. A change is made at a
layer's output, at all tokens or at those that ``positions`` names, in float32 (float64 in a model of that dtype), and
rounded to the model's dtype. Contexts nest: an inner one sees what the outer ones have changed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator, ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..hooks.modules import first_tensor, with_first_tensor
from ..hooks.running import eager
from ..models.circuitgpt.model import CircuitGPT
from .attached.model import AttachedModel
from .matrices import Lens, chosen_layers
from .reading.vectors import directions

__all__ = ["Intervention", "ablate", "steer", "swap"]

_ALIKE, _SAME = 0.99, 0.999  # |cosine| of two directions from which a swap warns, and from which it is refused
_NOTHING = 1e-6  # singular values below this share of the largest add no direction

Change = Callable[[Tensor, "_Pass"], Tensor]  # (values (B, L, width), the pass) → the new ones

_quiet = threading.local()


class _Pass(threading.local):
    """What is known of the forward pass that is under way in a thread.

    Attributes:
        before: How many tokens of the text are in a cache, and not in this pass.
        real: (B, before + L) bool, where a token is no padding; None where the pass has no such mask.
    """

    def __init__(self) -> None:
        self.before = 0
        self.real: Tensor | None = None

    def note(self, keywords: Mapping[str, Any]) -> None:
        """Read the arguments of the module that runs the layers."""
        self.before, self.real = 0, None
        for name in ("past_key_values", "cache"):
            cache = keywords.get(name)
            if cache is not None and callable(getattr(cache, "get_seq_length", None)):
                self.before = int(cache.get_seq_length())
        mask = keywords.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.real = mask.bool()


class Intervention(ContextDecorator):
    """A context inside which the model that a lens is attached to computes with changed values.

    It can be entered any number of times, one inside the other too, and gives the model. The model is as before once it
    is left. It acts in every thread.

    Args:
        model: The model.
        changes: {layer: what is done to its output}.
        prepare: Called when the context is entered.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
        >>> with lens.steer("]", 2.0, layers=0), lens.ablate(",", layers=0) as steered:
        ...     steered is model
        True
    """

    def __init__(
        self, model: AttachedModel, changes: Mapping[Any, Change], prepare: Callable[[], None] | None = None
    ) -> None:
        self._model, self._changes, self._prepare = model, dict(changes), prepare
        self._entered: list[ExitStack] = []
        self._places = {model.place(layer): change for layer, change in self._changes.items()}

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an intervention can't be copied or pickled, because it holds only in this process: make it where it is "
            "entered"
        )

    def __enter__(self) -> Any:
        if self._prepare is not None and not self._entered:
            self._prepare()
        with ExitStack() as stack:
            _install(self._model, self._places, stack)
            self._entered.append(stack.pop_all())
        return self._model.model

    def __exit__(self, *raised: object) -> None:
        if not self._entered:
            raise RuntimeError("this intervention wasn't entered, so it can't be left: use it in a with statement")
        self._entered.pop().close()


def _install(model: AttachedModel, places: Mapping[str, Change], stack: ExitStack) -> None:
    """Put the changes into the model until ``stack`` is closed."""
    known = _Pass()
    inside = model.inside
    if isinstance(inside, CircuitGPT):

        def tap(name: str, value: Tensor) -> Tensor:
            return _changed(places[name], value, known) if name in places else value

        def note(_: nn.Module, arguments: Any, keywords: Any) -> None:
            mask = keywords.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
            known.note({"attention_mask": mask})

        inside._interventions.append(tap)
        stack.callback(_remove, inside, tap)
        stack.callback(inside.register_forward_pre_hook(note, with_kwargs=True).remove)
        return
    around = inside if model.blocks is None else inside.get_submodule(model.blocks.around)
    stack.enter_context(eager())
    handle = around.register_forward_pre_hook(lambda _, __, keywords: known.note(keywords), with_kwargs=True)
    stack.callback(handle.remove)
    for place, change in places.items():
        stack.callback(_hook(inside, place, change, known).remove)


def _hook(model: nn.Module, place: str, change: Change, known: _Pass) -> Any:
    """Put one change at a module path. It is an ordinary hook, so that other analyses see that it is there."""

    def changed(value: Any) -> Any:
        before = first_tensor(value, place)
        after = _changed(change, before, known)
        return value if after is before else with_first_tensor(value, after)

    module = model.get_submodule(place.removesuffix(":in"))
    if not place.endswith(":in"):
        return module.register_forward_hook(lambda _, __, output: changed(output))

    def before(_: nn.Module, arguments: Any, keywords: Any) -> Any:
        return (changed(arguments), keywords) if arguments else (arguments, changed(keywords))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _changed(change: Change, value: Tensor, known: _Pass) -> Tensor:
    if getattr(_quiet, "now", False):
        return value
    if value.dim() != 3:
        raise ValueError(f"a layer left a value of shape {tuple(value.shape)}; expected (batch, tokens, width)")
    return change(value, known)


def _remove(model: CircuitGPT, tap: Any) -> None:
    model._interventions[:] = [each for each in model._interventions if each is not tap]


@contextmanager
def _unmodified() -> Any:
    """Without any intervention of a lens, in this thread."""
    before, _quiet.now = getattr(_quiet, "now", False), True
    try:
        yield
    finally:
        _quiet.now = before


# ---- where ---------------------------------------------------------------------------------------


def _at(positions: Any, total: int, before: int) -> list[int] | None:
    """The columns of a pass that ``positions`` names, for a text of ``total`` tokens of which it runs the last ones.

    None means all columns. Tokens that are in the cache were changed when they were run.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        chosen = list(range(total))[positions]
    else:
        chosen = [positions] if isinstance(positions, int) else [int(position) for position in positions]
        outside = next((position for position in chosen if not -total <= position < total), None)
        if outside is not None:
            raise ValueError(
                f"position {outside} is outside the text of {total} tokens; allowed: {-total} to {total - 1}"
            )
        chosen = [position % total for position in chosen]
    return sorted({position - before for position in chosen if position >= before})


def _where(change: Callable[[Tensor, _Pass, list[int]], Tensor], positions: Any) -> Change:
    """Make a change of rows (B, columns, width) in the dtype it computes in into one of whole values."""

    def of_values(value: Tensor, known: _Pass) -> Tensor:
        length = value.shape[1]
        columns = _at(positions, known.before + length, known.before)
        chosen = list(range(length)) if columns is None else columns
        if not chosen:
            return value
        wide = value if value.dtype == torch.float64 else value.float()
        rows = change(wide, known, chosen)
        if columns is None:
            return rows.to(value.dtype)
        index = torch.tensor(columns, dtype=torch.int64, device=value.device)
        return value.index_copy(1, index, rows.to(value.dtype))

    return of_values


def _on(value: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(value.device, value.dtype) for tensor in tensors]


# ---- the three -----------------------------------------------------------------------------------


def steer(lens: Lens, given: Any, strength: float, layers: Any, positions: Any, norm: Any) -> Intervention:
    """Push in a direction: :meth:`scalpel.JacobianLens.steer`."""
    chosen = chosen_layers(lens, layers, end=True)
    found = directions(lens, given, chosen)
    changes: dict[Any, Change] = {}
    for layer, vectors in found.items():
        if len(vectors) != 1:
            raise ValueError(f"{len(vectors)} vectors were given for layer {layer!r}; steer takes one")
        size = float(vectors[0].double().norm())
        if not size:
            raise ValueError(f"the vector at layer {layer!r} is zero, and has no direction")
        fixed = norm.get(layer) if isinstance(norm, Mapping) else norm
        if isinstance(norm, Mapping) and fixed is None:
            raise ValueError(f"norm has no entry for layer {layer!r}; it has {list(norm)}")
        if strength:
            changes[layer] = _where(_pushed(vectors[0] / size, float(strength), fixed), positions)
    return Intervention(lens.attached, changes)


def _pushed(unit: Tensor, strength: float, fixed: float | None) -> Callable[[Tensor, _Pass, list[int]], Tensor]:
    def change(value: Tensor, known: _Pass, columns: list[int]) -> Tensor:
        (direction,) = _on(value, unit)
        if fixed is not None:
            return value[:, columns] + strength * fixed * direction
        norms = value.detach().norm(dim=-1)
        if known.real is not None and known.real.shape == (len(value), known.before + value.shape[1]):
            norms = norms.masked_fill(~known.real[:, known.before :].to(norms.device), torch.nan)
        median = norms.nanmedian(dim=1).values.nan_to_num(0.0)  # a row of padding alone isn't moved
        return value[:, columns] + strength * median[:, None, None] * direction

    return change


def ablate(lens: Lens, given: Any, layers: Any, positions: Any) -> Intervention:
    """Project directions out: :meth:`scalpel.JacobianLens.ablate`."""
    chosen = chosen_layers(lens, layers, end=True)
    changes: dict[Any, Change] = {}
    for layer, vectors in directions(lens, given, chosen).items():
        basis = _basis(vectors)
        if not len(basis):
            raise ValueError(f"the vectors at layer {layer!r} are zero, and span nothing")
        changes[layer] = _where(_projected(basis), positions)
    return Intervention(lens.attached, changes)


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal rows that span the same as ``vectors``, float64; what several of them share counts once."""
    units = vectors.double()
    sizes = units.norm(dim=1, keepdim=True)
    units = units[sizes[:, 0] > 0] / sizes[sizes[:, 0] > 0]
    if not len(units):
        return units
    _, values, right = torch.linalg.svd(units, full_matrices=False)
    return right[values > _NOTHING * values[0]]


def _projected(basis: Tensor) -> Callable[[Tensor, _Pass, list[int]], Tensor]:
    def change(value: Tensor, known: _Pass, columns: list[int]) -> Tensor:
        (directions,) = _on(value, basis)
        rows = value[:, columns]
        return rows - rows @ directions.T @ directions

    return change


def swap(lens: Lens, one: Any, other: Any, layers: Any, alpha: float, positions: Any, clean: Any) -> Intervention:
    """Exchange two tokens: :meth:`scalpel.JacobianLens.swap`."""
    chosen = chosen_layers(lens, layers, end=True)
    first, second = directions(lens, one, chosen), directions(lens, other, chosen)
    pairs, alike = {}, {}
    for layer in chosen:
        if len(first[layer]) != 1 or len(second[layer]) != 1:
            raise ValueError("a swap exchanges two directions: give one token or vector for each")
        pair = torch.cat([first[layer], second[layer]]).double()
        sizes = pair.norm(dim=1, keepdim=True)
        if not sizes.all():
            raise ValueError(f"a vector at layer {layer!r} is zero, and has no direction")
        pairs[layer] = pair / sizes
        alike[layer] = abs(float(pairs[layer][0] @ pairs[layer][1]))
    worst = max(alike, key=lambda layer: alike[layer])
    if alike[worst] >= _SAME:
        raise ValueError(
            f"the two directions have |cosine| {alike[worst]:.4f} at layer {worst!r}, so that their coordinates can't "
            f"be told apart; below {_SAME} is allowed: choose other layers or other tokens"
        )
    if alike[worst] >= _ALIKE:
        warnings.warn(
            f"the two directions have |cosine| {alike[worst]:.4f} at layer {worst!r}: their coordinates are large and "
            "of opposite sign, and the swap mostly turns noise round",
            stacklevel=3,
        )
    held: dict[Any, Tensor] = {}
    changes = {
        layer: _where(_exchanged(pairs[layer], float(alpha), layer, None if clean is None else held), positions)
        for layer in (chosen if alpha else [])
    }
    if clean is None or not alpha:
        return Intervention(lens.attached, changes)

    def prepare() -> None:
        with _unmodified():
            held.update(lens.attached.states(clean, chosen))

    return Intervention(lens.attached, changes, prepare)


def _exchanged(
    pair: Tensor, alpha: float, layer: Any, held: Mapping[Any, Tensor] | None
) -> Callable[[Tensor, _Pass, list[int]], Tensor]:
    inverse = torch.linalg.pinv(pair.T)  # (2, width): c = V⁺ h

    def change(value: Tensor, known: _Pass, columns: list[int]) -> Tensor:
        V, plus = _on(value, pair, inverse)
        rows = value[:, columns]
        coordinates = rows @ plus.T
        wanted = coordinates
        if held is not None:
            clean = held[layer].to(value.device, value.dtype)
            places = [known.before + column for column in columns]
            if len(clean) not in (1, len(value)) or max(places) >= clean.shape[1]:
                raise ValueError(
                    f"the clean run has {len(clean)} texts of {clean.shape[1]} tokens, and this pass reaches token "
                    f"{max(places)} of {len(value)} texts: give positions=, or a clean run of the same texts"
                )
            wanted = clean[:, places] @ plus.T
        return rows + alpha * ((wanted.flip(-1) - coordinates) @ V)

    return change
