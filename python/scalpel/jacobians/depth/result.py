"""The result of :func:`scalpel.lyapunov`: the semigroup of depth at one input."""

from dataclasses import dataclass

from torch import Tensor

from .spectra import Alignment, Spectra

__all__ = ["Lyapunov"]


@dataclass(frozen=True)
class Lyapunov:
    """The semigroup of depth at one input, as :func:`scalpel.lyapunov` gives it.

    There are D layers and T directions; logarithms are natural. Every tensor but ``right`` is float64 on the CPU. −inf
    stands for a singular value that is zero to rounding: at some layer its direction shrinks to at most 64 eps of the
    length of the longest one.

    Attributes:
        hooks: The D + 1 hooks between which the layers lie.
        identity: "with_identity" where layer l is J_l, the residual path included; "without_identity" where it is
            J_l − I, which is the contribution of attention and MLP where nothing masks the residual stream.
        positions: The tokens at the ends of the product, None for all.
        log_singular_values: (T,), descending: log σ_i(J_D … J_1), which is D times ``exponents``.
        right: (T, *source_shape), in the model's dtype and on its device: the right singular vectors, which are the
            directions at the first hook; 0 where the singular value is 0. Their signs are arbitrary.
        residual: (T,), an upper bound on sin θ, with θ the largest angle between the i leading right singular vectors,
            carried forward and back once more, and the directions from which they were taken. If these vectors were
            exact, log σ_i would be too small by at most −log cos θ ≈ θ²/2. A further sweep would still turn them a
            little: where it shrinks the residual only to a fraction ρ, the angle is about θ / (1 − ρ) instead of θ.
            Whatever the angle is, each σ_i lies within the fraction tan θ of itself from a true singular value.
        sweeps: The number of passes forward and back, or of steps of the search, that the product of all layers took.
        converged: Whether every residual met ``tol``, those of ``cumulative`` and of the layers included.
        frame_growth: (D, T), log |R_ii| of the QR factorisation after each layer in one forward sweep from a random
            frame (Benettin et al. 1980). The mean over the layers, ``mean_frame_growth`` (T,), tends to the Lyapunov
            exponents as D goes to infinity; at a finite depth it differs from the exponents, and may be far from them.
        layers: :class:`Spectra` of each layer by itself, between the chosen positions. They give the effective and the
            stable rank as intervals, as do those of ``cumulative``.
        cumulative: :class:`Spectra` of J_l … J_1 for each l of ``depths``, restricted at both ends; None where they
            were not requested.
        alignment: :class:`Alignment` of successive layers of ``layers``, with its null.
        log_norms: (D + 1,), the logarithm of the Frobenius norm of the residual stream at each hook over the chosen
            positions.
        log_norms_without_first: The same without position 0, whose norm can hide those of all others; None where no
            other position is chosen.
        rank_bounds: For each layer of ``layers``, the upper bound on its rank that the model's TopKs imply; None where
            they imply none. See :func:`scalpel.jacobians.depth.spectra.rank_bound`.
        lost: For each layer, n minus its bound, where n is the number of dimensions at its source. The layer sends at
            least that many dimensions to zero, and no later layer can recover them; which ones is not known here. None
            where there is no bound, though directions may be lost there too: ``layers.zeros`` counts the zeros among
            the T values.
        depths: The depths l of ``cumulative``, ascending, the last of them D; empty where they were not requested.
        layer_residual: (D,), for the values of each layer what the last entry of ``residual`` is for the product; 0
            where the layer was small enough for a dense decomposition.
        cumulative_residual: (len(depths),), the same for the product at each of ``depths``; None where they were not
            requested.
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
    depths: tuple[int, ...]
    layer_residual: Tensor
    cumulative_residual: Tensor | None

    @property
    def depth(self) -> int:
        """D, the number of layers."""
        return len(self.hooks) - 1

    @property
    def exponents(self) -> Tensor:
        """The exponents (T,), descending, in nats per layer: (1/D) log σ_i(J_D … J_1)."""
        return self.log_singular_values / self.depth

    @property
    def mean_frame_growth(self) -> Tensor:
        """The mean of ``frame_growth`` over the layers, (T,), in nats per layer; the order is the frame's."""
        return self.frame_growth.mean(dim=0)

    @property
    def layer_spectra(self) -> Tensor:
        """The singular values (D, T) of each layer by itself, descending."""
        return self.layers.values

    @property
    def cumulative_spectra(self) -> Tensor | None:
        """The singular values (len(depths), T) of J_l … J_1; None where they were not requested.

        Their logarithms, which cover any range, are ``cumulative.log_values``.
        """
        return None if self.cumulative is None else self.cumulative.values

    @property
    def log_norm_growth(self) -> float:
        """The growth of the residual stream's norm in nats per layer: (1/D) log(‖h_D‖ / ‖h_0‖)."""
        return float(self.log_norms[-1] - self.log_norms[0]) / self.depth

    @property
    def log_norm_growth_without_first(self) -> float | None:
        """``log_norm_growth`` without position 0; None where no other position is chosen."""
        norms = self.log_norms_without_first
        return None if norms is None else float(norms[-1] - norms[0]) / self.depth

    @property
    def exponents_less_growth(self) -> Tensor:
        """The exponents (T,) minus ``log_norm_growth``: growth relative to that of the residual stream itself."""
        return self.exponents - self.log_norm_growth

    @property
    def exponents_less_growth_without_first(self) -> Tensor | None:
        """The exponents (T,) minus ``log_norm_growth_without_first``; None where only position 0 is chosen."""
        growth = self.log_norm_growth_without_first
        return None if growth is None else self.exponents - growth
