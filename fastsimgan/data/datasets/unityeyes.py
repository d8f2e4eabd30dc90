"""UnityEyes as its program writes it: ``N.jpg`` (640x480 or 800x600) with ``N.json`` beside it.

Every number of the json is a string, vectors too (``"(-0.5557, 0.4563, -0.6950, 0.0000)"``); they are matched against
one pattern and never evaluated. Image points count y from the bottom edge: row = height - y.

**The crop** is the one most gaze code uses (GazeML, Park et al. 2018): centred on the bounding box of the lid margin,
as wide as 1.5 times the horizontal distance from the inner corner (mean of the caruncle's points) to the outer one
(point 8 of the lid margin), with the output's aspect. It is resampled with a triangle filter (antialiased) from
Rec. 601 luma. A crop that leaves the image, or is smaller than the output, is rejected: nothing is padded or enlarged.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastsimgan.data.datasets.eye_set import EyeSet, gaze_to_pitch_yaw, scan
from fastsimgan.data.formats.image_file import read_image
from fastsimgan.errors import InputError
from fastsimgan.storage.names import natural_key, printable

MAX_JSON_BYTES = 1 << 20  # a genuine file has 3 kB
LID_POINTS, CARUNCLE_POINTS, OUTER_CORNER = 16, 7, 8
CROP_WIDTH = 1.5  # in distances between the corners
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class UnityEyesLabel:
    """What is read of one json. Points are (x from the left, y from the bottom) in pixels of the whole image."""

    lid_margin: np.ndarray  # [16, 2]
    caruncle: np.ndarray  # [7, 2]
    pitch_yaw: np.ndarray  # [2] float32, radians, MPIIGaze's convention


def parse_label(data: bytes, name: str) -> UnityEyesLabel:
    """Parse the bytes of one json; entries that are not needed are ignored.

    Raises InputError, and nothing else, that begins with ``name`` if the bytes are not the format above.
    """
    try:
        if len(data) > MAX_JSON_BYTES:
            raise InputError(f"must have at most {MAX_JSON_BYTES} bytes, got {len(data)}")
        try:
            document = json.loads(data.decode("utf-8"), object_pairs_hook=_each_once)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"must be JSON: {_short(str(error))}") from error
        look_vec = _vector(_entry(_entry(document, "eye_details"), "look_vec"), "look_vec", 4)
        return UnityEyesLabel(
            _points(document, "interior_margin_2d", LID_POINTS),
            _points(document, "caruncle_2d", CARUNCLE_POINTS),
            # Unity's y points up, that of MPIIGaze's camera space down
            gaze_to_pitch_yaw(look_vec[:3] * [1, -1, 1]),
        )
    except InputError as error:
        raise InputError(f"{printable(name)}: {error}") from error


def crop_box(label: UnityEyesLabel, image: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The crop's (left, top, right, bottom) in pixels from the image's top left corner, by the rule above.

    Args:
        label: of the image.
        image: its (height, width).
        size: of the output, (height, width).

    Raises InputError, without a file's name, if the crop leaves the image or is smaller than ``size``.
    """
    width = CROP_WIDTH * abs(float(label.lid_margin[OUTER_CORNER, 0] - label.caruncle[:, 0].mean()))
    height = width * size[0] / size[1]
    x, y = (label.lid_margin.min(0) + label.lid_margin.max(0)) / 2
    left, top = float(x) - width / 2, image[0] - float(y) - height / 2
    box = left, top, left + width, top + height
    if not width >= size[1]:
        raise InputError(f"crop must be at least {size[0]}x{size[1]}, got {height:.4g}x{width:.4g}")
    if not (left >= 0 and top >= 0 and box[2] <= image[1] and box[3] <= image[0]):
        edges = ", ".join(f"{edge:.1f}" for edge in box)
        raise InputError(f"crop must lie in the image of {image[0]}x{image[1]}, got left, top, right, bottom {edges}")
    return box


def crop_eye(pixels: np.ndarray, label: UnityEyesLabel, size: tuple[int, int]) -> np.ndarray:
    """The eye of one image, uint8 ``[H, W]`` or ``[H, W, 3]``, as grey uint8 of ``size``. Raises as `crop_box` does."""
    if pixels.dtype != np.uint8:
        raise InputError(f"must have 8 bits a channel, got {pixels.dtype}")
    box = crop_box(label, pixels.shape[:2], size)
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def read_unityeyes(folder: Path, size: tuple[int, int] = (35, 55)) -> EyeSet:
    """Every ``N.jpg`` with its ``N.json`` in ``folder``, in the order of N.

    Returns:
        ``images`` ``[N, *size]``, ``pitch_yaw`` ``[N, 2]`` float32 radians, ``source`` the images' names; rejected are
        images and labels that break a rule or lack their other half.

    Raises InputError if ``folder`` cannot be listed.
    """
    files = {path.name: path for path in scan(folder, "*") if path.suffix in (".jpg", ".json")}
    stems = sorted({Path(name).stem for name in files}, key=lambda stem: natural_key(Path(stem)))
    images = np.empty((len(stems), *size), np.uint8)
    gaze = np.empty((len(stems), 2), np.float32)
    sources: list[str] = []
    found = EyeSet({}, {"jpg": sum(n.endswith(".jpg") for n in files), "json": sum(n.endswith(".json") for n in files)})
    for stem in stems:
        image, label = f"{stem}.jpg", f"{stem}.json"
        one, other = (image, label) if image in files else (label, image)
        try:
            if other not in files:
                raise InputError(f"{printable(folder / one)}: must have {printable(other)} beside it")
            parsed = parse_label(_read_json(files[label]), str(files[label]))
            pixels = read_image(files[image]).pixels
            try:
                images[len(sources)] = crop_eye(pixels, parsed, size)
            except InputError as error:
                raise InputError(f"{printable(files[image])}: {error}") from error
            gaze[len(sources)] = parsed.pitch_yaw
            sources.append(printable(image))
        except InputError as error:
            found.rejected[printable(one)] = str(error)
    found.arrays = {
        "images": images[: len(sources)],
        "pitch_yaw": gaze[: len(sources)],
        "source": np.array(sources, np.str_),
    }
    return found


def _read_json(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of an entry that is there twice nobody can tell which is meant."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise InputError("must have every entry once, got one twice")
    return entries


def _entry(holder: Any, key: str) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        raise InputError(f"must have the entry {key}")
    return holder[key]


def _points(document: Any, key: str, count: int) -> np.ndarray:
    """``[count, 2]``; the third number of a point is its distance from the camera."""
    points = _entry(document, key)
    if not isinstance(points, list) or len(points) != count:
        got = f"{len(points)}" if isinstance(points, list) else _short(repr(points))
        raise InputError(f"{key} must be a list of {count} points, got {got}")
    return np.array([_vector(point, key, 3)[:2] for point in points])


def _vector(text: Any, key: str, count: int) -> np.ndarray:
    """``"(1.5, -2e-3, 3)"`` as float64 ``[count]``."""
    inner = text[1:-1] if isinstance(text, str) and text[:1] == "(" and text[-1:] == ")" else ""
    parts = [part.strip(" ") for part in inner.split(",", count)]
    if len(parts) != count or not all(_NUMBER.fullmatch(part) for part in parts):
        raise InputError(f'{key} must be {count} numbers as "(a, b, ...)", got {_short(repr(text))}')
    values = [float(part) for part in parts]
    if not all(math.isfinite(value) and abs(value) < 1e6 for value in values):
        raise InputError(f"{key} must have numbers below 1e6, got {_short(repr(text))}")
    return np.array(values)


def _short(text: str) -> str:
    return printable(text if len(text) <= 80 else text[:77] + "...")
