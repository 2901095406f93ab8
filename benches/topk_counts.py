"""How often a row is counted until its k-th largest key is found.

The search of csrc/topk/topk_row_cuda.h, written in numpy, is compared with bisection. `python benches/topk_counts.py`
prints the mean and the largest number of counts over kinds of rows, widths and k. It says nothing about time, which
needs a GPU; the number of counts is what the search of a row costs there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WIDTHS = (512, 2048, 16384, 65536)
REPEATS = 16
RNG = np.random.default_rng(0)
ROWS: dict[str, Callable[[int], np.ndarray]] = {
    "normal": RNG.standard_normal,
    "Cauchy": RNG.standard_cauchy,
    "uniform": RNG.random,
    "half zero": lambda n: np.maximum(RNG.standard_normal(n), 0),
    "2 % outliers": lambda n: RNG.standard_normal(n) * np.where(RNG.random(n) < 0.02, 1e6, 1.0),
    "swish": lambda n: (lambda x: x / (1 + np.exp(-1.7 * x)))(RNG.standard_normal(n)),
    "82 % zero": lambda n: np.maximum(RNG.standard_normal(n) - 0.9, 0),
    "four massive": lambda n: np.where(np.arange(n) < 4, 1e4, RNG.standard_normal(n)),
    "integers 0-3": lambda n: RNG.integers(0, 4, n).astype(float),
    "quarters": lambda n: np.round(RNG.standard_normal(n) * 4) / 4,
}


def keys(x: np.ndarray, bits: int) -> np.ndarray:
    """The integers by which float32, or bfloat16, represents the magnitudes, sorted."""
    return np.sort((x.astype(np.float32).view(np.uint32) & 0x7FFFFFFF) >> (32 - bits)).astype(np.int64)


def search(row: np.ndarray, k: int, guess: bool) -> int:
    """The number of counts until exactly k keys are count, or one key is left.

    With ``guess`` it searches as the kernel does, without by halving. Looking at which keys are left counts as two.
    """
    low, high, from_low, above = int(row[0]), int(row[-1]), len(row), 0
    before, guessed, step, looks = 0, False, 0, 0
    while low < high and from_low != k:
        step += 1
        if guess and step % 10 == 0:
            left = row[(row >= low) & (row <= high)]
            low, high, looks = int(left[0]), int(left[-1]), looks + 1
            if low == high:
                step -= 1
                break
        size = high - low
        guessed, before = not (guessed and size > before // 2), size
        wanted = (k**0.5 + (k - 1) ** 0.5) / 2
        part = (from_low**0.5 - wanted) / (from_low**0.5 - above**0.5) if guessed else 0.5
        key = min(max(low + 1 + int(part * size), low + 1), high) if guess else low + size // 2 + 1
        count = len(row) - int(np.searchsorted(row, key))
        if count >= k:
            low, from_low = key, count
        else:
            high, above = key - 1, count
    return step + 2 * looks


def main() -> None:
    print("counts, mean (most)   guessed         halved")
    for bits, name in ((32, "float32"), (16, "bfloat16")):
        for kind, draw in ROWS.items():
            counts = np.array(
                [
                    [search(row, k, guess) for guess in (True, False)]
                    for width in WIDTHS
                    for k in (width // 4, round(0.06 * width), 64, 32)
                    for row in (keys(draw(width), bits) for _ in range(REPEATS))
                ]
            )
            (guessed, halved), (most, most_halved) = counts.mean(0), counts.max(0)
            print(f"{name:9} {kind:12} {guessed:6.1f} ({most:2})     {halved:6.1f} ({most_halved:2})")


if __name__ == "__main__":
    main()
