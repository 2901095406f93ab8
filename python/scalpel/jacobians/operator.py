"""A Jacobian as a linear operator: products with it, its transpose and its compositions, never its matrix."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .ends import End
from .svd import truncated_svd
from .validity import ValidityRadius, validity_radius

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Product = Callable[[Tensor], Tensor]

_DENSE_BLOCK = 256  # unit tangents at a time when the matrix is wanted after all


class Jacobian:
    """The Jacobian of a target value with respect to a source value, as :func:`scalpel.jacobian` gives it.

    n = numel(source), m = numel(target); T counts tangents and comes first. All tensors share ``dtype`` and
    ``device``. Every product gives detached tensors.

    A Jacobian never changes, so a copy of it, a deep one too, is itself. It can't be pickled: it holds the model and
    its forward pass. Another process gets the model and the inputs, and calls :func:`scalpel.jacobian` there.
    """

    def __init__(self, push: Product, pull: Product, source: End, target: End) -> None:
        self._push = push
        self._pull = pull
        self._source = source
        self._target = target
        self._transposed: Jacobian | None = None
        self._derived: str | None = None  # from another operator: "transpose" or "composition"

    def __copy__(self) -> "Jacobian":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Jacobian":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{self} can't be pickled: it holds the model and its forward pass. Keep the model and the inputs, and "
            "call scalpel.jacobian again where you need it; or keep what you want of it: J.to_dense(), J.svd(k)"
        )

    @property
    def primal(self) -> Tensor:
        """The value at the target, of ``target_shape`` (of a transpose: the value at the original's
        source)."""
        return self._target.value

    @property
    def source_shape(self) -> torch.Size:
        return self._source.value.shape

    @property
    def target_shape(self) -> torch.Size:
        return self._target.value.shape

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): numel(target), numel(source)."""
        return self._target.value.numel(), self._source.value.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self._source.value.dtype

    @property
    def device(self) -> torch.device:
        return self._source.value.device

    def __repr__(self) -> str:
        return f"Jacobian({self._source} → {self._target}, shape={self.shape}, dtype={self.dtype})"

    def jvp(self, V: Tensor) -> Tensor:
        """T tangents at the source, V (T, *source_shape), carried to the target: (T, *target_shape).

        T may be 0. TypeError or ValueError for another shape, dtype or device.
        """
        self._check(V, "V", "jvp", tuple(self.source_shape))
        if V.shape[0] == 0 or V[0].numel() == 0:
            return V.new_zeros(V.shape[0], *self.target_shape)
        return self._push(V.detach())

    def vjp(self, U: Tensor) -> Tensor:
        """T cotangents at the target, U (T, *target_shape), carried back to the source: (T,
        *source_shape)."""
        self._check(U, "U", "vjp", tuple(self.target_shape))
        if U.shape[0] == 0 or U[0].numel() == 0:
            return U.new_zeros(U.shape[0], *self.source_shape)
        return self._pull(U.detach())

    @property
    def T(self) -> "Jacobian":
        """The transpose, an operator of the same class: ``J.T.jvp`` is ``J.vjp``; ``J.T.T`` is ``J``."""
        if self._transposed is None:
            self._transposed = Jacobian(self._pull, self._push, self._target, self._source)
            self._transposed._transposed = self
            self._transposed._derived = self._derived or "transpose"
        return self._transposed

    @property
    def H(self) -> "Jacobian":
        """The adjoint; values are real, so it is the transpose."""
        return self.T

    def __matmul__(self, other: Any) -> Any:
        """``J @ v``: v (n,) → (m,), or a block (n, T) → (m, T). ``J2 @ J1``: first J1, then J2.

        A composition needs J1's target to be J2's source: the same hook and positions of the same model at
        the same inputs; otherwise ValueError. It is the chain through that hook alone: the whole Jacobian
        only where every path passes there, as all do at a residual-stream hook with all positions.
        """
        if isinstance(other, Jacobian):
            return self._after(other)
        if not isinstance(other, Tensor):
            raise TypeError(f"J @ {type(other).__name__}: the right side must be a torch.Tensor or a Jacobian")
        m, n = self.shape
        if other.dim() not in (1, 2) or other.shape[0] != n:
            raise ValueError(f"J @ v: v has shape {tuple(other.shape)}; J of shape {(m, n)} takes ({n},) or ({n}, T)")
        if other.dim() == 1:
            return self.jvp(other.reshape(1, *self.source_shape)).reshape(m)
        count = other.shape[1]
        return self.jvp(other.T.reshape(count, *self.source_shape)).reshape(count, m).T

    def _after(self, first: "Jacobian") -> "Jacobian":
        problem = first._target.mismatch(self._source)
        if problem:
            raise ValueError(f"J2 @ J1 needs J1 to end where J2 starts, and {problem}")
        composed = Jacobian(
            lambda tangents: self._push(first._push(tangents)),
            lambda cotangents: first._pull(self._pull(cotangents)),
            first._source,
            self._target,
        )
        composed._derived = "composition"
        return composed

    def svd(self, k: int, *, seed: int = 0, tol: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest singular triples (U (m, k), S (k,) descending, Vh (k, n)), laid out as
        torch.linalg.svd's.

        0 ≤ k ≤ min(m, n), else ValueError. Small operators are made dense; others go through a block
        Golub–Kahan bidiagonalisation with full reorthogonalisation and thick restarts (Golub, Luk and Overton
        1981; Baglama and Reichel 2005), which starts from ``seed`` and stops when every residual ‖Jᵀu − σv‖,
        a bound on the error of that value, is at most ``tol``·σ (by default 1e-9 in float64, 3e-5 in float32)
        or at the dtype's rounding. RuntimeWarning with the worst residual if it does not get there. Signs are
        the solver's.
        """
        return truncated_svd(self, k, seed=seed, tol=tol)

    def spectrum(self, k: int, *, seed: int = 0, tol: float | None = None) -> Tensor:
        """The k largest singular values, (k,) descending; see :meth:`svd`."""
        return self.svd(k, seed=seed, tol=tol)[1]

    def validity_radius(self, V: Tensor) -> ValidityRadius:
        """For T tangents at the source, V (T, *source_shape), the largest step along each that flips no mask.

        ``radius`` (T,): the largest s such that the source value moved by less than s·V[t] leaves every AbsTopK the
        same kept entries and every ReLU the same signs, to first order: the inputs of masks move along their own
        tangents. inf where nothing can flip. Masks count that lie after the source hook and that the target reads, at
        the tokens that it reads; not those in a target's function. The model is then run again beside that radius:
        see :class:`scalpel.jacobians.validity.ValidityRadius` for ``first``, ``verified`` and ``flips``.

        Of a CircuitGPT; a transformers model with a smooth activation has none, so inf. One pass with a tangent and
        two without for each tangent. NotImplementedError for other models; ValueError for a transpose, a
        composition, or a V that is not finite.
        """
        self._check(V, "V", "validity_radius", tuple(self.source_shape))
        return validity_radius(self._source, self._target, self._derived, V)

    def to_dense(self) -> Tensor:
        """The matrix (m, n), for small cases: min(m, n) products and m·n numbers of memory."""
        m, n = self.shape
        if m < n:
            return self.T.to_dense().T
        matrix = torch.empty(m, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, _DENSE_BLOCK):
            stop = min(n, start + _DENSE_BLOCK)
            unit = torch.zeros(n, stop - start, dtype=self.dtype, device=self.device)
            unit[torch.arange(start, stop, device=self.device), torch.arange(stop - start, device=self.device)] = 1
            matrix[:, start:stop] = self @ unit
        return matrix

    def to_scipy(self) -> "LinearOperator":
        """A ``scipy.sparse.linalg.LinearOperator`` (m, n) over NumPy arrays, of J's precision (at least
        float32). Complex vectors give complex products: J(x + iy) = Jx + iJy.

        See :class:`scalpel.jacobians.scipy_operator.JacobianLinearOperator` for what it takes and refuses.
        """
        from .scipy_operator import JacobianLinearOperator  # SciPy takes a while to import

        return JacobianLinearOperator(self)

    def _check(self, given: Any, name: str, method: str, shape: tuple[int, ...]) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is {type(given).__name__}; J.{method} takes a torch.Tensor")
        if given.dim() != 1 + len(shape) or tuple(given.shape[1:]) != shape:
            inside = ", ".join(map(str, ("T", *shape)))
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; J.{method} takes ({inside}"
                f"{',' if not shape else ''}), the T tangents first (one alone: {name}[None])"
            )
        if given.dtype.is_complex:
            raise TypeError(
                f"{name} is {given.dtype}; this Jacobian is real and takes {self.dtype}: give {name}.real and "
                f"{name}.imag one after the other, or use J.to_scipy(), which takes complex arrays"
            )
        if given.dtype != self.dtype:
            raise TypeError(f"{name} is {given.dtype}; this Jacobian takes {self.dtype}: {name}.to({self.dtype})")
        if given.device != self.device:
            raise ValueError(f"{name} is on {given.device}; this Jacobian is on {self.device}: move {name} there")
