"""Eyes drawn a second, for both populations, at the paper's 35x55."""

from __future__ import annotations

import pytest

from fastsimgan.data.simulators.eyes import simulate_eyes

COUNT = 2000


@pytest.mark.parametrize("population", ["synthetic", "stand_in_real"])
def test_simulate_eyes(benchmark, population):
    eyes = benchmark.pedantic(
        simulate_eyes, (COUNT, 0), {"population": population}, rounds=5, warmup_rounds=1, iterations=1
    )
    assert eyes["images"].shape == (COUNT, 35, 55)
    if benchmark.stats:  # absent under --benchmark-disable
        benchmark.extra_info["images_per_second"] = round(COUNT / benchmark.stats.stats.median)
