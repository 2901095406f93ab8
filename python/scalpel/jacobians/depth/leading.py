"""The leading singular triples of a map that is known by its products, from a basis that an earlier search may give.

W has orthonormal columns, and A W = Q R, so that the SVD of the small R gives approximate triples (u, σ, v): u in the
span of Q, v in that of W. Then Aᵀu = σv + r, where r is orthogonal to W (Golub and Kahan 1965), and ‖r‖ bounds the
distance from σ to a true singular value. A step carries back only what the wanted u have gained since the last step,
and carries forward only the few directions outside W along which the r are longest. So a step costs about a
dozen products in each direction, however many values are wanted, and a good W at the start saves most of the steps.

(The search directions are those of block Golub–Kahan bidiagonalisation, :mod:`scalpel.jacobians.svd`, whose blocks
must be as wide as the number of wanted values, and which can't use a basis that isn't a Krylov space of A.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..svd import NotFinite, finite

__all__ = ["OVERSAMPLE", "Found", "Map", "Search", "random_start"]

OVERSAMPLE = 8  # directions beyond T, which speed up the T-th value and resolve clusters (Halko et al. 2011, section 4)
_BLOCK = 12  # the most directions by which a step extends the basis
_WIDEST = 8  # times T + OVERSAMPLE: the columns of W at which it is cut to the leading ones
_KEPT = 3  # times T + OVERSAMPLE: how many are kept then, and for the next search
_PATIENCE = 12  # steps in which the residual must halve, or it counts as stuck
_RANGE = 1e150  # beyond which the squares of singular values might leave the range of float64
_SMALL = 0.1  # the share of the goal below which a direction or a residual is left alone


class Map(Protocol):
    """A linear map A from n to m numbers.

    Attributes:
        eps: The rounding of its products, relative to the largest of them.
        whole: Whether :meth:`read` gives all that :meth:`push` gave.
    """

    eps: float
    whole: bool

    def push(self, block: Tensor) -> Tensor:
        """(n, p) to images (?, p), from which :meth:`read` takes the product, and with which a search may go on."""

    def read(self, images: Tensor) -> Tensor:
        """The products (m, p) in what :meth:`push` gave."""

    def pull(self, block: Tensor) -> Tensor:
        """The transpose's product, (m, p) to (n, p)."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        left: (m, T), the left singular vectors.
        values: (T,) float64, the singular values, descending.
        right: (n, T), the right singular vectors.
        residual: (T,) float64. Its i-th entry is the root of the summed (‖Aᵀu − σv‖ / σ)² of the first i triples,
            which bounds the sine of the largest angle between Aᵀu of these and the basis from which they were
            taken. A value that is zero to rounding adds nothing.
        steps: The number of steps.
        converged: Whether the residual is at most the goal, or as small as the rounding of products allows.
        basis: (n, q), the leading right singular vectors, with which another search may start.
        images: (?, q), the images of the basis, each over its entry of ``scale``.
        scale: (q,) float64.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: Tensor
    steps: int
    converged: bool
    basis: Tensor
    images: Tensor
    scale: Tensor


def random_start(n: int, T: int, seed: int, like: Tensor) -> Tensor:
    """Draw T + ``OVERSAMPLE`` orthonormal columns (n, ·), of the dtype and on the device of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n, T + OVERSAMPLE, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(random.to(like))[0]


class Search:
    """A search for the T largest singular triples of a map.

    Args:
        A: The map.
        T: How many, at most the number of columns of the basis.
        goal: The residual at which it ends; see :class:`Found`.
        floor: The share of the largest value up to which a value counts as zero.
        most: The number of steps after which it ends anyway.
        step: Called with the residual after each step.
    """

    def __init__(
        self,
        A: Map,
        T: int,
        goal: float,
        floor: float,
        most: int,
        step: Callable[[float], None] | None = None,
    ) -> None:
        self.A, self.T, self.goal, self.floor, self.most = A, T, goal, floor, most
        self.step = step or (lambda residual: None)

    def run(self, basis: Tensor, images: Tensor, scale: Tensor) -> Found:
        """Search from a ``basis`` (n, p), whose images are ``images`` with columns multiplied by ``scale`` (p,).

        Raises:
            NotFinite: Where products hold NaN or infinity.
        """
        self.W = basis
        self.work = basis.dtype
        self._begin(images, scale)
        halved, since_halved = math.inf, 0
        for taken in range(1, self.most + 1):
            largest = float(self.R.abs().max())
            if not largest < _RANGE or 0 < largest < 1 / _RANGE:
                raise NotFinite("the products of a search for singular values leave the range of numbers")
            u, sigma, vh = torch.linalg.svd(self.R)
            T = min(self.T, len(sigma))
            left = self.Q @ self._working(u[:, :T])
            zero = sigma[:T] <= self.floor * sigma[0]
            over = torch.where(zero, math.inf, sigma[:T])
            gap = 1.0 if bool(zero.all()) else float(sigma[:T][~zero].min() / sigma[0])
            missed = self._pull_gained(left, gap)
            outside = self.D @ (self.P.T @ left).cpu().double() / over
            each = torch.linalg.vector_norm(outside, dim=0) + missed * sigma[0] / over
            residual = each.square().cumsum(0).sqrt()
            # no residual can fall below the rounding of the map's own products
            above = each * sigma[:T] > 30 * self.A.eps * sigma[0]
            worst = float(torch.linalg.vector_norm(each[above]))
            self.step(worst)
            since_halved += 1
            if worst < halved / 2:
                halved, since_halved = worst, 0
            if worst <= self.goal or since_halved >= _PATIENCE or taken == self.most:
                break
            if len(sigma) >= _WIDEST * (self.T + OVERSAMPLE):
                self._cut(u, sigma, vh)
            else:
                self._extend(outside)
        kept = min(len(sigma), _KEPT * (self.T + OVERSAMPLE))
        images, scale = self._rotated(u, sigma, vh, kept)
        right = self.W @ self._working(vh[:kept].T)
        return Found(left, sigma[:T], right[:, :T], residual, taken, worst <= self.goal, right, images, scale)

    def _begin(self, images: Tensor, scale: Tensor) -> None:
        """Take the images of the basis, and forget what was carried back."""
        self.images = images
        self.scale = scale
        Q, R = torch.linalg.qr(finite(self.A.read(images)))
        self.Q, self.R = Q, R.cpu().double() * scale
        # P: the left vectors that were carried back. Their images are a part in W, and N D outside it.
        self.P, self.N = Q[:, :0], self.W[:, :0]
        self.D = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    def _pull_gained(self, left: Tensor, gap: float) -> float:
        """Carry back what ``left`` has outside P. Returns how much of a vector of ``left`` is still outside.

        ``gap`` is the smallest wanted value over the largest one.
        """
        gained = left - self.P @ (self.P.T @ left)
        gained = gained - self.P @ (self.P.T @ gained)
        q, r = torch.linalg.qr(gained)
        rotation, sizes, _ = torch.linalg.svd(r.cpu().double())
        enough = _SMALL * max(self.goal, self.A.eps) * gap
        count = int((sizes > enough).sum())
        if count:
            new = q @ self._working(rotation[:, :count])
            pulled = finite(self.A.pull(new))
            for _ in range(2):
                pulled = pulled - self.W @ (self.W.T @ pulled)
            overlap, N, R = _orthonormal(pulled, self.N)
            above = torch.cat([self.D, overlap], dim=1)
            below = torch.cat([torch.zeros(len(R), self.D.shape[1], dtype=torch.float64, device="cpu"), R], dim=1)
            self.D = torch.cat([above, below])
            self.N, self.P = torch.cat([self.N, N], dim=1), torch.cat([self.P, new], dim=1)
        return float(sizes[count]) if count < len(sizes) else 0.0

    def _extend(self, outside: Tensor) -> None:
        """Extend W by the directions of N along which the residuals, ``outside``, are longest."""
        rotation, sizes, _ = torch.linalg.svd(outside)
        count = max(1, min(_BLOCK, int((sizes > _SMALL * self.goal).sum())))
        new = self.N @ self._working(rotation[:, :count])
        rest = rotation[:, count:]
        remaining, self.D = self.N @ self._working(rest), rest.T @ self.D
        rotation, sizes, right = torch.linalg.svd(self.D, full_matrices=False)
        rank = int((sizes > self.A.eps * sizes[0]).sum()) if len(sizes) else 0
        self.N, self.D = remaining @ self._working(rotation[:, :rank]), sizes[:rank, None] * right[:rank]
        _, new, _ = _orthonormal(new, self.W)
        images = self.A.push(new)
        overlap, Q, R = _orthonormal(finite(self.A.read(images)), self.Q)
        above = torch.cat([self.R, overlap], dim=1)
        below = torch.cat([torch.zeros(len(R), self.R.shape[1], dtype=torch.float64, device="cpu"), R], dim=1)
        self.R = torch.cat([above, below])
        self.Q, self.W = torch.cat([self.Q, Q], dim=1), torch.cat([self.W, new], dim=1)
        if not self.A.whole:
            self.images = torch.cat([self.images, images], dim=1)
            self.scale = torch.cat([self.scale, torch.ones(count, dtype=torch.float64, device="cpu")])

    def _cut(self, u: Tensor, sigma: Tensor, vh: Tensor) -> None:
        """Cut W to the leading right singular vectors, and begin again from these."""
        kept = _KEPT * (self.T + OVERSAMPLE)
        images, scale = self._rotated(u, sigma, vh, kept)
        self.W = torch.linalg.qr(self.W @ self._working(vh[:kept].T))[0]
        self._begin(images, scale)

    def _rotated(self, u: Tensor, sigma: Tensor, vh: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The images of the leading right singular vectors, and the scale of each."""
        if self.A.whole:
            return self.Q @ self._working(u[:, :count]), sigma[:count]
        scale = torch.where(sigma[:count] > 0, sigma[:count], 1.0)
        return self.images @ self._working(self.scale[:, None] * vh[:count].T / scale), scale

    def _working(self, small: Tensor) -> Tensor:
        """A small float64 tensor on the CPU in the dtype and on the device of the blocks."""
        return small.to(self.W.device, self.work)


def _orthonormal(X: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find C, Q and R with X = basis C + Q R, where [basis, Q] is orthonormal; C and R are float64 on the CPU."""
    C = basis.T @ X
    X = X - basis @ C
    # a second projection removes what rounding left of the first; two are enough (Parlett 1998)
    correction = basis.T @ X
    Q, R = torch.linalg.qr(X - basis @ correction)
    # where little was left of a column, its direction is rounding, and not yet orthogonal to the basis
    Q, triangle = torch.linalg.qr(Q - basis @ (basis.T @ Q))
    return (C + correction).cpu().double(), Q, triangle.cpu().double() @ R.cpu().double()
