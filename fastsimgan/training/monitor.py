"""Signs that training is going nowhere, said once each time they appear."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import fmean

WINDOW = 100
"""Iterations that are averaged before anything is said."""

_ACCURACY = (0.52, 0.98)  # D's patch accuracy, mean of real and refined
_CHANGE = (1.0, 60.0)  # mean |R(x) - x| in grey levels


class TrainingMonitor:
    """Watches the averages of the last `WINDOW` iterations and speaks when one leaves its band, and not again until
    it has been back inside.

    Args:
        log: called with each warning, one line that says what to try.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._accuracy: deque[float] = deque(maxlen=WINDOW)
        self._change: deque[float] = deque(maxlen=WINDOW)
        self._outside: set[str] = set()

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the metrics of one iteration."""
        self._accuracy.append((metrics["accuracy_refined"] + metrics["accuracy_real"]) / 2)
        self._change.append(metrics["change"])
        if len(self._change) < WINDOW:
            return
        accuracy, change = fmean(self._accuracy), fmean(self._change)
        self._judge(
            step,
            "D tells refined from real too easily",
            accuracy > _ACCURACY[1],
            f"right on {accuracy:.1%} of patches (band up to {_ACCURACY[1]:.0%}): R gets little to learn from; "
            "lower --learning-rate-discriminator or --lambda, or raise --k-g",
        )
        self._judge(
            step,
            "D cannot tell refined from real",
            accuracy < _ACCURACY[0],
            f"right on {accuracy:.1%} of patches (band from {_ACCURACY[0]:.0%}): "
            "either R has won or D is not learning; look at the contact sheet, "
            "raise --learning-rate-discriminator or --k-d",
        )
        self._judge(
            step,
            "R does almost nothing",
            change < _CHANGE[0],
            f"mean |R(x) - x| is {change:.2f} grey levels (floor {_CHANGE[0]:g}): lower --lambda",
        )
        self._judge(
            step,
            "R changes a great deal",
            change > _CHANGE[1],
            f"mean |R(x) - x| is {change:.1f} grey levels (ceiling {_CHANGE[1]:g}): labels may not survive; "
            "raise --lambda",
        )

    def _judge(self, step: int, name: str, outside: bool, why: str) -> None:
        if outside and name not in self._outside:
            self._log(f"warning: iteration {step}: {name}: {why}")
        (self._outside.add if outside else self._outside.discard)(name)
