"""The depth-hand simulator: labels that fit the picture, and the stand-in sensor's noise where it is said to be."""

from __future__ import annotations

import numpy as np
import pytest

from fastsimgan.data.simulators.hands import EVALUATED, MIDDLE, UNITS_PER_MM, simulate_hands
from fastsimgan.errors import InputError


def test_shapes_types_and_the_same_seed_the_same_hands() -> None:
    hands, again = (simulate_hands(5, 3, height=48, width=64) for _ in range(2))
    assert hands["images"].shape == (5, 48, 64) and hands["images"].dtype == np.uint16
    assert hands["joints"].shape == (5, 36, 2) and hands["depths"].shape == (5, 36)
    for key, value in hands.items():
        assert np.array_equal(value, again[key])
    assert not np.array_equal(hands["images"], simulate_hands(5, 4, height=48, width=64)["images"])


def test_the_surface_lies_on_or_before_each_evaluated_joint() -> None:
    hands = simulate_hands(40, 0, height=96, width=96)
    column, row = np.rint(hands["joints"][:, EVALUATED]).astype(int).transpose(2, 0, 1)
    inside = (column >= 0) & (column < 96) & (row >= 0) & (row < 96)
    assert inside.mean() > 0.98
    stored = hands["images"][np.arange(40)[:, None], row.clip(0, 95), column.clip(0, 95)].astype(float)
    surface = (stored - MIDDLE) / UNITS_PER_MM
    assert (stored > 0)[inside].all()
    assert (surface < hands["depths"][:, EVALUATED] + 0.5)[inside].all()


def test_the_sensors_noise_sits_at_edges() -> None:
    from fastsimgan.data.simulators.hands import _render, _sensor

    points = np.zeros((1, 36, 3), np.float32) + np.array([32, 32, 0], np.float32)
    clean = _render(points, 0.5, 64, 64)
    seen = _sensor(np.random.default_rng(0), np.repeat(clean, 20, 0))
    hit = np.isfinite(clean[0])
    edge = hit & ~(np.roll(hit, 1, 0) & np.roll(hit, -1, 0) & np.roll(hit, 1, 1) & np.roll(hit, -1, 1))
    lost = ~np.isfinite(seen)
    assert lost[:, edge].mean() > 0.2 > 0.1 > lost[:, hit & ~edge].mean()


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seed": -1}, {"height": 15}, {"population": "real"}])
def test_bad_arguments_are_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        simulate_hands(**{"count": 1, "seed": 0, **wrong})  # type: ignore[arg-type]
