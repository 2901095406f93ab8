"""How far a tangent may be followed before the mask of a TopK or a ReLU flips.

A Jacobian holds the masks of its primal fixed. Along a tangent, the input x of every mask moves as x + s·t, where t is
the tangent of x. The step s at which a row of x first gets another mask is the root of an equation, and the radius is
the smallest root over all rows and masks.
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

_INSIDE, _BEYOND = 0.99, 1.01  # fractions of the radius at which the model is run again
_SMOOTH = (  # names of transformers' activations that have no mask
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
    """How far one can go along each of T tangents before a mask flips.

    The model is not linear between the masks, so the true step may be shorter (``verified`` is False) or longer
    (``flips`` is False) than the radius. Where both are True, the masks change between 0.99 and 1.01 of the radius.
    They are compared at 0.99 of the radius only, and not at every shorter step. In float32 a radius may be so small
    that the values move by no more than their rounding, and then it is meaningless: use the model in float64 there.

    Attributes:
        radius: (T,), float64 on the CPU, in units of the tangent: the step s·V[t] at which the first mask flips, to
            first order. It is inf where no mask ever flips. It is 0 where the last entry that a TopK keeps is tied with
            one that it drops and the tangent breaks the tie, as happens at the zeros of sparse weights, and where the
            input of a ReLU is 0 and moves.
        first: The name of the mask that flips there, as ``watch_masks`` gives it; None where the radius is inf.
        verified: (T,) bool: whether the model, run again at 0.99 of the radius, has the same masks. For a radius of
            inf it is run at a step as long as the source value, or of length 1 where that is zero. Where the radius is
            0 there is nothing to verify. A decoder with a smooth activation has no mask, so this is True without
            another run.
        flips: (T,) bool: whether a mask differs when the model is run again at 1.01 of the radius. False for a radius
            of 0 or inf, for which there is no such step.
    """

    radius: Tensor
    first: list[str | None]
    verified: Tensor
    flips: Tensor


def validity_radius(source: End, target: End, derived: str | None, V: Tensor) -> ValidityRadius:
    """Compute :meth:`Jacobian.validity_radius`; the caller has checked that V is (T, *source_shape).

    ``derived`` is "transpose" or "composition" where the operator was made from another one, else None.
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
            step, name = masks.first_flip(tangent)
            radius.append(step)
            first.append(name)
            inside = _INSIDE * step
            if math.isinf(step):
                inside = _length(source.value) / _length(tangent)
            verified.append(masks.same(inside * tangent))
            flips.append(0 < step < math.inf and not masks.same(_BEYOND * step * tangent))
    return ValidityRadius(
        torch.tensor(radius, dtype=torch.float64, device="cpu"),
        first,
        torch.tensor(verified, dtype=torch.bool, device="cpu"),
        torch.tensor(flips, dtype=torch.bool, device="cpu"),
    )


def _length(value: Tensor) -> float:
    """The Euclidean norm of ``value``, or 1 where it is zero."""
    return float(value.double().norm()) or 1.0


def _pass_of(source: End, derived: str | None) -> Pass:
    """Return the pass whose masks are watched, or raise an error where its masks are not known."""
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
    """The masks that affect the target of a pass, at the primal and at steps away from it."""

    def __init__(self, run: CircuitPass, source: Selected, target: Selected) -> None:
        self.run = run
        self.source = source
        reads = run.allowed if run.allowed.dim() == 2 else run.allowed[:, 0]
        self.read = tokens_read(run.hooks, run.target, target, reads)
        self.at_primal: list[Tensor] = []
        self._watch(lambda _, x, k: self.at_primal.append(_mask(x, k)), None)

    def first_flip(self, tangent: Tensor) -> tuple[float, str | None]:
        """Return the smallest step s > 0 along ``tangent`` at which a mask flips, to first order, and its name.

        They are inf and None where no mask flips.
        """
        least, first = math.inf, None

        def watch(name: str, x: Tensor, k: int | None) -> None:
            nonlocal least, first
            dual = forward_ad.unpack_dual(x)
            if dual.tangent is None:  # the mask doesn't depend on the source
                return
            x_primal, x_tangent = dual.primal, dual.tangent
            if not bool(x_tangent.isfinite().all() & x_primal.isfinite().all()):
                raise ValueError(f"the values at {name!r}, or their tangents, are not all finite: no step is known")
            flip = relu_flip(x_primal, x_tangent, least) if k is None else topk_flip(x_primal, x_tangent, k, least)
            if flip < least:
                least, first = flip, name

        with ALONE, forward_ad.dual_level():
            self._watch(watch, forward_ad.make_dual(torch.zeros_like(tangent), tangent))
        return least, first

    def same(self, step: Tensor) -> bool:
        """Whether the model has the masks of the primal when ``step`` is added to its source."""
        masks = iter(self.at_primal)
        same = True

        def watch(_: str, x: Tensor, k: int | None) -> None:
            nonlocal same
            before = next(masks)
            same = same and torch.equal(_mask(x, k), before)

        self._watch(watch, step)
        return same

    def _watch(self, watch: Callable[[str, Tensor, int | None], None], step: Tensor | None) -> None:
        """Run the pass with ``step`` added at the source, and call ``watch`` for every mask that the target reads.

        It gets the mask's name, the rows (tokens, width) of its input that the target reads, and k, which is None for a
        ReLU.
        """

        def watch_rows(name: str, x: Tensor, k: int | None) -> None:
            tokens = self.read.get(hook_of_mask(name, self.run.hooks))
            if tokens is not None and (k is None or 0 < k < x.shape[-1]):
                watch(name, x[tokens.expand(x.shape[:-1])], k)

        with watch_masks(watch_rows), eager():  # a compiled graph shows no mask
            self.run.run(lambda value: value if step is None else add_at(value, step, self.source))


def _mask(x: Tensor, k: int | None) -> Tensor:
    """Which entries of ``x`` the top k keeps, or ReLU where k is None."""
    return x > 0 if k is None else topk_mask(x, k)


def relu_flip(x: Tensor, t: Tensor, before: float) -> float:
    """Find the smallest s > 0 at which an entry of x + s·t crosses 0, or ``before`` where that is smaller."""
    crosses = torch.where(x > 0, t < 0, t > 0)
    if not bool(crosses.any()):
        return before
    return min(before, float((x[crosses].double().abs() / t[crosses].double().abs()).min()))


def topk_flip(x: Tensor, t: Tensor, k: int, before: float) -> float:
    """Find the smallest s > 0 at which a row of |x + s·t| has another top k, or ``before`` where that is smaller.

    x and t are (rows, width), and 0 < k < width.

    A row flips where its largest entry that is not kept passes its smallest entry that is kept. The largest entry that
    is not kept is a convex function of s. The smallest kept one is the least of |x_i| + s·sign(x_i)·t_i, which is
    concave up to its first zero; no entry is below zero, so a kept entry that reaches zero has been passed. The
    difference of the two is therefore convex, piecewise linear, and at most 0 at s = 0. Newton's method starts on the
    right. Each step goes to the root of a line that lies below the difference, so it moves down to the last root, never
    jumps past it, and ends after finitely many steps. All rows share one s, and a row that does not flip before s is
    dropped.

    A kept value that goes through zero is kept on both sides where all entries that are not kept are zero and stay
    zero: this is no flip. Where those others pass through zero at that very step too (as equal entries do), the step
    counts as a flip.
    """
    kept = topk_mask(x, k)
    moving = (t != 0).any(-1) & (~kept & ((x != 0) | (t != 0))).any(-1)
    x, t, kept = x[moving].double(), t[moving].double(), kept[moving]
    size = x.abs()
    slope = torch.where(x == 0, t.abs(), x.sign() * t)  # the slope of |x + s·t| just after s = 0
    s = before
    while len(x):
        at_infinity = math.isinf(s)
        moved = t if at_infinity else x + s * t  # at infinity only the slopes matter
        kept_sizes = slope if at_infinity else size + s * slope
        # the largest entry of each row that is not kept, and the smallest that is
        highest = moved.abs().masked_fill(kept, -1.0).argmax(-1, keepdim=True)
        lowest = kept_sizes.masked_fill(~kept, math.inf).argmin(-1, keepdim=True)
        sign = torch.where(moved.gather(-1, highest) < 0, -1.0, 1.0)
        rise = sign * t.gather(-1, highest) - slope.gather(-1, lowest)
        passed = (moved.gather(-1, highest).abs() > kept_sizes.gather(-1, lowest)) & (rise > 0)
        root = torch.where(passed, (size.gather(-1, lowest) - sign * x.gather(-1, highest)) / rise, math.inf)
        least = float(root.min())
        if not least < s:
            break
        s = least
        flipping = passed[:, 0]
        x, t, kept, size, slope = x[flipping], t[flipping], kept[flipping], size[flipping], slope[flipping]
    return s
