"""How sure a difference of two means is: Welch's t, for a handful of seeds whose spreads differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def difference_interval(
    first: Sequence[float], second: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``first`` minus mean of ``second``, and its confidence interval by Welch's t.

    Args:
        first, second: independent results, at least two of each, such as one a seed.
        level: share of intervals that hold the true difference, in (0, 1).

    Returns:
        The difference, the interval's low and its high end. Where neither side varies, all three are one number.
    """
    difference = float(np.mean(first) - np.mean(second))
    parts = [float(np.var(each, ddof=1)) / len(each) for each in (first, second)]
    if sum(parts) == 0:
        return difference, difference, difference
    freedom = sum(parts) ** 2 / sum(p**2 / (len(each) - 1) for p, each in zip(parts, (first, second), strict=True))
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(sum(parts))
    return difference, difference - half, difference + half


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for ``freedom`` >= 1 degrees, to six digits for probabilities of 0.001 to 0.999."""
    # With t = √ν tan(a) the density is cos(a)^(ν-1), smooth on (-π/2, π/2).
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(probability, total / total[-1], angles))
