"""Exact bounds on a share (C. Clopper and E. Pearson, 1934)."""

__all__ = ["clopper_pearson"]


def clopper_pearson(hits: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Bounds that hold the share with a probability of at least 1 - alpha.

    For several shares at once divide alpha by their number (Bonferroni), and the bounds hold together.

    Args:
        hits: How many of the trials had the outcome whose share is sought.
        trials: How many there were.
        alpha: The probability, at most, that the share lies outside.

    Returns:
        (low, high); (0, 1) without trials.

    Raises:
        ValueError: ``hits`` is not between 0 and ``trials``, or ``alpha`` not between 0 and 1.

    Example:
        >>> from scalpel.semigroup.extraction.bounds import clopper_pearson
        >>> low, high = clopper_pearson(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.308)
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits of {trials} trials; hits run from 0 to the trials")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    if trials == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(hits, trials).proportion_ci(confidence_level=1 - alpha, method="exact")
    return float(interval.low), float(interval.high)
