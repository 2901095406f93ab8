"""Products of layers with known singular values: networks of given matrices, and small models made dense."""

from itertools import pairwise

import torch
from torch import Tensor, nn

import scalpel
from scalpel import CircuitGPT, jacobian, lyapunov
from scalpel.jacobians.operator import Jacobian
from scalpel.reference.jacobian import jacobian_dense


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def network(*matrices: Tensor) -> tuple[nn.Sequential, Tensor, list[str]]:
    """A chain of linear layers, an input, and the hooks between its layers."""
    layers = []
    for matrix in matrices:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
        with torch.no_grad():
            layer.weight.copy_(matrix)
        layers.append(layer)
    x = torch.zeros(1, matrices[0].shape[1], dtype=matrices[0].dtype)
    return nn.Sequential(*layers), x, ["0:in", *(str(i) for i in range(len(matrices)))]


def exponents_of(T: int, *matrices: Tensor, **options) -> scalpel.jacobians.depth.lyapunov.Lyapunov:
    model, x, hooks = network(*matrices)
    return lyapunov(model, x, T, hooks=hooks, **options)


def operators(matrices: list[Tensor]) -> list[Jacobian]:
    found = []
    for matrix in matrices:
        model, x, _ = network(matrix)
        found.append(jacobian(model, x, "0:in", "0"))
    return found


def stream(model: CircuitGPT) -> list[str]:
    return [f"{i}.resid_in" for i in range(model.config.n_layer)] + ["final_resid"]


def dense_layers(model: CircuitGPT, ids: Tensor, identity: bool) -> list[Tensor]:
    names = stream(model)
    found = [jacobian_dense(model, ids, a, b) for a, b in pairwise(names)]
    return found if identity else [J - torch.eye(len(J), dtype=J.dtype) for J in found]


def dense_product(layers: list[Tensor]) -> Tensor:
    product = torch.eye(layers[0].shape[1], dtype=torch.float64)
    for layer in layers:
        product = layer @ product
    return product


def at_tokens(matrix: Tensor, chosen: list[int], length: int, width: int) -> Tensor:
    """The rows and columns of a matrix (B·L·width) that belong to the chosen tokens."""
    kept = torch.zeros(len(matrix) // (length * width), length, width, dtype=torch.bool)
    kept[:, chosen] = True
    return matrix[kept.flatten()][:, kept.flatten()]


def logs(matrix: Tensor, T: int) -> Tensor:
    return torch.linalg.svdvals(matrix)[:T].log()


def effective_rank(s: Tensor, power: int = 1) -> Tensor:
    return torch.special.entr(s**power / (s**power).sum()).sum().exp()
