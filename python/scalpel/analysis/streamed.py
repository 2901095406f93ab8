"""The figures of one chunk of text for a model that stays in its folder, with one layer in memory at a time.

The folder is read once. The spectrum of each layer is measured while the layer is in memory, and a frame of directions
is carried through all layers. There are no exponents of the product, since these need the layers in reverse order too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..hooks.positions import Selected, read_at
from ..jacobians.depth.layers import restricted
from ..jacobians.depth.spectra import Spectra
from ..jacobians.depth.sweeps import ROUNDING, tail_energy
from ..jacobians.ends import End
from ..jacobians.operator import Jacobian
from ..jacobians.stream import StreamedLayer, stream_layers
from ..models.decoders.folder import decoder_in
from .measure import Figures, plain, share, spectra

_PROBES = 8

Step = Callable[[str, float], None]


def measure_streamed(
    folder: Path, ids: Tensor, T: int, seed: int, narrow: bool, step: Step, counted: list[int] | None = None
) -> Figures:
    """Measure the model in ``folder`` at ``ids`` (1, L), with T directions.

    ``counted`` lists the positions of the tokens that count, as for :func:`.measure.measure`; None if all do.
    ``narrow`` says whether its matrix products are bfloat16, which rounds singular values to about 1 % and keeps
    residuals from falling further. ``step(what, done)`` is called before each layer.

    The figure ``residual`` of each layer is the largest of all ‖Jᵀu − σv‖ / σ and ‖Jv − σu‖ / σ. It bounds the relative
    distance from each σ to a true singular value.
    """
    goal = 2e-2 if narrow else 3e-3
    generator = torch.Generator().manual_seed(seed)
    logs, tails, residuals, growth, norms, norms_without_first = [], [], [], [], [], []
    active: dict[str, float] = {}
    sizes: list[int] = []
    depth = decoder_in(folder).config.layers
    at: Selected = None if counted is None else tuple(counted)
    after_first: Selected = tuple(i for i in (range(ids.shape[1]) if at is None else at) if i > 0)
    frame: Tensor | None = None

    def see(name: str, value: Tensor) -> None:
        active[name] = share(read_at(value, at))

    for layer in stream_layers(folder, ids, see=see):
        step(f"layer {layer.number + 1} of {depth}", layer.number / depth)
        through = _operator(layer)
        J = restricted(through, at, at, True)
        if min(J.shape) < T:
            tokens = math.prod(J.source_shape[:-1])
            raise ValueError(f"T is {T}; a layer at {tokens} tokens has {min(J.shape)} singular values")
        if frame is None:
            random = torch.randn(J.shape[1], T, generator=generator, dtype=torch.float64, device="cpu")
            frame = torch.linalg.qr(random)[0].to(ids.device)
            norms.append(_log_norm(read_at(layer.before, at)))
            norms_without_first.append(_log_norm(read_at(layer.before, after_first)))
        log_values, Vh, residual = _spectrum(J, T, seed, goal)
        logs.append(log_values.cpu())
        residuals.append(residual)
        tails.append(tail_energy([J], Vh, _PROBES, generator))
        sizes.append(min(J.shape))
        # between the first layer and the last, the frame is carried through all tokens
        ends = at if layer.number == 0 else None, at if layer.number == depth - 1 else None
        frame, growth_here = _through(restricted(through, *ends, True), frame)
        growth.append(growth_here.cpu())
        norms.append(_log_norm(read_at(layer.after, at)))
        norms_without_first.append(_log_norm(read_at(layer.after, after_first)))
    frames = torch.stack(growth)
    return {
        "log_norms": _logs(norms),
        "log_norms_without_first": None if not after_first else _logs(norms_without_first),
        "frame_growth": plain(frames),
        "mean_frame_growth": plain(frames.mean(dim=0)),
        "layers": spectra(
            Spectra(torch.stack(logs), tuple(sizes), torch.tensor(tails, dtype=torch.float64, device="cpu"))
        )
        | {"residual": residuals},
        "active": active,
        "margins": {},
        "converged": max(residuals) <= goal,
        "residual": max(residuals),
    }


def _operator(layer: StreamedLayer) -> Jacobian:
    """Make an operator of the layer in memory.

    Its ends have no pass, since it is never composed with another operator.
    """
    no_pass = cast(Any, None)
    before = End(no_pass, f"{layer.number}.resid_in", None, None, layer.before)
    after = End(no_pass, f"the end of layer {layer.number}", None, None, layer.after)
    # the rules of the layer need contiguous tangents
    return Jacobian(lambda V: layer.jvp(V.contiguous()), lambda U: layer.vjp(U.contiguous()), before, after)


def _spectrum(J: Jacobian, T: int, seed: int, goal: float) -> tuple[Tensor, Tensor, float]:
    """Return the logarithms of the T largest singular values, their right vectors and the largest relative residual."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the residual, measured below, says whether it converged
        U, S, Vh = J.svd(T, seed=seed, tol=goal / 2)
    S = S.double()
    nonzero = ROUNDING * float(torch.finfo(J.dtype).eps) * S[0] < S
    pulled = J.vjp(U.T.reshape(T, *J.target_shape).to(J.dtype)).flatten(1).double()
    pushed = J.jvp(Vh.reshape(T, *J.source_shape).to(J.dtype)).flatten(1).double()
    residuals = torch.linalg.vector_norm(pulled - S[:, None] * Vh, dim=1)
    residuals = residuals.maximum(torch.linalg.vector_norm(pushed - S[:, None] * U.T, dim=1))
    residual = float((residuals / S)[nonzero].max()) if bool(nonzero.any()) else 0.0
    return torch.where(nonzero, S, 0.0).log(), Vh, residual


def _through(J: Jacobian, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the frame through a layer, orthonormalise it, and return it with its growth log |R_ii|.

    This is one step of ``sweeps.frame_growth``.
    """
    image = J.jvp(frame.T.reshape(-1, *J.source_shape).to(J.dtype)).double().reshape(frame.shape[1], -1).T
    Q, R = torch.linalg.qr(image)
    floor = ROUNDING * float(torch.finfo(J.dtype).eps) * float(torch.linalg.matrix_norm(R, 2))
    lengths = R.diagonal().abs()
    return Q, torch.where(lengths > floor, lengths, 0.0).log()


def _log_norm(value: Tensor) -> float:
    """The logarithm of the Euclidean norm; −inf where it is zero."""
    norm = float(torch.linalg.vector_norm(value.double()))
    return math.log(norm) if norm > 0 else -math.inf


def _logs(values: list[float]) -> list[float | None]:
    """The same numbers with None in place of those that are not finite."""
    return [value if math.isfinite(value) else None for value in values]
