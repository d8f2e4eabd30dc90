"""Angular error of predicted gaze (paper §3.1.3), with its bias told apart from the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsimgan.data.gaze_angles import gaze_vectors

Floats = NDArray[np.floating]


def angular_errors(predicted: Floats, true: Floats) -> Floats:
    """Angles in degrees ``[N]`` between two sets of pitch and yaw ``[N, 2]`` in radians."""
    # atan2 of cross and dot product: arccos alone loses half of the digits near zero
    a, b = gaze_vectors(predicted.astype(np.float64)), gaze_vectors(true.astype(np.float64))
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(1)))


def gaze_summary(predicted: Floats, true: Floats) -> dict[str, float]:
    """The numbers that are reported of one set of predictions; both ``[N, 2]``, pitch and yaw in radians.

    Returns:
        ``mean_deg``, ``median_deg`` and ``within_7deg`` (per cent) of the angular error; ``bias_pitch_deg`` and
        ``bias_yaw_deg``, the mean of predicted - true; and ``bias_free_mean_deg`` and ``bias_free_within_7deg``, the
        error with that mean taken out, which no model knows without labels: it tells scatter from a constant offset.
    """
    errors = angular_errors(predicted, true)
    bias = (predicted - true).mean(0)
    free = angular_errors(predicted - bias, true)
    return {
        "mean_deg": float(errors.mean()),
        "median_deg": float(np.median(errors)),
        "within_7deg": float((errors <= 7).mean() * 100),
        "bias_pitch_deg": float(np.degrees(bias[0])),
        "bias_yaw_deg": float(np.degrees(bias[1])),
        "bias_free_mean_deg": float(free.mean()),
        "bias_free_within_7deg": float((free <= 7).mean() * 100),
    }
