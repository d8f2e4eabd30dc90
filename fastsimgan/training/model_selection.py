"""The best refiner of a run, by numbers that need no label: how real its images look, and how true labels stay."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from fastsimgan.data.pixel_values import UNIT, from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.data.ragged import CentreCrops
from fastsimgan.errors import TrainingError
from fastsimgan.inference.refiner import Refiner
from fastsimgan.metrics.features import random_features
from fastsimgan.metrics.label_drift import describe, label_drift
from fastsimgan.metrics.realism import kernel_distance
from fastsimgan.training.state import TrainingState

_REAL = 2000  # real images that refined ones are compared with
_BATCH = 64

Array = np.ndarray[Any, Any]


class ModelSelector:
    """Evaluates the refiner now and then, and keeps the best: of those whose drift is within the limit, lowest KID.

    The same synthetic images each time (`some_synthetic`) against at most 2,000 real ones, in the features of a fixed
    random convolution (`metrics.realism`); the drift is the median of `metrics.label_drift`: of the iris where most
    images show one, else of edges. An evaluation draws no random number and changes nothing in training but ``best``,
    ``best_refiner`` and ``drifted`` of its state.

    Args:
        state: whose moving average is evaluated.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state, self._max_drift = state, state.config.max_drift
        self._real: Array | None = None

    def evaluate(self) -> dict[str, float]:
        """Measure R's moving average as it is; ``kid`` and, where x has edges, ``drift_px``.

        Raises:
            TrainingError: there is a limit, and the drift cannot be measured or is beyond it the first time.
        """
        arrays = self._state.batches.arrays
        real, synthetic = arrays["real"], some_synthetic(arrays["synthetic"])
        if min(len(real), len(synthetic)) < 2:
            return {}  # a distance between distributions needs two of each
        if self._real is None:
            chosen = np.linspace(0, len(real) - 1, min(_REAL, len(real))).astype(np.int64)
            self._real = random_features(np.asarray(real[chosen]))
        refined = self._refined(synthetic)
        numbers = {"kid": kernel_distance(random_features(refined), self._real)}
        found = label_drift(synthetic, refined)
        parts = [found["pupil_px"] if found["pupil_found"] >= 0.5 else None, found["edges_px"]]
        drift = next((part["median"] for part in parts if part is not None), None)
        if drift is not None:
            numbers["drift_px"] = drift
        elif self._max_drift:
            raise TrainingError("--max-drift needs edges to measure by, and the synthetic images have none")
        self._judge(numbers)
        return numbers

    @torch.no_grad()
    def _refined(self, images: Array) -> Array:
        # by the network itself, not a `Refiner`: on CUDA that would record a graph for each evaluation
        state, parts = self._state, []
        for first in range(0, len(images), _BATCH):
            stored = state.batches.stored(images[first : first + _BATCH])
            refined = state.ema(prepare(stored, state.batches.drawn_histogram))
            parts.append(from_float(refined.cpu().numpy(), images.dtype).reshape(-1, *images.shape[1:]))
        return np.concatenate(parts)

    def _judge(self, numbers: dict[str, float]) -> None:
        state = self._state
        if self._max_drift and numbers["drift_px"] > self._max_drift:
            if state.best is None:
                raise TrainingError(
                    f"label drift must be at most --max-drift {self._max_drift:g} px, got {numbers['drift_px']:.2f} "
                    f"at the first look, iteration {state.step}: raise --lambda, or look earlier (--eval-every)"
                )
            state.drifted = True
        elif state.best is None or numbers["kid"] < state.best["kid"]:
            state.best = {"step": state.step, **numbers}
            state.best_refiner = copy.deepcopy(state.ema)


def some_synthetic(images: Array | CentreCrops) -> Array:
    """A sample of ``images`` spread evenly over them, that takes a second or two to look at: 400 eyes."""
    count = max(16, min(400, 800_000 // math.prod(images.shape[1:3])))
    return np.array(images[:: max(1, len(images) // count)][:count])  # a copy: the images may be a mapped file


def drift_line(synthetic: Array | CentreCrops, refiner: Refiner) -> str:
    """A line on how far R moved what labels speak of."""
    sample = some_synthetic(synthetic)
    low, high = refiner.span
    if refiner.span != UNIT:  # the images that training sees are in [0, 1]
        sample = np.clip(sample * np.float32(high - low) + np.float32(low), np.float32(low), np.float32(high))
    return f"{describe(label_drift(sample, refiner(sample)))}; of {len(sample)} images"


def evaluation_line(numbers: dict[str, float]) -> str:
    """An evaluation's numbers, for a line that a person reads."""
    drift = f", drift {numbers['drift_px']:.2f} px" if "drift_px" in numbers else ""
    return f"KID {numbers['kid']:.4f}{drift}"
