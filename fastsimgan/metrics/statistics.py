"""How sure a result is: intervals of means and of shares, and what guessing would give. By SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsimgan.errors import InputError, UnavailableError


def difference_interval(
    first: Sequence[float], second: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``first`` minus mean of ``second``, and its confidence interval by Welch's t.

    Args:
        first, second: independent results, at least two of each, such as one a seed; their spreads may differ.
        level: share of intervals that hold the true difference, in (0, 1).

    Returns:
        The difference, the interval's low and its high end. Where neither side varies, all three are one number.

    Raises:
        UnavailableError: SciPy is not installed.
    """
    difference = float(np.mean(first) - np.mean(second))
    parts = [float(np.var(each, ddof=1)) / len(each) for each in (first, second)]
    if sum(parts) == 0:
        return difference, difference, difference
    # not scipy.stats.ttest_ind, which warns of lost precision where one side hardly varies
    freedom = sum(parts) ** 2 / sum(p**2 / (len(each) - 1) for p, each in zip(parts, (first, second), strict=True))
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(sum(parts))
    return difference, difference - half, difference + half


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for ``freedom`` > 0 degrees. Raises UnavailableError without SciPy."""
    return float(_scipy_stats().t.ppf(probability, freedom))


def wilson_interval(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share ``right / count``. Raises UnavailableError without SciPy."""
    low, high = _scipy_stats().binomtest(right, count).proportion_ci(level, "wilson")
    return float(low), float(high)


def binomial_p(right: int, total: int) -> float:
    """P(at least ``right`` of ``total``) by tossing a coin: one-sided and exact, to 12 digits.

    Raises InputError unless 0 <= right <= total and total >= 1, and UnavailableError without SciPy.
    """
    if not 0 <= right <= total or total < 1:
        raise InputError(f"right must be from 0 to total, and total at least 1, got {right} of {total}")
    return float(_scipy_stats().binomtest(right, total, 0.5, "greater").pvalue)


def check_scipy() -> None:
    """Raise UnavailableError if SciPy is not installed."""
    _scipy_stats()


def _scipy_stats() -> Any:
    """scipy.stats, which takes a second to import: only who asks for an interval pays."""
    try:
        from scipy import stats
    except ImportError as error:
        raise UnavailableError(f"intervals need SciPy: pip install scipy ({error})") from error
    return stats
