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

    n is numel(source) and m is numel(target); T is the number of tangents and comes first. All tensors share ``dtype``
    and ``device``. Every product gives detached tensors.

    A Jacobian never changes, so a copy of it, a deep one too, is itself. It can't be pickled, since it holds the model
    and its forward pass: give another process the model and the inputs, and call :func:`scalpel.jacobian` there.

    Args:
        push: Carries tangents (T, *source_shape) to the target.
        pull: Carries cotangents (T, *target_shape) to the source.
        source: The value, the hook and the positions at the source.
        target: The same at the target.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> J = scalpel.jacobian(model, ids, "0.resid_in", "1.resid_in")
        >>> K = scalpel.jacobian(model, ids, "1.resid_in", "final_resid")
        >>> v = torch.ones(J.shape[1])
        >>> torch.allclose((K @ J) @ v, K @ (J @ v))
        True
        >>> J.T.shape == J.H.shape == (J.shape[1], J.shape[0])
        True
        >>> U, S, Vh = J.svd(3)
        >>> torch.allclose(J @ Vh[0], S[0] * U[:, 0], atol=1e-4 * float(S[0]))
        True
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
        """The value at the target, of ``target_shape``; a transpose has the value at the original's source here."""
        return self._target.value

    @property
    def source_shape(self) -> torch.Size:
        """The shape of the value at the source, which one tangent has."""
        return self._source.value.shape

    @property
    def target_shape(self) -> torch.Size:
        """The shape of the value at the target, which the product with one tangent has."""
        return self._target.value.shape

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of the matrix: numel(target), numel(source)."""
        return self._target.value.numel(), self._source.value.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of values, tangents and products."""
        return self._source.value.dtype

    @property
    def device(self) -> torch.device:
        """The device of values, tangents and products."""
        return self._source.value.device

    def __repr__(self) -> str:
        return f"Jacobian({self._source} → {self._target}, shape={self.shape}, dtype={self.dtype})"

    def jvp(self, V: Tensor) -> Tensor:
        """Carry T tangents at the source to the target.

        Args:
            V: (T, *source_shape); T may be 0.

        Returns:
            (T, *target_shape).

        Raises:
            ValueError: For tangents of another shape or on another device.
            TypeError: For tangents of another dtype, or no tensor.
            RuntimeError: Where the model has changed since the Jacobian was made.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]))
            >>> J.jvp(torch.zeros(2, *J.source_shape)).count_nonzero().item()
            0
        """
        self._check(V, "V", "jvp", tuple(self.source_shape))
        if V.shape[0] == 0 or V[0].numel() == 0:
            return V.new_zeros(V.shape[0], *self.target_shape)
        return self._push(V.detach())

    def vjp(self, U: Tensor) -> Tensor:
        """Carry T cotangents at the target back to the source.

        Args:
            U: (T, *target_shape); T may be 0.

        Returns:
            (T, *source_shape).

        Raises:
            ValueError: For cotangents of another shape or on another device.
            TypeError: For cotangents of another dtype, or no tensor.
            RuntimeError: Where the model has changed since the Jacobian was made.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]))
            >>> u, v = torch.ones(1, *J.target_shape), torch.ones(1, *J.source_shape)
            >>> torch.allclose((u * J.jvp(v)).sum(), (J.vjp(u) * v).sum(), rtol=1e-3)
            True
        """
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
        """Multiply with a vector or a block, or compose with another Jacobian.

        ``J @ v`` takes v (n,) to (m,), or a block (n, T) to (m, T). ``J2 @ J1`` is the Jacobian that applies J1 first
        and J2 after it. It needs J1's target to be J2's source: the same hook and positions of the same model at the
        same inputs. It is the chain through that hook alone, and the whole Jacobian only where every path passes there,
        as all do at a hook of the residual stream with all positions.

        Raises:
            ValueError: For a vector of another length, or where J1 doesn't end where J2 starts.
            TypeError: Where the right side is neither a tensor nor a Jacobian.
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
        """Find the k largest singular triples, laid out as torch.linalg.svd's.

        Small operators are made dense. Others go through a block Golub–Kahan bidiagonalisation with full
        reorthogonalisation and thick restarts (Golub, Luk and Overton 1981; Baglama and Reichel 2005). It stops when
        every residual ‖Jᵀu − σv‖, a bound on the error of that value, is at most ``tol``·σ or at the dtype's rounding.

        Args:
            k: How many, 0 ≤ k ≤ min(m, n).
            seed: Seed of the random starting block.
            tol: The largest residual relative to its value, by default 1e-9 in float64 and 3e-5 in float32.

        Returns:
            (U (m, k), S (k,) descending, Vh (k, n)), with the signs that the solver arrives at.

        Raises:
            ValueError: For another k, and where products hold NaN or infinity.
            TypeError: Where k is no int.

        Warns:
            RuntimeWarning: Where a residual isn't met; it names the worst one.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]), positions=-1)
            >>> U, S, Vh = J.svd(2)
            >>> U.shape == (J.shape[0], 2), S.shape == (2,), Vh.shape == (2, J.shape[1])
            (True, True, True)
        """
        return truncated_svd(self, k, seed=seed, tol=tol)

    def spectrum(self, k: int, *, seed: int = 0, tol: float | None = None) -> Tensor:
        """Find the k largest singular values, as :meth:`svd` does.

        Args:
            k: How many, 0 ≤ k ≤ min(m, n).
            seed: Seed of the random starting block.
            tol: The largest residual relative to its value, as for :meth:`svd`.

        Returns:
            (k,), descending.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]), positions=-1)
            >>> bool((J.spectrum(4).diff() <= 0).all())
            True
        """
        return self.svd(k, seed=seed, tol=tol)[1]

    def validity_radius(self, V: Tensor) -> ValidityRadius:
        """Find the largest step along each of T tangents that flips no mask.

        Masks count that lie after the source hook and that the target reads, at the tokens that it reads; those in a
        target's function don't. Each tangent costs one forward pass that carries it and two that don't.

        Args:
            V: Tangents at the source, (T, *source_shape).

        Returns:
            ``radius`` (T,) is the largest s such that the source value moved by less than s·V[t] leaves every AbsTopK
            the same kept entries and every ReLU the same signs, to first order: the inputs of masks move along their
            own tangents. It is inf where nothing can flip, as in a transformers model with a smooth activation. The
            model is then run again at steps just inside and just beyond that radius; see
            :class:`scalpel.jacobians.validity.ValidityRadius` for ``first``, ``verified`` and ``flips``.

        Raises:
            ValueError: For a transpose, a composition, or a V that is not finite.
            NotImplementedError: For a model whose masks can't be seen: neither a CircuitGPT, nor a transformers model
                that goes through rules of its own and has a smooth activation.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]))
            >>> valid = J.validity_radius(torch.ones(1, *J.source_shape))
            >>> float(valid.radius[0]) >= 0
            True
        """
        self._check(V, "V", "validity_radius", tuple(self.source_shape))
        return validity_radius(self._source, self._target, self._derived, V)

    def to_dense(self) -> Tensor:
        """Make the matrix, for small cases: it takes min(m, n) products and m·n numbers of memory.

        Returns:
            (m, n), of the operator's dtype and device.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]), "final_resid", "final_resid", positions=-1)
            >>> torch.equal(J.to_dense(), torch.eye(model.config.d_model))
            True
        """
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
        """Give J to SciPy, as a ``scipy.sparse.linalg.LinearOperator`` (m, n) over NumPy arrays.

        It has J's precision, at least float32. Complex vectors give complex products: J(x + iy) = Jx + iJy.
        :class:`scalpel.jacobians.scipy_operator.JacobianLinearOperator` says what it takes and refuses.

        Returns:
            The operator; its products are J's own.

        Example:
            >>> import scalpel, torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> J = scalpel.jacobian(model, torch.tensor([[1, 2, 3]]), positions=-1)
            >>> J.to_scipy().shape == J.shape
            True
        """
        from .scipy_operator import JacobianLinearOperator  # SciPy takes a while to import

        return JacobianLinearOperator(self)

    def _check(self, tangents: Any, name: str, method: str, shape: tuple[int, ...]) -> None:
        if not isinstance(tangents, Tensor):
            raise TypeError(f"{name} is {type(tangents).__name__}; J.{method} takes a torch.Tensor")
        if tangents.dim() != 1 + len(shape) or tuple(tangents.shape[1:]) != shape:
            inside = ", ".join(map(str, ("T", *shape)))
            raise ValueError(
                f"{name} has shape {tuple(tangents.shape)}; J.{method} takes ({inside}"
                f"{',' if not shape else ''}), the T tangents first (one alone: {name}[None])"
            )
        if tangents.dtype.is_complex:
            raise TypeError(
                f"{name} is {tangents.dtype}; this Jacobian is real and takes {self.dtype}: give {name}.real and "
                f"{name}.imag one after the other, or use J.to_scipy(), which takes complex arrays"
            )
        if tangents.dtype != self.dtype:
            raise TypeError(f"{name} is {tangents.dtype}; this Jacobian takes {self.dtype}: {name}.to({self.dtype})")
        if tangents.device != self.device:
            raise ValueError(f"{name} is on {tangents.device}; this Jacobian is on {self.device}: move {name} there")
