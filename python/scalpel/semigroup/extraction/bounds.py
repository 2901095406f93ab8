"""Exact bounds on a share (C. Clopper and E. Pearson, 1934)."""

from scipy.stats import beta

__all__ = ["clopper_pearson"]


def clopper_pearson(hits: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Compute bounds that contain the true share with a probability of at least 1 - alpha; (0, 1) without trials.

    For several shares at once, divide alpha by their number (Bonferroni); then all bounds hold together.

    Raises:
        ValueError: If hits or alpha is out of range.
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits of {trials} trials; hits run from 0 to the trials")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    if trials == 0:
        return 0.0, 1.0
    low = 0.0 if hits == 0 else float(beta.ppf(alpha / 2, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - alpha / 2, hits + 1, trials - hits))
    return low, high
