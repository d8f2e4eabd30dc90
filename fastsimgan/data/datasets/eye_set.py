"""What an import of eyes yields: images with gaze, where each came from, and what was rejected and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastsimgan.data.gaze_angles import pitch_yaw
from fastsimgan.errors import InputError
from fastsimgan.storage.atomic import staged
from fastsimgan.storage.names import printable


@dataclass
class EyeSet:
    """``arrays`` holds ``images`` uint8 ``[N, H, W]`` and labels of length N; ``counts`` what the scan met, by name."""

    arrays: dict[str, np.ndarray]
    counts: dict[str, int]
    rejected: dict[str, str] = field(default_factory=dict)
    """Reason by name, relative to the input folder."""

    def save(self, path: Path) -> None:
        """Write ``arrays`` as an uncompressed ``.npz``, which can be memory-mapped. InputError if ``path`` exists."""
        with staged(path) as partial, partial.open("xb") as file:
            np.savez(file, **self.arrays)  # type: ignore[arg-type]


def scan(folder: Path, pattern: str) -> list[Path]:
    """Files in or under ``folder`` that match the glob. InputError if it cannot be listed; no pipe, no device."""
    if not folder.is_dir():
        raise InputError(f"{printable(folder)}: must be a folder")
    try:
        return [path for path in folder.glob(pattern) if path.is_file()]
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot be listed: {error.strerror}") from error


def gaze_to_pitch_yaw(vector: np.ndarray) -> np.ndarray:
    """One gaze vector ``[3]`` in camera space (x right, y down, z away) to (pitch, yaw) in radians, float32.

    Raises InputError, without a file's name, unless it is a unit vector (to 1 %) that points towards the camera.
    """
    length = float(np.linalg.norm(vector))
    if not abs(length - 1) <= 0.01:  # written so that NaN is refused too
        raise InputError(f"gaze must be a unit vector (to 0.01), got length {length:.6g}")
    if not vector[2] < 0:
        raise InputError(f"gaze must point towards the camera (z < 0), got z = {vector[2]:.6g}")
    return pitch_yaw(vector[None])[0].astype(np.float32)
