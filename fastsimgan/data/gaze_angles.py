"""Gaze as angles and as vectors, by MPIIGaze's convention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def gaze_vectors(pitch_yaw: Floats) -> Floats:
    """Pitch and yaw ``[N, 2]`` in radians to unit vectors ``[N, 3]`` in camera space, by MPIIGaze's convention."""
    pitch, yaw = pitch_yaw[:, 0], pitch_yaw[:, 1]
    return np.stack([-np.cos(pitch) * np.sin(yaw), -np.sin(pitch), -np.cos(pitch) * np.cos(yaw)], 1)


def pitch_yaw(vectors: Floats) -> Floats:
    """The inverse: vectors ``[N, 3]`` of any length (not zero) to pitch and yaw ``[N, 2]`` in radians."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.stack([np.arcsin(np.clip(-unit[:, 1], -1, 1)), np.arctan2(-unit[:, 0], -unit[:, 2])], 1)
