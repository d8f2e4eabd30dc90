"""MPIIGaze's normalised eyes: ``Data/Normalized/pXX/dayYY.mat`` (MATLAB v5), 36x60 and histogram-equalised.

``data.left`` and ``data.right`` each have ``image`` ``[N, 36, 60]`` uint8 and ``gaze`` ``[N, 3]``, unit vectors in
camera space; ``filenames`` has the N names (``0001.jpg``). **Right eyes are mirrored**, with the x of gaze negated, so
that every inner corner is on the same side and one model serves both. An output smaller than 36x60 is the centre (of an
odd rest the lower and right edge lose one more); no pixel is resampled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.datasets.eye_set import EyeSet, gaze_to_pitch_yaw, scan
from fastsimgan.data.datasets.matlab_v5 import MAX_BYTES, read_matlab
from fastsimgan.errors import InputError
from fastsimgan.storage.names import natural_key, printable

HEIGHT, WIDTH = 36, 60
EVALUATION_LISTS = Path("Evaluation Subset") / "sample list for eye image"
_LISTED = re.compile(r"(day[0-9]{2}/[0-9]{1,9}\.jpg) (left|right)")
_NAME = re.compile(r"[0-9]{1,9}\.jpg")
_MAX_LIST_BYTES = 1 << 24

Eye = tuple[str, str]
"""(``p00/day01/0001.jpg``, ``left`` or ``right``)"""


def read_mpiigaze(folder: Path, size: tuple[int, int] = (35, 55), evaluation: bool = False) -> EyeSet:
    """Both eyes of every sample under ``folder`` (MPIIGaze's root), subject by subject, day by day, left then right.

    Args:
        folder: it holds ``Data/Normalized`` and, for ``evaluation``, ``Evaluation Subset``.
        size: (height, width) of the output, at most 36x60.
        evaluation: only the eyes of the evaluation lists (1,500 of each side a subject), in the lists' order.

    Returns:
        ``images`` ``[N, *size]``; ``pitch_yaw`` ``[N, 2]`` float32 radians, of the image as it is after mirroring;
        ``subject`` int64 ``[N]``; ``mirrored`` bool ``[N]``, the right eyes; ``source``, names with the side.
        Rejected are ``.mat`` files that break a rule, eyes whose gaze does, and listed eyes that are not there.

    Raises InputError if ``folder`` or a list does not keep to the format.
    """
    if not (1 <= size[0] <= HEIGHT and 1 <= size[1] <= WIDTH):
        raise InputError(f"size must be from 1x1 to {HEIGHT}x{WIDTH}, got {size[0]}x{size[1]}")
    files = sorted(scan(folder / "Data" / "Normalized", "p[0-9][0-9]/day[0-9][0-9].mat"), key=natural_key)
    wanted = read_evaluation_lists(folder) if evaluation else None
    counts = {"mat": len(files)} | ({} if wanted is None else {"listed": len(wanted)})
    found = EyeSet({}, counts)
    eyes: dict[Eye, tuple[np.ndarray, np.ndarray]] = {}
    for path in files:
        day = f"{path.parent.name}/{path.stem}"
        try:
            sides, names = _read_mat(path)
        except InputError as error:
            found.rejected[f"{day}.mat"] = str(error)
            continue
        for index, name in enumerate(names):
            for side, (images, gaze) in sides.items():
                eye = f"{day}/{name}", side
                if wanted is not None and eye not in wanted:
                    continue
                try:
                    if eye in eyes:
                        raise InputError("must have every name once, got it twice")
                    eyes[eye] = _turned(images[index], gaze[index], side, size)
                except InputError as error:
                    found.rejected[" ".join(eye)] = f"{printable(path)}: {name} {side}: {error}"
    for eye in wanted or ():
        if eye not in eyes and " ".join(eye) not in found.rejected:
            found.rejected[" ".join(eye)] = f"{' '.join(eye)}: must be in Data/Normalized, as the list has it"
    order = list(eyes) if wanted is None else [eye for eye in wanted if eye in eyes]
    found.arrays = {
        "images": np.array([eyes[eye][0] for eye in order], np.uint8).reshape(-1, *size),
        "pitch_yaw": np.array([eyes[eye][1] for eye in order], np.float32).reshape(-1, 2),
        "subject": np.array([int(name[1:3]) for name, _ in order], np.int64),
        "mirrored": np.array([side == "right" for _, side in order], np.bool_),
        "source": np.array([" ".join(eye) for eye in order], np.str_),
    }
    return found


def read_evaluation_lists(folder: Path) -> dict[Eye, None]:
    """The eyes of all ``pXX.txt`` in order, each once; a line is ``day13/0203.jpg left``. InputError if one is not."""
    lists = sorted(scan(folder / EVALUATION_LISTS, "p[0-9][0-9].txt"), key=natural_key)
    if not lists:
        raise InputError(f"{printable(folder / EVALUATION_LISTS)}: must hold pXX.txt, got none")
    eyes: dict[Eye, None] = {}
    for path in lists:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_LIST_BYTES + 1)
        except OSError as error:
            raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
        if len(data) > _MAX_LIST_BYTES:
            raise InputError(f"{printable(path)}: must have at most {_MAX_LIST_BYTES} bytes")
        for number, line in enumerate(data.decode("ascii", "backslashreplace").splitlines(), 1):
            match = _LISTED.fullmatch(line.strip())
            if match is None:
                raise InputError(
                    f"{printable(path)}: line {number} must be like 'day13/0203.jpg left', got {printable(line[:60])!r}"
                )
            eyes[f"{path.stem}/{match[1]}", match[2]] = None
    return eyes


def _turned(image: np.ndarray, gaze: np.ndarray, side: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One eye, cut to ``size`` and as a left one, with its pitch and yaw."""
    if side == "right":
        image, gaze = image[:, ::-1], gaze * [-1, 1, 1]
    top, left = (HEIGHT - size[0]) // 2, (WIDTH - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]].copy(), gaze_to_pitch_yaw(gaze)


def _read_mat(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """``{side: (images [N, 36, 60] uint8, gaze [N, 3] float64)}`` and the N names of one day."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"must have at most {MAX_BYTES} bytes")
        content = read_matlab(data)
        names = content.get("filenames")
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise InputError("must have filenames, a cell array")
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise InputError(f"filenames must be like '0001.jpg', got {printable(repr(name)[:60])}")
        eyes = content.get("data")
        return {side: _side(eyes, side, len(names)) for side in ("left", "right")}, names
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from error
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error


def _side(eyes: Any, side: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    eye = eyes.get(side) if isinstance(eyes, dict) else None
    images, gaze = (eye.get(name) if isinstance(eye, dict) else None for name in ("image", "gaze"))
    if not isinstance(images, np.ndarray) or not isinstance(gaze, np.ndarray):
        raise InputError(f"must have data.{side}.image and data.{side}.gaze")
    if images.dtype != np.uint8 or images.shape != (count, HEIGHT, WIDTH):
        raise InputError(
            f"{side}.image must be uint8 [{count}, {HEIGHT}, {WIDTH}], got {images.dtype} {list(images.shape)}"
        )
    if gaze.dtype.kind != "f" or gaze.shape != (count, 3):
        raise InputError(f"{side}.gaze must be floats [{count}, 3], got {gaze.dtype} {list(gaze.shape)}")
    return images, gaze.astype(np.float64)
