"""The best refiner of a run, by numbers that need no label: how real its images look, and how true labels stay."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsimgan.data.pixel_values import UNIT, from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.data.ragged import CentreCrops
from fastsimgan.errors import TrainingError
from fastsimgan.inference.refiner import Refiner
from fastsimgan.metrics.features import random_features
from fastsimgan.metrics.label_drift import describe, label_drift
from fastsimgan.metrics.realism import kernel_distance
from fastsimgan.models.refiner import Refiner as Network
from fastsimgan.storage.checkpoint import flatten, select
from fastsimgan.training.batches import Pools
from fastsimgan.training.simgan import SimGAN

_REAL = 2000  # real images that refined ones are compared with
_BATCH = 64

Array = np.ndarray[Any, Any]


class Selection:
    """Looks at the refiner now and then, and keeps the best: of those whose drift is within the limit, lowest KID.

    The same synthetic images each time (`some_synthetic`) against at most 2,000 real ones, in the features of a fixed
    random convolution (`metrics.realism`); the drift is the median of `metrics.label_drift`: of the iris where most
    images show one, else of edges. A look draws no random number and changes nothing in training.

    Args:
        trainer, pools: what is looked at.
        max_drift: limit in pixels, 0 for none.

    Attributes:
        best: ``step``, ``kid`` and ``drift_px`` of the best look; None before the first within the limit.
        network: its R.
        drifted: whether a look was beyond the limit.
    """

    def __init__(self, trainer: SimGAN, pools: Pools, max_drift: float) -> None:
        self._trainer, self._pools, self._max_drift = trainer, pools, max_drift
        self._real: np.ndarray[Any, Any] | None = None
        self.best: dict[str, float] | None = None
        self.network: Network = trainer.average
        self.drifted = False

    def look(self) -> dict[str, float]:
        """Measure R's moving average as it is; ``kid`` and, where x has edges, ``drift_px``.

        Raises:
            TrainingError: there is a limit, and the drift cannot be measured or is beyond it at the first look.
        """
        real = self._pools.arrays["real"]
        synthetic = some_synthetic(self._pools.arrays["synthetic"])
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
        self._judge(self._trainer.step, numbers)
        return numbers

    @torch.no_grad()
    def _refined(self, images: Array) -> Array:
        # by the network itself, not a `Refiner`: on CUDA that would record a graph for each look
        parts = []
        for first in range(0, len(images), _BATCH):
            stored = self._pools.stored(images[first : first + _BATCH])
            refined = self._trainer.average(prepare(stored, self._pools.drawn_histogram))
            parts.append(from_float(refined.cpu().numpy(), images.dtype).reshape(-1, *images.shape[1:]))
        return np.concatenate(parts)

    def _judge(self, step: int, numbers: dict[str, float]) -> None:
        if self._max_drift and numbers["drift_px"] > self._max_drift:
            if self.best is None:
                raise TrainingError(
                    f"label drift must be at most --max-drift {self._max_drift:g} px, got {numbers['drift_px']:.2f} "
                    f"at the first look, iteration {step}: raise --lambda, or look earlier (--picture-every)"
                )
            self.drifted = True
        elif self.best is None or numbers["kid"] < self.best["kid"]:
            self.best = {"step": step, **numbers}
            self.network = copy.deepcopy(self._trainer.average)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts for a checkpoint."""
        tensors = {} if self.best is None else flatten("best", self.network.state_dict())
        return tensors, {"best": self.best, "drifted": self.drifted}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.best, self.drifted = facts["best"], facts["drifted"]
        if self.best is not None:
            self.network = copy.deepcopy(self._trainer.average)
            self.network.load_state_dict(select("best", tensors))


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


def seen(numbers: dict[str, float]) -> str:
    """A look's numbers, for a line that a person reads."""
    drift = f", drift {numbers['drift_px']:.2f} px" if "drift_px" in numbers else ""
    return f"KID {numbers['kid']:.4f}{drift}"
