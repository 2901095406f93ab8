"""The semigroup of depth: what the product of a model's layers does to directions of the residual stream.

P = J_D … J_1, one Jacobian a layer, is never made: :mod:`.sweeps` goes through the layers and back, and
:mod:`.graded` multiplies the triangular factors so that singular values hundreds of orders of magnitude apart come out
each to a relative accuracy. What ends the sweeps is a bound, see ``Lyapunov.residual``, not a step that got small.
"""

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.modules import as_written
from ...hooks.positions import Selected, read_at, select
from ...models.decoders.families import hooks_of_model
from ..entry import jacobians_between
from ..operator import Jacobian, Product
from .spectra import Alignment, Spectra, measure_alignment, rank_bound
from .sweeps import ROUNDING, Found, Sweeps, frame_growth, tail_energy


@dataclass(frozen=True)
class Lyapunov:
    """The semigroup of depth at one input, as :func:`scalpel.lyapunov` gives it.

    D layers, T directions, natural logarithms. Every tensor is float64 on the CPU but ``right``. −inf stands for a
    singular value that is zero to rounding: at some layer, what it needs is at most 64 eps of what that layer does to
    the block's longest direction.

    ``hooks``: the D + 1 hooks between which the layers lie. ``identity``: "with_identity", layer l is J_l, the residual
    path included; "without_identity", it is J_l − I, which is what the blocks add where nothing masks the residual
    stream. ``positions``: the tokens at the ends of the product, None for all.

    ``exponents``: (T,), descending, nats per layer: (1/D) log σ_i(J_D … J_1). ``log_singular_values``: (T,), D times
    that.
    ``right``: (T, *source_shape), in the model's dtype and on its device: the right singular vectors, the directions at
    the first hook; 0 where the value is. Signs are the solver's.
    ``residual``: (T,), how far the i leading right singular vectors of the last sweep lay outside the block of the
    sweep before: the sine θ of the largest angle, or more. Were they exact, the log σ_i of that block would be at most
    −log cos θ ≈ θ²/2 too small. They are exact up to what further sweeps would turn them: where a sweep shrinks the
    residual only to a fraction ρ, about θ / (1 − ρ) in place of θ. ``sweeps``: forward-and-back passes used, of the
    whole product. ``converged``: whether every residual met ``tol``, those of ``cumulative`` included.

    ``frame_growth``: (D, T), log |R_ii| of the QR factorisation after each layer in one forward sweep from a random
    frame (Benettin et al. 1980). Their mean over the layers, ``mean_frame_growth`` (T,), tends to Lyapunov exponents as
    D grows without end; at a finite depth it is not the exponents, and needs not be near.

    ``layers``: :class:`Spectra` of each layer by itself, between the chosen positions. ``cumulative``: those of
    J_l … J_1 for l = 1 … D, restricted at both ends; None where not asked for. Both give effective and stable rank by
    depth as intervals. ``alignment``: :class:`Alignment` of successive layers, with its null; its layers are
    ``layers``.
    ``log_norms``: (D + 1,), log of the Frobenius norm of the residual stream at each hook over the chosen positions;
    ``log_norms_without_first``: without position 0, whose norm can hide all the others'; None where nothing else is
    chosen.
    ``rank_bounds``: for each layer of ``layers`` the most that its rank can be by the TopKs that the model applies,
    None where they set no bound; see :func:`scalpel.jacobians.depth.spectra.rank_bound`. ``lost``: n minus that, with n
    the dimensions at the layer's source: at least so many directions it sends to zero, for good, since no later layer
    can tell them apart. It counts dimensions, and not which. None where there is no bound, which does not say that
    nothing is lost: ``layers.zeros`` counts those seen.
    """

    hooks: tuple[str, ...]
    identity: str
    positions: tuple[int, ...] | None
    log_singular_values: Tensor
    right: Tensor
    residual: Tensor
    sweeps: int
    converged: bool
    frame_growth: Tensor
    layers: Spectra
    cumulative: Spectra | None
    alignment: Alignment
    log_norms: Tensor
    log_norms_without_first: Tensor | None
    rank_bounds: tuple[int | None, ...]
    lost: tuple[int | None, ...]

    @property
    def depth(self) -> int:
        """D, the number of layers."""
        return len(self.hooks) - 1

    @property
    def exponents(self) -> Tensor:
        return self.log_singular_values / self.depth

    @property
    def mean_frame_growth(self) -> Tensor:
        """(T,): nats per layer, in the order of the frame, which need not descend."""
        return self.frame_growth.mean(dim=0)

    @property
    def layer_spectra(self) -> Tensor:
        """(D, T): the singular values of each layer by itself, descending."""
        return self.layers.values

    @property
    def cumulative_spectra(self) -> Tensor | None:
        """(D, T): the singular values of J_l … J_1; their logarithms, which hold any range, are
        ``cumulative.log_values``."""
        return None if self.cumulative is None else self.cumulative.values

    @property
    def log_norm_growth(self) -> float:
        """Nats per layer by which the residual's norm grows: (1/D) log(‖h_D‖ / ‖h_0‖)."""
        return float(self.log_norms[-1] - self.log_norms[0]) / self.depth

    @property
    def log_norm_growth_without_first(self) -> float | None:
        """The same without position 0."""
        norms = self.log_norms_without_first
        return None if norms is None else float(norms[-1] - norms[0]) / self.depth

    @property
    def exponents_less_growth(self) -> Tensor:
        """(T,): ``exponents`` − ``log_norm_growth``: growth relative to the state's own."""
        return self.exponents - self.log_norm_growth

    @property
    def exponents_less_growth_without_first(self) -> Tensor | None:
        growth = self.log_norm_growth_without_first
        return None if growth is None else self.exponents - growth


def lyapunov(
    model: nn.Module,
    input_ids: Any,
    T: int,
    *,
    hooks: Sequence[str] | None = None,
    positions: Any = None,
    identity: bool = True,
    cumulative: bool = True,
    probes: int = 8,
    draws: int = 16,
    tol: float | None = None,
    max_sweeps: int = 200,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Lyapunov:
    """The T leading exponents (1/D) log σ_i of a model's product of layers at one input, with all that
    :class:`Lyapunov` tells of the layers on the way.

    ``model``, ``input_ids``, ``attention_mask``, ``position_ids``: as :func:`scalpel.jacobian` takes them. For the
    null of an untrained model, give one.
    ``T``: 1 to the smallest number of singular values that the product or a layer has.
    ``hooks``: the hooks between which the layers lie, in the model's order, at least two. By default the
    residual stream at the head of each layer, and at the end, of a CircuitGPT or of a decoder that
    :func:`scalpel.jacobian` has rules for; other models need them said. The product is the chain
    through these hooks alone, and the Jacobian from the first to the last only where every path passes each.
    ``positions``: None, an int, a slice or a list of ints. All tokens take part between the layers; the product starts
    from tangents at the chosen tokens of the first hook and is read at the chosen tokens of the last:
    ``positions=-1`` is last → last. A layer by itself is restricted at both of its ends.
    ``identity``: whether a layer includes the residual path; see :class:`Lyapunov`.
    ``cumulative``: also the spectra of J_l … J_1 at each depth l, which costs D / 2 times the rest.
    ``probes``: random vectors for the energy of the spectra's unseen tails; 0 leaves it unknown.
    ``draws``: random products for the null of the alignment.
    ``tol``: the largest residual that counts as converged, by default 1e-7 in float64 and 1e-3 in float32 (the error of
    log σ_i goes with its square). ``max_sweeps``: how many sweeps may be spent on it.
    ``seed``: of the starting frames, the probes and the null.

    A sweep is D jvps and D vjps of T + 8 tangents; they start from Krylov vectors of the product (``Jacobian.svd``),
    which resolve what is large and clustered, and the sweeps what is small. The model runs once, and its layers
    share that primal, where it has rules of its own.

    RuntimeWarning where the residual isn't met; ValueError and TypeError for arguments that don't fit, and for a model
    of half precision.
    """
    T = _integer("T", T, 1)
    probes, draws = _integer("probes", probes, 0), _integer("draws", draws, 0)
    max_sweeps = _integer("max_sweeps", max_sweeps, 1)
    names = _layer_hooks(model, hooks)
    made = jacobians_between(model, input_ids, names, attention_mask=attention_mask, position_ids=position_ids)
    _check_dtype(made)
    at = _chosen(positions, made)
    if not identity:
        _check_square(made, names)
    own = [_layer(J, at, at, identity) for J in made]
    _check_count(T, own, names)
    eps = float(torch.finfo(made[0].dtype).eps)
    goal = (1e-7 if eps < 1e-12 else 1e-3) if tol is None else float(tol)

    depth = len(made)
    bounds = [_bound(model, made, own, i, names, identity) for i in range(depth)]
    triples = [J.svd(T, seed=seed) for J in own]
    spectra, results = [], []
    for stop in range(1 if cumulative else depth, depth + 1):
        chain = _chain(made[:stop], at, identity)
        found = Sweeps(chain, T, seed).solve(goal, max_sweeps)
        results.append(found)
        spectra.append(found.logs)
    sizes = [min(J.shape) if bound is None else min(*J.shape, bound) for J, (bound, _) in zip(own, bounds, strict=True)]
    last = results[-1]
    _warn(results, names, goal)
    generator = torch.Generator().manual_seed(seed)
    tails = reaches = None
    if probes:
        each = [tail_energy([J], Vh, probes, generator) for J, (_, _, Vh) in zip(own, triples, strict=True)]
        tails = torch.tensor(each, dtype=torch.float64, device="cpu")
        each = [tail_energy(found.chain, found.right.flatten(1), probes, generator) for found in results]
        reaches = torch.tensor(each, dtype=torch.float64, device="cpu")
    wider = []
    for found in results:
        ends = [size for J in found.chain for size in J.shape]
        wider.append(min(ends + [b for _, b in bounds[: len(found.chain)] if b is not None]))
    without = _without_first(made, at)
    return Lyapunov(
        tuple(names),
        "with_identity" if identity else "without_identity",
        at,
        last.logs,
        last.right,
        last.residual,
        last.sweeps,
        all(each.converged for each in results),
        frame_growth(last.chain, T, seed),
        Spectra(torch.stack([_logs(S, eps) for _, S, _ in triples]), tuple(sizes), tails),
        Spectra(torch.stack(spectra), tuple(wider), reaches) if cumulative else None,
        measure_alignment(triples, ROUNDING * eps, draws, seed),
        _log_norms(made, at),
        None if without == () else _log_norms(made, without),
        tuple(bound for bound, _ in bounds),
        tuple(None if b is None else J.shape[1] - b for J, (b, _) in zip(own, bounds, strict=True)),
    )


# ---- the layers ----------------------------------------------------------------------------------


def _layer_hooks(model: nn.Module, hooks: Sequence[str] | None) -> list[str]:
    """The hooks between which the layers lie: those given, or the residual stream's of a model with hook names."""
    if hooks is not None:
        if isinstance(hooks, str) or not all(isinstance(each, str) for each in hooks):
            raise TypeError(f"hooks is {hooks!r}; it must be a list of hooks' names")
        if len(hooks) < 2 or len(set(hooks)) < len(hooks):
            raise ValueError(f"hooks is {list(hooks)!r}; it must name at least two hooks, each once")
        return list(hooks)
    model = as_written(model)
    known = getattr(model, "hook_names", None) or hooks_of_model(model)
    if not known:
        raise ValueError(
            f"the layers of {type(model).__name__} are not known: name the hooks between them, such as "
            "hooks=['model.layers.0:in', 'model.layers.1:in', ..., 'model.layers.7']"
        )
    found = [name for name in known if name.endswith(".resid_in")]
    if not found:
        raise ValueError("the model has no layer, so there is no product of layers")
    return [*found, "final_resid"]


def _chosen(positions: Any, made: list[Jacobian]) -> Selected:
    if isinstance(positions, tuple):
        raise ValueError(
            "positions is a pair, and every layer needs the same tokens at both ends: give None, an int, a slice or a "
            "list of ints"
        )
    if positions is None:
        return None
    shapes = [made[0].source_shape, *(J.target_shape for J in made)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(
            f"positions need values (batch, tokens, width) of the same tokens at every hook; they have shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}: leave positions at None"
        )
    return select(positions, shapes[0][1], "chosen")


def _check_dtype(made: list[Jacobian]) -> None:
    for J in made:
        if J.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the layers' values are {J.dtype}, whose rounding hides most of a layer's singular values: use "
                "float32 or float64, such as model.float()"
            )


def _check_square(made: list[Jacobian], names: list[str]) -> None:
    for J, source, target in zip(made, names, names[1:], strict=False):
        if J.source_shape != J.target_shape:
            raise ValueError(
                f"without the identity a layer needs the same shape at both ends; {source!r} has "
                f"{tuple(J.source_shape)} and {target!r} {tuple(J.target_shape)}: leave identity at True"
            )


def _check_count(T: int, own: list[Jacobian], names: list[str]) -> None:
    sizes = [min(J.shape) for J in own]
    most = min(sizes)
    if most < T:
        worst = sizes.index(most)
        raise ValueError(
            f"T is {T}; the layer from {names[worst]!r} to {names[worst + 1]!r} has {most} singular values between the "
            f"chosen positions: 1 <= T <= {most}"
        )


def _layer(J: Jacobian, source: Selected, target: Selected, identity: bool) -> Jacobian:
    """J, or J − I, between the chosen tokens of its ends."""
    if source is None and target is None and identity:
        return J

    def between(product: Product, enter: Selected, leave: Selected, shape: torch.Size) -> Product:
        def go(V: Tensor) -> Tensor:
            full = V
            if enter is not None:
                full = V.new_zeros(V.shape[0], *shape)
                full[:, :, list(enter)] = V
            W = product(full)
            if not identity:
                W = W - full
            return W if leave is None else W[:, :, list(leave)]

        return go

    def end(of: Any, at: Selected) -> Any:
        return replace(of, positions=at, value=read_at(of.value, at))

    return Jacobian(
        between(J.jvp, source, target, J.source_shape),
        between(J.vjp, target, source, J.target_shape),
        end(J._source, source),
        end(J._target, target),
    )


def _chain(made: list[Jacobian], at: Selected, identity: bool) -> list[Jacobian]:
    """The factors of J_l … J_1, first one first, restricted at the ends of the product only."""
    last = len(made) - 1
    return [_layer(J, at if i == 0 else None, at if i == last else None, identity) for i, J in enumerate(made)]


def _bound(
    model: nn.Module, made: list[Jacobian], own: list[Jacobian], i: int, names: list[str], identity: bool
) -> tuple[int | None, int | None]:
    """The bounds on the rank of a layer by itself, between the chosen tokens, and of the whole layer."""
    found = []
    for J in (own[i], made[i]):
        tokens = math.prod(J.source_shape[:-1])
        found.append(rank_bound(model, names[i], names[i + 1], tokens, identity))
    return found[0], found[1]


def _warn(results: list[Found], names: list[str], goal: float) -> None:
    for found in results:
        if not found.converged:
            end = names[len(found.chain)]
            warnings.warn(
                f"lyapunov stopped after {found.sweeps} sweeps from {names[0]!r} to {end!r} with a residual of "
                f"{float(found.residual.max()):.2e}, above tol = {goal:.0e}: the exponents there may be too small. "
                "Give more max_sweeps, another T (a gap below it hastens the sweeps), float64, or a larger tol",
                RuntimeWarning,
                stacklevel=3,
            )


# ---- beside the exponents ------------------------------------------------------------------------


def _logs(S: Tensor, eps: float) -> Tensor:
    values = S.cpu().double()
    return torch.where(values > ROUNDING * eps * values[0], values, 0.0).log()


def _without_first(made: list[Jacobian], at: Selected) -> tuple[int, ...]:
    """The chosen tokens but token 0; empty where there are no others, or no tokens."""
    shapes = [made[0].source_shape, *(J.target_shape for J in made)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        return ()
    tokens = range(shapes[0][1]) if at is None else at
    return tuple(each for each in tokens if each != 0)


def _log_norms(made: list[Jacobian], at: Selected) -> Tensor:
    values = [made[0].T.primal, *(J.primal for J in made)]
    norms = [float(torch.linalg.vector_norm(read_at(value, at).double())) for value in values]
    return torch.tensor(norms, dtype=torch.float64, device="cpu").log()


def _integer(name: str, given: Any, least: int) -> int:
    if isinstance(given, bool):
        raise TypeError(f"{name} is a bool; it must be an int")
    try:
        found = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} is {type(given).__name__}; it must be an int") from None
    if found < least:
        raise ValueError(f"{name} is {found}; it must be {least} or more")
    return found
