"""Welch's interval against published values."""

import pytest

from fastsimgan.metrics.statistics import difference_interval, t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 4, 2.7764451),
        (0.95, 10, 1.8124611),
        (0.995, 30, 2.7499957),
        (0.5, 3, 0.0),
        (0.025, 7.5, -2.3330396),
    ],
)
def test_t_quantile_is_that_of_the_tables(probability: float, freedom: float, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=2e-6)


def test_interval_is_welchs() -> None:
    # scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    a, b = [75.7, 80.7, 62.7, 75.3, 66.7], [38.7, 48.0, 56.7, 57.3, 55.7]
    assert difference_interval(a, b) == pytest.approx((20.9400, 9.76194, 32.11806), abs=1e-4)


def test_results_that_do_not_vary_have_no_width() -> None:
    assert difference_interval([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0, 1.0)
