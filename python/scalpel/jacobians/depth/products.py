"""The leading singular values of the products of the first layers of a chain, at several depths.

The depths share their work: a basis of leading right singular vectors, and its images at the present depth, are carried
from depth to depth, so that a search (:mod:`.leading`) begins with what the previous one found. A product that has few
dimensions, or values that are too far apart for the dtype, is left to the sweeps of :mod:`.sweeps`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._integers import integer
from ...hooks.positions import Selected
from ..operator import Jacobian
from ..svd import NotFinite, is_small
from .layers import chain_of, restricted
from .leading import Found, Search, random_start
from .sweeps import ROUNDING, Sweeps, SweptProduct, tail_energy

__all__ = [
    "DEPTHS",
    "Product",
    "Step",
    "Triples",
    "depths_of",
    "layer_triples",
    "measure_products",
    "product_tails",
]

DEPTHS = 12  # the most depths at which products are measured unless more are asked for
_STEPS = 100  # the most steps for the values of a single layer
_FAR = 300  # times eps: the rounding, relative to the largest value, of the products that a search sees

Step = Callable[[str, float], None]


@dataclass
class Product(SweptProduct):
    """The leading singular values of the product of the first ``depth`` layers.

    Attributes:
        depth: How many layers.
        left: (m, T), the left singular vectors; None where sweeps found the values.
    """

    depth: int
    left: Tensor | None = None


def depths_of(cumulative: bool | int | Sequence[int], layers: int) -> list[int]:
    """Return the depths at which spectra of products are wanted: evenly spread, the last one always among them.

    Args:
        cumulative: True for at most ``DEPTHS`` depths, an int for that many, a list for its depths, False for none.
        layers: The number of layers.

    Raises:
        ValueError: For a number below 1, or a depth that the model doesn't have.
        TypeError: For anything else.
    """
    if isinstance(cumulative, bool):
        return _spread(DEPTHS, layers) if cumulative else []
    if not isinstance(cumulative, int) and isinstance(cumulative, Sequence):
        depths = sorted({integer(depth, "a depth of cumulative") for depth in cumulative} | {layers})
        if depths[0] < 1 or depths[-1] > layers:
            raise ValueError(
                f"cumulative is {list(cumulative)}; the model has {layers} layers: give depths from 1 to {layers}"
            )
        return depths
    count = integer(cumulative, "cumulative")
    if count < 1:
        raise ValueError(f"cumulative is {count}; give how many depths, 1 or more, or False for none")
    return _spread(count, layers)


def _spread(count: int, layers: int) -> list[int]:
    count = min(count, layers)
    return [layers * (i + 1) // count for i in range(count)]


# ---- a layer by itself ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Triples:
    """The T leading singular triples of a layer: U (m, T), S (T,), Vh (T, n), and what is known of their error.

    Attributes:
        residual: As :attr:`.leading.Found.residual`, its last entry; 0 for a dense decomposition.
        converged: Whether it is at most the goal.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: float
    converged: bool


def layer_triples(J: Jacobian, T: int, seed: int, goal: float) -> Triples:
    """Find the T leading singular triples of a layer by itself."""
    if is_small(J.shape, T):
        return Triples(*J.svd(T, seed=seed), 0.0, True)
    A = _Through([J], None)
    start = random_start(J.shape[1], T, seed, J.primal)
    scale = torch.ones(start.shape[1], dtype=torch.float64, device="cpu")
    found = Search(A, T, goal, ROUNDING * A.eps, _STEPS).run(start, A.push(start), scale)
    values = found.values.to(start)
    return Triples(found.left, values, found.right.T, float(found.residual[-1]), found.converged)


class _Through:
    """The product of a chain of operators, read at chosen tokens of its end."""

    def __init__(self, chain: list[Jacobian], at: Selected) -> None:
        self.chain, self.at = chain, at
        self.eps = float(torch.finfo(chain[0].dtype).eps)
        self.whole = at is None

    def push(self, block: Tensor) -> Tensor:
        return through(self.chain, block)

    def read(self, images: Tensor) -> Tensor:
        if self.at is None:
            return images
        shape = self.chain[-1].target_shape
        return images.reshape(*shape, -1)[:, list(self.at)].reshape(-1, images.shape[1])

    def pull(self, block: Tensor) -> Tensor:
        if self.at is not None:
            shape = self.chain[-1].target_shape
            full = block.new_zeros(*shape, block.shape[1])
            full[:, list(self.at)] = block.reshape(shape[0], len(self.at), *shape[2:], -1)
            block = full.reshape(-1, block.shape[1])
        return through([J.T for J in reversed(self.chain)], block)


def through(chain: list[Jacobian], block: Tensor) -> Tensor:
    """Carry the columns of ``block`` (n, p) through a chain of operators."""
    if block.shape[1] == 0:
        return block.new_zeros(chain[-1].shape[0], 0)
    tangents = block.T.contiguous()
    for J in chain:
        tangents = J.jvp(tangents.reshape(-1, *J.source_shape))
    return tangents.reshape(block.shape[1], -1).T


# ---- products ------------------------------------------------------------------------------------


def measure_products(
    layers: list[Jacobian],
    at: Selected,
    identity: bool,
    T: int,
    depths: Sequence[int],
    *,
    seed: int,
    goal: float,
    most: int,
    step: Step | None = None,
) -> list[Product]:
    """Measure the products of the first layers at each of the ``depths``, in ascending order.

    Args:
        layers: The layers' Jacobians between all tokens.
        at: The tokens at both ends of a product; None for all.
        identity: Whether a layer includes the residual path.
        T: How many singular values.
        depths: The numbers of layers.
        seed: Seed of the starting directions.
        goal: The residual that counts as converged.
        most: The most steps or sweeps for one product.
        step: Called as ``step(what, done)`` before each depth, with ``done`` from 0 to 1.
    """
    walk = _Walk(layers, at, identity, T, seed)
    work, done, products = sum(depths), 0, []
    for depth in depths:
        if step is not None:
            step(f"product of {depth} of {len(layers)} layers", done / work)
        products.append(walk.product(depth, goal, most))
        done += depth
    return products


class _Walk:
    """What is carried from depth to depth."""

    def __init__(self, layers: list[Jacobian], at: Selected, identity: bool, T: int, seed: int) -> None:
        self.layers, self.at, self.identity, self.T, self.seed = layers, at, identity, T, seed
        # layers of a product, of which only the first is restricted, since all tokens take part between its ends
        self.inner = [restricted(J, at if i == 0 else None, None, identity) for i, J in enumerate(layers)]
        self.n = self.inner[0].shape[1]
        self._carried: tuple[int, Tensor, Tensor, Tensor] | None = None  # depth, basis, images, scale
        self._dense: tuple[int, Tensor] | None = None  # depth, images of all unit vectors

    def product(self, depth: int, goal: float, most: int) -> Product:
        chain = chain_of(self.layers[:depth], self.at, self.identity)
        start = None
        sweeps = Sweeps(chain, self.T, self.seed)
        if is_small((self.n,), self.T):
            start = self._dense_start(depth)
        elif not is_small(chain[-1].shape, self.T):
            try:
                found = self._search(depth, goal, most)
            except NotFinite:
                self._carried = None
                start = torch.zeros(self.n, 0, dtype=torch.float64, device=chain[0].device)
            else:
                if not self._too_far(found, goal):
                    return self._product(chain, found, goal)
                start = found.right.double()
        swept = sweeps.solve(goal, most, start)
        return Product(**vars(swept), depth=depth)

    def _too_far(self, found: Found, goal: float) -> bool:
        """Whether values are so far apart that rounding hides the smallest, or whether it has converged."""
        eps = float(torch.finfo(found.right.dtype).eps)
        if found.residual[-1] <= goal:
            return bool(found.values[-1] <= ROUNDING * eps * found.values[0])
        return bool(found.values[-1] * goal <= _FAR * eps * found.values[0])

    def _product(self, chain: list[Jacobian], found: Found, goal: float) -> Product:
        right = found.right.T.reshape(self.T, *chain[0].source_shape)
        logs = found.values.log()
        converged = bool(found.residual[-1] <= goal)
        return Product(chain, logs, right, found.residual, found.steps, converged, len(chain), found.left)

    def _search(self, depth: int, goal: float, most: int) -> Found:
        """Search from what is carried, which is taken through the layers up to ``depth`` first."""
        A = _Through(self.inner[:depth], self.at)
        if self._carried is None:
            basis = random_start(self.n, self.T, self.seed, self.layers[0].primal)
            self._carried = 0, basis, basis, torch.ones(basis.shape[1], dtype=torch.float64, device="cpu")
        before, basis, images, scale = self._carried
        images = through(self.inner[before:depth], images)
        found = Search(A, self.T, goal, ROUNDING * A.eps, most).run(basis, images, scale)
        self._carried = depth, found.basis, found.images, found.scale
        return found

    def _dense_start(self, depth: int) -> Tensor:
        """The leading right singular vectors of the product as a matrix, whose images of unit vectors are carried.

        They need not be accurate, since sweeps improve them.
        """
        if self._dense is None:
            self._dense = 0, torch.eye(self.n, dtype=self.layers[0].dtype, device=self.layers[0].device)
        before, images = self._dense
        images = through(self.inner[before:depth], images)
        self._dense = depth, images
        matrix = _Through(self.inner[:depth], self.at).read(images)
        if not bool(matrix.isfinite().all()):  # it leaves the dtype's range, which the sweeps avoid by scaling
            return torch.zeros(self.n, 0, dtype=torch.float64, device=images.device)
        return torch.linalg.svd(matrix, full_matrices=False)[2][: self.T].T.double()


def product_tails(
    layers: list[Jacobian],
    at: Selected,
    identity: bool,
    products: list[Product],
    probes: int,
    generator: torch.Generator,
) -> list[list[float]]:
    """Estimate, for each product, what :func:`.sweeps.tail_energy` does, with one block of probes for all depths.

    The probes go through the layers once. What they have along the known triples is subtracted at each depth, which
    costs no product. That leaves rounding of about eps² of the summed squares of all values.
    """
    inner = [restricted(J, at if i == 0 else None, None, identity) for i, J in enumerate(layers)]
    n, device = inner[0].shape[1], layers[0].device
    signs = torch.randint(0, 2, (n, probes), generator=generator, dtype=torch.float64, device="cpu").to(device) * 2 - 1
    images, log_scale, before = signs.to(layers[0].dtype), 0.0, 0
    energies = []
    for product in products:
        if product.left is None:
            energies.append(tail_energy(product.chain, product.right.flatten(1), probes, generator))
            continue
        for J in inner[before : product.depth]:
            images = through([J], images)
            largest = float(images.abs().max())
            if largest > 0:
                images, log_scale = images / largest, log_scale + math.log(largest)
        before = product.depth
        A = _Through(inner[: product.depth], at)
        along = product.right.flatten(1).double() @ signs
        known = product.left.double() @ ((product.logs - log_scale).exp().to(device)[:, None] * along)
        rest = A.read(images).double() - known
        ratios = (rest.square().sum(dim=0).cpu().log() + 2 * (log_scale - float(product.logs[0]))).exp()
        error = float(ratios.std()) / math.sqrt(probes) if probes > 1 else math.inf
        energies.append([float(ratios.mean()), error])
    return energies
