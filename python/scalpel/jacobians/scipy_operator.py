"""A Jacobian as SciPy takes it: products with NumPy arrays, real or complex."""

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from .linear_map import LinearMap

__all__ = ["JacobianLinearOperator"]


class JacobianLinearOperator(LinearOperator):
    """``J`` of shape (m, n) for SciPy's solvers; ``dtype`` is real, float64 or float32.

    A complex vector x + iy gives Jx + iJy, a complex array of the same precision, since J is real. Integers and
    booleans are numbers here as in NumPy. Vectors of a wider type are rounded to J's.

    TypeError for arrays that don't hold numbers (objects, texts, dates); ValueError for numbers that are finite and
    lie beyond the range of J's dtype.
    """

    def __init__(self, J: LinearMap) -> None:
        self.J = J
        self._carried = torch.promote_types(J.dtype, torch.float32)
        super().__init__(np.dtype(np.float64 if self._carried == torch.float64 else np.float32), J.shape)

    def _matvec(self, x: Any) -> Any:
        return self._product(self.J, x)

    def _matmat(self, X: Any) -> Any:
        return self._product(self.J, X)

    def _rmatvec(self, x: Any) -> Any:
        return self._product(self.J.T, x)

    def _rmatmat(self, X: Any) -> Any:
        return self._product(self.J.T, X)

    def _product(self, operator: LinearMap, vector: Any) -> Any:
        """``operator @ vector`` for an array (n,) or (n, T); with a complex one, both parts go in one block."""
        array = np.asarray(vector)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"the vector is an array of {array.dtype}; a Jacobian multiplies real or complex numbers")
        if array.dtype.kind != "c":
            return self._real(operator, array)
        block = array[:, None] if array.ndim == 1 else array
        real, imaginary = np.split(self._real(operator, np.hstack([block.real, block.imag])), 2, axis=1)
        out = np.empty(real.shape, dtype=np.result_type(real, np.complex64))
        out.real, out.imag = real, imaginary  # not real + 1j * imaginary, in which an infinity makes a NaN
        return out[:, 0] if array.ndim == 1 else out

    def _real(self, operator: LinearMap, array: Any) -> Any:
        with np.errstate(over="ignore"):  # what overflows is refused below
            cast = np.array(array, dtype=self.dtype)  # a copy, whose strides are those that torch takes
        block = torch.from_numpy(cast).to(operator.device, operator.dtype)
        lost = np.isfinite(array) & ~block.isfinite().cpu().numpy()
        if lost.any():
            limit = torch.finfo(operator.dtype).max
            raise ValueError(
                f"the vector holds {array[lost][0]}, and J computes in {operator.dtype}, whose largest number is "
                f"{limit:.4g}; J is linear, so scale the vector down and its product up, or take the Jacobian of the "
                "model in float64"
            )
        return (operator @ block).to(self._carried).cpu().numpy()
