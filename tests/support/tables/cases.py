"""The cases that every op runs on every target (tests/unit/topk/test_cases.py), and the hard rows behind them.

``tolerance`` is the largest allowed difference from the twin in reference/, relative to the twin's largest entry; 0
means equal to the bit.
"""

from dataclasses import dataclass

import torch

from scalpel import _core

# Kernels that a target borrows from another target.
COMPILED_FOR = {(op, "avx512vbmi2"): "avx512" for op in ("covariance", "jvp")}  # these ops never compress lanes

# The CPU targets that run here.
SUPPORTED = [target["name"] for target in _core.targets() if target["supported"]]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tolerance: float

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op}-{shape}-{str(self.dtype).removeprefix('torch.')}"


TOPK_SHAPES = [(7,), (1, 1), (3, 64), (5, 257), (2, 3, 40), (0, 4), (4, 0), (1, 5000), (600, 33)]
# A bound on the rounding of float32 products. Two deviations, a product and 128 sums of products are each rounded by at
# most 2^-24 of Σ |d_i| |d_j|, which is below n times the largest variance.
FLOAT32_SUMS = 131 * 2.0**-24
COVARIANCE_SHAPES = [(1, 1), (9, 1), (1, 5), (300, 16), (257, 33), (3, 40, 17), (700, 100)]

COVARIANCE_OPS = ("covariance", "second_moment")
TOPK_OPS = ("topk_mask", "keep_topk", "topk_indices")

CASES = [
    # Each shape and dtype gets one of the ops in turn, so that every op meets every shape and every dtype. One op per
    # case is enough because the three share their selection; test_topk.py runs all of them on every row that is hard to
    # select from.
    *(
        Case(TOPK_OPS[(i + j) % 3], shape, dtype, 0.0)
        for i, shape in enumerate(TOPK_SHAPES)
        for j, dtype in enumerate(DTYPES)
    ),
    # The two ops also take turns: they share the products, and differ only in whether a mean is subtracted.
    *(
        Case(COVARIANCE_OPS[(i + j) % 2], shape, dtype, 1e-13 if dtype == torch.float64 else FLOAT32_SUMS)
        for i, shape in enumerate(COVARIANCE_SHAPES)
        for j, dtype in enumerate(DTYPES)
    ),
]


def hard_rows(width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Named rows (width,) that are hard for a selection."""
    g = torch.Generator().manual_seed(width)
    normal = torch.randn(width, generator=g, dtype=torch.float64)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal number
    signs = torch.randint(0, 2, (width,), generator=g) * 2.0 - 1.0
    places = torch.arange(width)

    def pick(*values: float) -> torch.Tensor:
        choice = torch.randint(0, len(values), (width,), generator=g)
        return torch.tensor(values, dtype=torch.float64)[choice]

    rows = {
        "normal": normal,
        "all equal": torch.full((width,), 1.5),
        "all zero": torch.zeros(width),
        "signed zeros": pick(0.0, -0.0),
        "signed zeros and tiny": pick(0.0, -0.0, smallest, -smallest),
        "denormals": signs * smallest * torch.randint(1, 9, (width,), generator=g),
        "largest and smallest": pick(info.max, info.min, smallest, -smallest, info.smallest_normal),
        "two values": pick(1.0, -2.0),
        "same size, both signs": signs * 3.0,
        "ascending": places.double(),
        "descending": -places.double(),
        "one outlier": torch.where(places == width // 2, torch.tensor(1e4), normal * 1e-3),
        "repeated threshold": torch.where(places % 3 == 0, torch.tensor(0.5), normal),
        "nan": torch.where(places % 5 == 2, torch.tensor(float("nan")), normal),
        "all nan": torch.full((width,), float("nan")),
        "infinities": pick(float("inf"), float("-inf"), 0.0, 1.0),
        "everything": pick(float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, smallest),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def interesting_ks(width: int) -> list[int]:
    """The values of k at both ends of its range, next to them, and in the middle."""
    wanted = {0, 1, 2, 3, width // 16, width // 4, width // 2, width - 2, width - 1, width}
    return sorted(k for k in wanted if 0 <= k <= width)
