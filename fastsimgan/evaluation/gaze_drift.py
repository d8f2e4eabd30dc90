"""How far a refiner moves what a gaze network says of an image: label drift as a network sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimgan.data.gaze_angles import pitch_yaw
from fastsimgan.evaluation.task_network import Judge, Labelled, train_and_predict
from fastsimgan.metrics.gaze_error import angular_errors

Array = NDArray[Any]


def gaze_drift(synthetic: Labelled, before: Array, after: Array, *, seed: int = 0, judge: Judge | None = None) -> Array:
    """How far a gaze network's answer moves from x to R(x), in degrees ``[N]``.

    A drift of the labels shows here, and so does a change of look that the network was never taught.

    Args:
        synthetic: what the network is trained on, on the CPU.
        before: x, stored images ``[N, H, W]`` or ``[N, H, W, C]`` of the synthetic ones' size.
        after: R(x), of the same shape.
        seed: of the network.
        judge: how it is trained; None: as `Judge` has it.
    """
    vectors = train_and_predict(
        synthetic, np.concatenate([before, after]), classes=0, seed=seed, judge=judge or Judge(),
        device=torch.device("cpu"),
    )  # fmt: skip
    one, other = np.split(pitch_yaw(vectors), 2)
    return angular_errors(one, other)
