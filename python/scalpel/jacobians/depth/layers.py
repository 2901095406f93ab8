"""The layers of a model as operators: the hooks at their ends, and their restriction to chosen tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.positions import Selected, read_at, select
from ...hooks.standing import as_analysed
from ...models.decoders.families import hooks_of_model
from ..ends import End
from ..operator import Jacobian, Product

__all__ = ["chain_of", "check_count", "check_dtype", "check_square", "chosen_tokens", "layer_hooks", "restricted"]


def layer_hooks(model: nn.Module, hooks: Sequence[str] | None) -> list[str]:
    """Return the hooks at the ends of the layers: ``hooks``, or by default those of the residual stream.

    Only a model with hook names has such a default.
    """
    if hooks is not None:
        if isinstance(hooks, str) or not all(isinstance(name, str) for name in hooks):
            raise TypeError(f"hooks is {hooks!r}; it must be a list of hooks' names")
        if len(hooks) < 2 or len(set(hooks)) < len(hooks):
            raise ValueError(f"hooks is {list(hooks)!r}; it must name at least two hooks, each once")
        return list(hooks)
    model = as_analysed(model)
    known = getattr(model, "hook_names", None) or hooks_of_model(model)
    if not known:
        raise ValueError(
            f"the layers of {type(model).__name__} are not known: name the hooks between them, such as "
            "hooks=['model.layers.0:in', 'model.layers.1:in', ..., 'model.layers.7']"
        )
    layer_starts = [name for name in known if name.endswith(".resid_in")]
    if not layer_starts:
        raise ValueError("the model has no layer, so there is no product of layers")
    return [*layer_starts, "final_resid"]


def chosen_tokens(positions: Any, layers: list[Jacobian]) -> Selected:
    """Return the tokens that ``positions`` selects, the same at every hook; None for all of them."""
    if isinstance(positions, tuple):
        raise ValueError(
            "positions is a pair, and every layer needs the same tokens at both ends: give None, an int, a slice or a "
            "list of ints"
        )
    if positions is None:
        return None
    shapes = [layers[0].source_shape, *(J.target_shape for J in layers)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(
            f"positions need values (batch, tokens, width) of the same tokens at every hook; they have shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}: leave positions at None"
        )
    return select(positions, shapes[0][1], "chosen")


def check_dtype(layers: list[Jacobian]) -> None:
    """Raise TypeError for a dtype whose rounding hides most singular values."""
    for J in layers:
        if J.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the layers' values are {J.dtype}, whose rounding hides most of a layer's singular values: use "
                "float32 or float64, such as model.float()"
            )


def check_square(layers: list[Jacobian], names: list[str]) -> None:
    """Raise ValueError where a layer's ends have different shapes, so that J − I is not defined."""
    for J, source, target in zip(layers, names, names[1:], strict=False):
        if J.source_shape != J.target_shape:
            raise ValueError(
                f"without the identity a layer needs the same shape at both ends; {source!r} has "
                f"{tuple(J.source_shape)} and {target!r} {tuple(J.target_shape)}: leave identity at True"
            )


def check_count(T: int, own: list[Jacobian], names: list[str]) -> None:
    """Raise ValueError where one of the layers ``own``, between the chosen tokens, has fewer than T singular values."""
    sizes = [min(J.shape) for J in own]
    most = min(sizes)
    if most < T:
        smallest = sizes.index(most)
        raise ValueError(
            f"T is {T}; the layer from {names[smallest]!r} to {names[smallest + 1]!r} has {most} singular values "
            f"between the chosen positions: 1 <= T <= {most}"
        )


def restricted(J: Jacobian, source: Selected, target: Selected, identity: bool) -> Jacobian:
    """Restrict J, or J − I where ``identity`` is False, to chosen tokens of its source and of its target.

    Tangents are zero at the other tokens of the source.
    """
    if source is None and target is None and identity:
        return J

    def restricted_product(product: Product, enter: Selected, leave: Selected, shape: torch.Size) -> Product:
        def multiply(V: Tensor) -> Tensor:
            tangents = V
            if enter is not None:
                tangents = V.new_zeros(V.shape[0], *shape)
                tangents[:, :, list(enter)] = V
            products = product(tangents)
            if not identity:
                products = products - tangents
            return products if leave is None else products[:, :, list(leave)]

        return multiply

    def end(whole: End, at: Selected) -> End:
        return replace(whole, positions=at, value=read_at(whole.value, at))

    return Jacobian(
        restricted_product(J.jvp, source, target, J.source_shape),
        restricted_product(J.vjp, target, source, J.target_shape),
        end(J._source, source),
        end(J._target, target),
    )


def chain_of(layers: list[Jacobian], at: Selected, identity: bool) -> list[Jacobian]:
    """Return the factors J_1, …, J_l of a product, restricted to the tokens ``at`` at the ends of the product only."""
    last = len(layers) - 1
    return [restricted(J, at if i == 0 else None, at if i == last else None, identity) for i, J in enumerate(layers)]
