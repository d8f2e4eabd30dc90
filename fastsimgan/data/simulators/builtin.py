"""The built-in pair: synthetic eyes and the simulated stand-in for real ones, at the sizes the demo uses."""

from __future__ import annotations

import numpy as np

from fastsimgan.data.simulators.eyes import population_seed, simulate_eyes

SYNTHETIC, REAL, VALIDATION = 8000, 1500, 1000
"""Images of each population."""

Arrays = dict[str, np.ndarray]


def builtin_pair(seed: int) -> tuple[Arrays, Arrays]:
    """Labelled synthetic eyes, and stand-in real ones whose labels training must not read."""
    return (
        simulate_eyes(SYNTHETIC, population_seed(seed, "synthetic")),
        simulate_eyes(REAL, population_seed(seed, "real_unlabelled"), population="stand_in_real"),
    )


def builtin_validation(seed: int) -> Arrays:
    """Labelled stand-in real eyes to test on, of a seed that no training set shares."""
    return simulate_eyes(VALIDATION, population_seed(seed, "real_validation"), population="stand_in_real")
