"""How far a tangent may be followed before the mask of a TopK or a ReLU flips.

A Jacobian holds the masks of its primal fixed. Along a tangent the input of every mask moves as x + s·t, t being its
own tangent; where that first gives another mask is a root per row, and the radius is the least of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..hooks.masks import watch_masks
from ..hooks.positions import Selected, add_at
from ..hooks.running import ALONE, eager
from ..hooks.wiring import hook_of_mask, tokens_read
from ..topk import topk_mask
from .ends import End
from .errors import explained
from .passes import CircuitPass, Pass, kept
from .rows.decoder_pass import DecoderPass

_INSIDE, _BEYOND = 0.99, 1.01  # of the radius: where the model is run again
_SMOOTH = (  # activations of transformers with no mask in them
    "gelu",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "linear",
    "mish",
    "quick_gelu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)


@dataclass(frozen=True, eq=False)
class ValidityRadius:
    """How far one may go along each of T tangents before a mask flips.

    The model between the masks is not linear, so the true step may be shorter (``verified`` is False) or longer
    (``flips`` is False) than the radius. Where both are True, a mask flips between 0.99 and 1.01 of it. That none flips
    on the way is known at 0.99 of the radius alone, and not at each shorter step. In float32 a radius may be so small
    that the values move by no more than their rounding; it means nothing then: take the model in float64 there.

    Attributes:
        radius: (T,), float64 on the CPU, in units of the tangent: the step s·V[t] at which the first mask flips, to
            first order. It is inf where none ever does. It is 0 where the last entry that a TopK keeps is tied with
            one that it drops and the tangent breaks the tie, as happens at the zeros of sparse weights, and where the
            input of a ReLU is 0 and moves.
        first: The mask that flips there, by the name that ``watch_masks`` gives it; None where the radius is inf.
        verified: (T,) bool: whether the model, run again at 0.99 of the radius, has the same masks. For a radius of
            inf it is run at a step as long as the source value, or of length 1 where that is zero. Where the radius is
            0 there is nothing to verify. A decoder with a smooth activation has no mask, so it is True and nothing is
            run.
        flips: (T,) bool: whether a mask is another one when the model is run again at 1.01 of the radius. False for a
            radius of 0 or inf, which have no such step.
    """

    radius: Tensor
    first: list[str | None]
    verified: Tensor
    flips: Tensor


def validity_radius(source: End, target: End, derived: str | None, V: Tensor) -> ValidityRadius:
    """The work of :meth:`Jacobian.validity_radius`, which has checked that V is (T, *source_shape).

    ``derived``: "transpose" or "composition" where the operator was made from another one.
    """
    run, count = _pass_of(source, derived), V.shape[0]
    if not bool(V.isfinite().all()):
        raise ValueError(f"V holds {int((~V.isfinite()).sum())} values that are not finite: no step along them is")
    if not isinstance(run, CircuitPass):
        return ValidityRadius(
            torch.full((count,), math.inf, dtype=torch.float64, device="cpu"),
            [None] * count,
            torch.ones(count, dtype=torch.bool, device="cpu"),
            torch.zeros(count, dtype=torch.bool, device="cpu"),
        )
    run.check_unchanged()
    radius: list[float] = []
    first: list[str | None] = []
    verified: list[bool] = []
    flips: list[bool] = []
    with torch.inference_mode(False), torch.no_grad(), explained(run):
        masks = _Masks(run, source.positions, target.positions)
        for tangent in kept(V):
            reach, name = masks.first_flip(tangent)
            radius.append(reach)
            first.append(name)
            inside = _INSIDE * reach
            if math.isinf(reach):
                inside = _length(source.value) / _length(tangent)
            verified.append(masks.same(inside * tangent))
            flips.append(0 < reach < math.inf and not masks.same(_BEYOND * reach * tangent))
    return ValidityRadius(
        torch.tensor(radius, dtype=torch.float64, device="cpu"),
        first,
        torch.tensor(verified, dtype=torch.bool, device="cpu"),
        torch.tensor(flips, dtype=torch.bool, device="cpu"),
    )


def _length(value: Tensor) -> float:
    """The Euclidean norm, or 1 for zero."""
    return float(value.double().norm()) or 1.0


def _pass_of(source: End, derived: str | None) -> Pass:
    """The pass whose masks count; an error where they are not known."""
    if derived is not None:
        instead = {
            "transpose": "its tangents are cotangents of the model, which move no value; take J itself",
            "composition": "it belongs to more than one pass; take one scalpel.jacobian from the first source to the "
            "last target, or each factor's own with the tangents that reach it",
        }[derived]
        raise ValueError(f"the validity radius of a {derived} is not defined: {instead}")
    run = source.run
    if isinstance(run, CircuitPass):
        return run
    kind = type(run.model).__name__
    if not isinstance(run, DecoderPass):
        raise NotImplementedError(
            f"the masks of {kind} cannot be seen between module paths: validity_radius takes the Jacobian of a "
            "CircuitGPT, or of a transformers model between hooks that scalpel.jacobian has rules for"
        )
    activation = run.decoder.config.activation
    if activation not in _SMOOTH:
        raise NotImplementedError(
            f"{kind} has the activation {activation!r}, whose masks are not watched: validity_radius takes a "
            f"CircuitGPT, or a transformers model with one of {', '.join(_SMOOTH)}"
        )
    return run


class _Masks:
    """The masks that the target of a pass reads, at the primal and at steps away from it."""

    def __init__(self, run: CircuitPass, source: Selected, target: Selected) -> None:
        self.run = run
        self.source = source
        reads = run.allowed if run.allowed.dim() == 2 else run.allowed[:, 0]
        self.read = tokens_read(run.hooks, run.target, target, reads)
        self.at_primal: list[Tensor] = []
        self._watch(lambda _, x, k: self.at_primal.append(_mask(x, k)), None)

    def first_flip(self, tangent: Tensor) -> tuple[float, str | None]:
        """The least s > 0, to first order, where a mask on x + s·tangent flips, and which; inf and None if none."""
        least, first = math.inf, None

        def watch(name: str, x: Tensor, k: int | None) -> None:
            nonlocal least, first
            dual = forward_ad.unpack_dual(x)
            if dual.tangent is None:  # before the source, or beside it
                return
            at, along = dual.primal, dual.tangent
            if not bool(along.isfinite().all() & at.isfinite().all()):
                raise ValueError(f"the values at {name!r}, or their tangents, are not all finite: no step is known")
            flip = relu_flip(at, along, least) if k is None else topk_flip(at, along, k, least)
            if flip < least:
                least, first = flip, name

        with ALONE, forward_ad.dual_level():
            self._watch(watch, forward_ad.make_dual(torch.zeros_like(tangent), tangent))
        return least, first

    def same(self, step: Tensor) -> bool:
        """Whether the model with ``step`` added to its source has the masks of the primal."""
        masks = iter(self.at_primal)
        same = True

        def watch(_: str, x: Tensor, k: int | None) -> None:
            nonlocal same
            before = next(masks)
            same = same and torch.equal(_mask(x, k), before)

        self._watch(watch, step)
        return same

    def _watch(self, watch: Callable[[str, Tensor, int | None], None], step: Tensor | None) -> None:
        """One pass, with ``watch`` given the rows (tokens, width) that the target reads of every mask's input."""

        def rows(name: str, x: Tensor, k: int | None) -> None:
            read = self.read.get(hook_of_mask(name, self.run.hooks))
            if read is not None and (k is None or 0 < k < x.shape[-1]):
                watch(name, x[read.expand(x.shape[:-1])], k)

        with watch_masks(rows), eager():  # a compiled graph shows no mask
            self.run.run(lambda value: value if step is None else add_at(value, step, self.source))


def _mask(x: Tensor, k: int | None) -> Tensor:
    return x > 0 if k is None else topk_mask(x, k)


def relu_flip(x: Tensor, t: Tensor, before: float) -> float:
    """The least s > 0 where some entry of x + s·t is on the other side of 0, or ``before`` where that is less."""
    crosses = torch.where(x > 0, t < 0, t > 0)
    if not bool(crosses.any()):
        return before
    return min(before, float((x[crosses].double().abs() / t[crosses].double().abs()).min()))


def topk_flip(x: Tensor, t: Tensor, k: int, before: float) -> float:
    """Find the least s > 0 where some row of |x + s·t| has another top k, or ``before`` where that is less.

    x and t are (rows, width), and 0 < k < width.

    A row flips where the largest entry that is not kept, a convex function of s, passes the smallest that is kept,
    |x_i| + s·sign(x_i)·t_i, a concave one up to a zero of it: no entry is below zero, so a kept one that reaches it
    has been passed. Their difference is convex and at most 0 at s = 0. Newton's steps from the right, each to the
    root of a line under it, come down to its last root and never jump past it; it has finitely many pieces. All rows
    share one s, and a row that does not flip before it is done with.

    A kept value that goes through zero among others that are and stay zero is kept on either side: no flip. Where
    those only pass through zero at that very step (twins of it that do the same), the step is taken for a flip.
    """
    kept = topk_mask(x, k)
    moving = (t != 0).any(-1) & (~kept & ((x != 0) | (t != 0))).any(-1)
    x, t, kept = x[moving].double(), t[moving].double(), kept[moving]
    size = x.abs()
    slope = torch.where(x == 0, t.abs(), x.sign() * t)  # of |x + s·t| just after s = 0
    s = before
    while len(x):
        far = math.isinf(s)
        moved = t if far else x + s * t  # at infinity the slopes alone count
        low = slope if far else size + s * slope
        j = moved.abs().masked_fill(kept, -1.0).argmax(-1, keepdim=True)
        i = low.masked_fill(~kept, math.inf).argmin(-1, keepdim=True)
        sign = torch.where(moved.gather(-1, j) < 0, -1.0, 1.0)
        rise = sign * t.gather(-1, j) - slope.gather(-1, i)
        passed = (moved.gather(-1, j).abs() > low.gather(-1, i)) & (rise > 0)
        root = torch.where(passed, (size.gather(-1, i) - sign * x.gather(-1, j)) / rise, math.inf)
        least = float(root.min())
        if not least < s:
            break
        s = least
        alive = passed[:, 0]
        x, t, kept, size, slope = x[alive], t[alive], kept[alive], size[alive], slope[alive]
    return s
