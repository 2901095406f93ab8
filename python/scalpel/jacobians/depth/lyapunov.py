"""The semigroup of depth: what the product of a model's layers does to directions of the residual stream.

The product P = J_D … J_1 of the layers' Jacobians is never formed. :mod:`.products` searches for its leading singular
values with a basis that is carried through the layers, and shared by all depths. Where values are too far apart for the
dtype, :mod:`.sweeps` goes forward and back through the layers, and :mod:`.graded` multiplies the triangular factors, so
that each singular value has a small relative error even where they are hundreds of orders of magnitude apart. Both end
when a bound on the error, ``Lyapunov.residual``, is small enough, and not merely when a step is small.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._integers import integer
from ...hooks.positions import Selected, read_at
from ..entry import jacobians_between
from ..operator import Jacobian
from .layers import check_count, check_dtype, check_square, chosen_tokens, layer_hooks, restricted
from .products import Product, Step, Triples, depths_of, layer_triples, measure_products, product_tails
from .result import Lyapunov
from .spectra import Spectra, measure_alignment, rank_bound
from .sweeps import ROUNDING, frame_growth, tail_energy

__all__ = ["Lyapunov", "lyapunov", "lyapunov_of"]

# Products with tangents that a search takes, roughly, on language models: for a layer, and for each layer of a product.
# They decide only how progress is told.
_LAYER = 190
_DEPTH = 90


def lyapunov(
    model: nn.Module,
    input_ids: Any,
    T: int,
    *,
    hooks: Sequence[str] | None = None,
    positions: Any = None,
    identity: bool = True,
    cumulative: bool | int | Sequence[int] = True,
    probes: int = 8,
    draws: int = 16,
    tol: float | None = None,
    max_sweeps: int = 200,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Lyapunov:
    """Measure the T leading exponents (1/D) log σ_i of a model's product of D layers at one input.

    The result, a :class:`Lyapunov`, also holds the spectra of the layers on the way, their alignment and their ranks.

    The values come from block Krylov searches, in which each depth starts from the right singular vectors of the depth
    before it, and from the images of these at that depth: no search begins again at the first layer. Operators of a few
    hundred dimensions, and products whose values are too far apart for the dtype, take sweeps instead, of D jvps and D
    vjps of T + 8 tangents, which resolve small values too. A model that has rules of its own runs once, and its layers
    share that trace.

    Args:
        model: As :func:`scalpel.jacobian` takes it. Give an untrained model to measure a null for a trained one.
        input_ids: As :func:`scalpel.jacobian` takes them.
        T: The number of exponents, from 1 to the smallest number of singular values of the product or of a layer.
        hooks: The hooks at the ends of the layers, at least two, in the model's order. The default is the residual
            stream before each layer and after the last one. It exists for a CircuitGPT, and for a decoder that
            :func:`scalpel.jacobian` has rules for; the hooks of other models must be named. The product is the chain
            through these hooks alone. It is the Jacobian from the first hook to the last only if every path passes
            through all of them.
        positions: None, an int, a slice or a list of ints. The product starts from tangents at the chosen tokens of the
            first hook and is read at the chosen tokens of the last, and between them all tokens take part:
            ``positions=-1`` goes from the last token to the last token. A layer by itself is restricted at both ends.
        identity: Whether a layer includes the residual path; see :class:`Lyapunov`.
        cumulative: The depths l at which the spectra of J_l … J_1 are measured too: True for at most 12, evenly spread,
            a number for that many, or a list of depths; the last depth is always among them. False measures none.
        probes: The number of random vectors that estimate the energy of the spectra's unseen tails; with 0 there is no
            estimate.
        draws: The number of random products for the null of the alignment.
        tol: The largest residual that counts as converged, of the product, the products and the layers, by default
            1e-7 in float64 and 3e-2 in float32. Every σ_i is within this fraction of a true singular value, and the
            error of log σ_i is about half its square: 5e-4 nats in float32.
        max_sweeps: The largest number of sweeps, or steps of a search, for one product.
        seed: Seed of the starting frames, the probes and the null.
        attention_mask: As :func:`scalpel.jacobian` takes it.
        position_ids: As :func:`scalpel.jacobian` takes them.

    Returns:
        The exponents, in nats per layer, with their residuals, and everything else that :class:`Lyapunov` lists.

    Raises:
        ValueError: For arguments that don't fit the model or each other.
        TypeError: For arguments of the wrong type, and for a model of half precision.

    Warns:
        RuntimeWarning: Where a residual is still above ``tol`` after the last sweep.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> L = scalpel.lyapunov(model, torch.tensor([[1, 2, 3, 4]]), T=3, cumulative=False)
        >>> L.depth == model.config.n_layer, tuple(L.exponents.shape)
        (True, (3,))
        >>> bool((L.exponents.diff() <= 0).all())
        True
    """
    _integer("T", T, 1)  # before the model runs
    names = layer_hooks(model, hooks)
    layers = jacobians_between(model, input_ids, names, attention_mask=attention_mask, position_ids=position_ids)
    return lyapunov_of(
        model,
        names,
        layers,
        T,
        positions=positions,
        identity=identity,
        cumulative=cumulative,
        probes=probes,
        draws=draws,
        tol=tol,
        max_sweeps=max_sweeps,
        seed=seed,
    )


def lyapunov_of(
    model: nn.Module,
    names: list[str],
    layers: list[Jacobian],
    T: int,
    *,
    positions: Any = None,
    identity: bool = True,
    cumulative: bool | int | Sequence[int] = True,
    probes: int = 8,
    draws: int = 16,
    tol: float | None = None,
    max_sweeps: int = 200,
    seed: int = 0,
    step: Step | None = None,
) -> Lyapunov:
    """Measure what :func:`lyapunov` does for layers whose Jacobians are already made.

    ``layers[i]`` leads from hook ``names[i]`` to hook ``names[i + 1]``. ``step(what, done)`` is called before each
    layer and each product, with ``done`` from 0 to 1, the share of the work that is done by then.
    """
    T = _integer("T", T, 1)
    probes, draws = _integer("probes", probes, 0), _integer("draws", draws, 0)
    max_sweeps = _integer("max_sweeps", max_sweeps, 1)
    check_dtype(layers)
    tokens = chosen_tokens(positions, layers)
    if not identity:
        check_square(layers, names)
    single_layers = [restricted(J, tokens, tokens, identity) for J in layers]
    check_count(T, single_layers, names)
    eps = float(torch.finfo(layers[0].dtype).eps)
    goal = (1e-7 if eps < 1e-12 else 3e-2) if tol is None else float(tol)
    depth = len(layers)
    depths = depths_of(cumulative, depth)
    wanted = depths or [depth]
    of_layers = _LAYER * depth
    work = of_layers + _DEPTH * sum(wanted) + 2 * T * depth  # the last for the frame and the probes

    def of_products(what: str, done: float) -> None:
        assert step is not None
        step(what, (of_layers + _DEPTH * sum(wanted) * done) / work)

    bounds = [_bound(model, layers, single_layers, i, names, identity) for i in range(depth)]
    triples = []
    for i, J in enumerate(single_layers):
        if step is not None:
            step(f"layer {i + 1} of {depth}", _LAYER * i / work)
        triples.append(layer_triples(J, T, seed, goal))
    _warn_of_layers(triples, names, goal)
    products = measure_products(
        layers,
        tokens,
        identity,
        T,
        wanted,
        seed=seed,
        goal=goal,
        most=max_sweeps,
        step=None if step is None else of_products,
    )
    _warn(products, names, goal)
    if step is not None:
        step("frame and probes", 1 - 2 * T * depth / work)

    sizes = [
        min(J.shape) if bound is None else min(*J.shape, bound)
        for J, (bound, _) in zip(single_layers, bounds, strict=True)
    ]
    sizes_of_products = []
    for product in products:
        widths = [size for J in product.chain for size in J.shape]
        sizes_of_products.append(
            min(widths + [bound for _, bound in bounds[: len(product.chain)] if bound is not None])
        )
    generator = torch.Generator().manual_seed(seed)
    tails = tails_of_products = None
    if probes:
        energies = [
            tail_energy([J], found.Vh, probes, generator) for J, found in zip(single_layers, triples, strict=True)
        ]
        tails = torch.tensor(energies, dtype=torch.float64, device="cpu")
        energies = product_tails(layers, tokens, identity, products, probes, generator)
        tails_of_products = torch.tensor(energies, dtype=torch.float64, device="cpu")
    spectra_of_products = Spectra(torch.stack([p.logs for p in products]), tuple(sizes_of_products), tails_of_products)
    full_product = products[-1]
    tokens_without_first = _without_first(layers, tokens)
    return Lyapunov(
        tuple(names),
        "with_identity" if identity else "without_identity",
        tokens,
        full_product.logs,
        full_product.right,
        full_product.residual,
        full_product.sweeps,
        all(p.converged for p in products) and all(found.converged for found in triples),
        frame_growth(full_product.chain, T, seed),
        Spectra(torch.stack([_logs(found.S, eps) for found in triples]), tuple(sizes), tails),
        spectra_of_products if depths else None,
        measure_alignment([(found.U, found.S, found.Vh) for found in triples], ROUNDING * eps, draws, seed),
        _log_norms(layers, tokens),
        None if tokens_without_first == () else _log_norms(layers, tokens_without_first),
        tuple(bound for bound, _ in bounds),
        tuple(
            None if bound is None else J.shape[1] - bound for J, (bound, _) in zip(single_layers, bounds, strict=True)
        ),
        tuple(depths),
        torch.tensor([found.residual for found in triples], dtype=torch.float64, device="cpu"),
        torch.stack([product.residual[-1] for product in products]) if depths else None,
    )


def _bound(
    model: nn.Module, layers: list[Jacobian], own: list[Jacobian], i: int, names: list[str], identity: bool
) -> tuple[int | None, int | None]:
    """Bound the rank of layer ``i`` between the chosen tokens, and between all tokens; None where there is no bound."""
    between_chosen, between_all = (
        rank_bound(model, names[i], names[i + 1], math.prod(J.source_shape[:-1]), identity) for J in (own[i], layers[i])
    )
    return between_chosen, between_all


def _warn_of_layers(layers: list[Triples], names: list[str], goal: float) -> None:
    """Warn of each layer whose search did not converge."""
    for i, found in enumerate(layers):
        if not found.converged:
            warnings.warn(
                f"lyapunov stopped at the layer from {names[i]!r} to {names[i + 1]!r} with a residual of "
                f"{found.residual:.2e}, above tol = {goal:.0e}: each of its singular values is within that fraction of "
                "a true one. Give another T (a gap below it hastens the search), float64, or a larger tol",
                RuntimeWarning,
                stacklevel=4,
            )


def _warn(products: list[Product], names: list[str], goal: float) -> None:
    """Warn of each product whose sweeps did not converge."""
    for product in products:
        if not product.converged:
            end = names[len(product.chain)]
            warnings.warn(
                f"lyapunov stopped after {product.sweeps} sweeps from {names[0]!r} to {end!r} with a residual of "
                f"{float(product.residual.max()):.2e}, above tol = {goal:.0e}: the exponents there may be too small. "
                "Give more max_sweeps, another T (a gap below it hastens the sweeps), float64, or a larger tol",
                RuntimeWarning,
                stacklevel=4,
            )


# ---- spectra and norms of the layers -------------------------------------------------------------


def _logs(S: Tensor, eps: float) -> Tensor:
    """The logarithms of singular values; −inf where a value is zero to rounding."""
    values = S.cpu().double()
    return torch.where(values > ROUNDING * eps * values[0], values, 0.0).log()


def _without_first(layers: list[Jacobian], at: Selected) -> tuple[int, ...]:
    """Return the chosen tokens other than token 0.

    The result is empty where there are none, or where the hooks' values have no common axis of tokens.
    """
    shapes = [layers[0].source_shape, *(J.target_shape for J in layers)]
    if any(len(shape) < 3 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        return ()
    tokens = range(shapes[0][1]) if at is None else at
    return tuple(token for token in tokens if token != 0)


def _log_norms(layers: list[Jacobian], at: Selected) -> Tensor:
    """The logarithm of the norm of the value at each hook over the tokens ``at``, (D + 1,) float64."""
    values = [layers[0].T.primal, *(J.primal for J in layers)]
    norms = [float(torch.linalg.vector_norm(read_at(value, at).double())) for value in values]
    return torch.tensor(norms, dtype=torch.float64, device="cpu").log()


def _integer(name: str, value: Any, least: int) -> int:
    """Return the option ``name`` as an int of at least ``least``, or raise an error that names it."""
    number = integer(value, name)
    if number < least:
        raise ValueError(f"{name} is {number}; it must be {least} or more")
    return number
