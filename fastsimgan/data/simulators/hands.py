"""A procedural depth-hand simulator: labelled depth maps of an articulated hand of capsules, in numpy, with no assets.

Five fingers of three bones and a palm of capsules are bent, spread and turned at random, and seen by an orthographic
camera whose nearest surface wins (a z-buffer). Two populations share the poses:

``synthetic``
    The exact depth.
``stand_in_real``
    What §3.2 names as the noise of real depth: edges are jagged, depth is missing there and in small holes, and it is
    quantised. It *stands in* for a sensor; nothing measured on it is a claim about real hands.

The camera looks along +z, x to the right, y down. (0, 0) is the centre of the top left pixel. There are as many joints
as in NYU Hand Pose and its 14 evaluated indices are used, but places within the palm are this model's own.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastsimgan.errors import InputError

Population: TypeAlias = Literal["synthetic", "stand_in_real"]
Array: TypeAlias = NDArray[Any]

JOINTS = 36
"""Six for each of little, ring, middle, index finger and thumb, tip first; then six of the palm."""

EVALUATED = (0, 3, 6, 9, 12, 15, 18, 21, 24, 25, 27, 30, 31, 32)
"""The 14 joints that NYU Hand Pose's papers evaluate."""

UNITS_PER_MM = 128
MIDDLE = 32768
"""A stored pixel is 0 where nothing is, else MIDDLE + UNITS_PER_MM * (depth - depth of the palm's centre), in mm."""

_FIELD_MM = 260.0  # width and height of what the camera sees
_CHUNK_PIXELS = 1 << 16  # rendered at a time: temporaries stay small
# Base of each finger on the palm (mm; y up from the wrist, before the hand is turned), its three bones, and its radius.
_BASES = np.array([[-32, 38, 0], [-12, 46, 0], [10, 48, 0], [30, 44, 0], [30, -12, -8]], np.float32)
_BONES = np.array([[32, 20, 17], [40, 26, 19], [44, 29, 20], [40, 25, 19], [40, 31, 25]], np.float32)
_FINGER_RADIUS = np.array([7.0, 8.0, 8.5, 8.5, 9.5], np.float32)
_FAN = np.deg2rad([-14, -5, 2, 9, 48]).astype(
    np.float32
)  # each finger's direction from straight up, in the palm's plane
_PALM = np.array([[0, 0, 0], [-20, -50, 0], [20, -50, 0], [-28, 0, 0], [26, 0, 0], [0, -50, 0]], np.float32)
_CAPSULES = (
    *((6 * f + i, 6 * f + i + 1) for f in range(5) for i in range(5)),
    *((6 * f + 5, 30) for f in range(4)),
    *((6 * f + 5, 6 * f + 11) for f in range(3)),
    *((5, 33), (33, 31), (23, 34), (34, 32), (30, 35), (31, 32), (29, 32), (30, 31), (30, 32)),
)
_RADII = np.array([*np.repeat(_FINGER_RADIUS, 5), *[13.0] * (len(_CAPSULES) - 25)], np.float32)


def simulate_hands(
    count: int, seed: int, *, population: Population = "synthetic", height: int = 224, width: int = 224
) -> dict[str, Array]:
    """Draw ``count`` hands: ``images`` uint16 ``[N, H, W]`` (see ``MIDDLE``), ``joints`` float32 ``[N, 36, 2]`` in
    pixels (x, y), and ``depths`` float32 ``[N, 36]``, mm from the palm's centre. Raises InputError for bad sizes."""
    if population not in ("synthetic", "stand_in_real"):
        raise InputError(f"population must be synthetic or stand_in_real, got {population!r}")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if min(height, width) < 16:
        raise InputError(f"height and width must be at least 16 pixels, got {height}x{width}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    rng = np.random.default_rng([seed, population == "stand_in_real"])
    points = _poses(rng, count)
    scale = min(height, width) / _FIELD_MM
    centre = np.array([(width - 1) / 2, (height - 1) / 2], np.float32)
    pixels = points.copy()
    pixels[..., :2] = points[..., :2] * scale + centre
    images = np.empty((count, height, width), np.uint16)
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, count, step):
        depth = _render(pixels[start : start + step], scale, height, width)
        if population == "stand_in_real":
            depth = _sensor(rng, depth)
        images[start : start + step] = _stored(depth)
    return {"images": images, "joints": pixels[..., :2], "depths": points[..., 2]}


def through_sensor(images: Array, seed: int) -> Array:
    """The simulator's exact ``images`` (uint16 ``[N, H, W]``) as its stand-in sensor would have given them."""
    depth = np.where(images > 0, (images.astype(np.float32) - MIDDLE) / UNITS_PER_MM, np.inf)
    return _stored(_sensor(np.random.default_rng(seed), depth))


def _stored(depth: Array) -> Array:
    stored = np.clip(np.rint(MIDDLE + UNITS_PER_MM * depth), 1, 65535)
    return np.where(np.isfinite(depth), stored, 0).astype(np.uint16)


def _poses(rng: np.random.Generator, count: int) -> Array:
    """Joints ``[N, 36, 3]`` in mm from the palm's centre, as the camera sees them."""
    points = np.empty((count, JOINTS, 3), np.float32)
    points[:, 30:] = _PALM
    curl = rng.uniform(0, 1, (count, 1))  # fingers bend together, each a little on its own
    for f in range(5):
        own = np.clip(curl[:, 0] + rng.uniform(-0.35, 0.35, count), 0, 1)
        spread = _FAN[f] + np.deg2rad(rng.uniform(-7, 7, count))
        most = np.deg2rad([75, 95, 60] if f < 4 else [20, 40, 55])
        place = np.broadcast_to(_BASES[f], (count, 3)).astype(np.float32)
        points[:, 6 * f + 5] = place
        bend = np.zeros(count)
        for bone in range(3):
            bend = bend + own * most[bone]
            along = np.stack([np.sin(spread) * np.cos(bend), np.cos(spread) * np.cos(bend), -np.sin(bend)], 1)
            after = place + _BONES[f, bone] * along.astype(np.float32)
            if bone < 2:
                points[:, 6 * f + 4 - 2 * bone] = (place + after) / 2
                points[:, 6 * f + 3 - 2 * bone] = after
            else:
                points[:, 6 * f] = after
            place = after
    points[..., 1] *= -1  # image rows run down
    points *= rng.uniform(0.85, 1.1, (count, 1, 1)).astype(np.float32)
    roll, pitch, yaw = np.deg2rad(rng.uniform([-40, -35, -45], [40, 35, 45], (count, 3))).T
    for a, b, angle in ((0, 2, yaw), (1, 2, pitch), (0, 1, roll)):
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        points[..., a], points[..., b] = (
            cos * points[..., a] - sin * points[..., b],
            sin * points[..., a] + cos * points[..., b],
        )
    return points


def _render(points: Array, scale: float, height: int, width: int) -> Array:
    """Nearest surface ``[N, H, W]``, mm from the palm's centre, inf where nothing is; ``points``: x, y pixels, z mm."""
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None, :]
    nearest = np.full((len(points), height, width), np.inf, np.float32)
    for (i, j), radius in zip(_CAPSULES, _RADII, strict=True):
        start, along = points[:, i, None, None], (points[:, j] - points[:, i])[:, None, None]
        x, y = columns - start[..., 0], rows - start[..., 1]
        length2 = np.maximum(along[..., 0] ** 2 + along[..., 1] ** 2, 1e-6)
        t = np.clip((x * along[..., 0] + y * along[..., 1]) / length2, 0, 1)
        # The ball nearest in the image stands for the swept one: exact across the bone, a little off where it is steep.
        height2 = radius**2 - ((x - t * along[..., 0]) ** 2 + (y - t * along[..., 1]) ** 2) / scale**2
        depth = start[..., 2] + t * along[..., 2] - np.sqrt(np.maximum(height2, 0))
        np.minimum(nearest, np.where(height2 > 0, depth, np.inf), out=nearest)
    return nearest


def _sensor(rng: np.random.Generator, depth: Array) -> Array:
    """The stand-in sensor: ``depth`` with jagged and missing edges, holes, and steps of 1 to 4 mm."""
    count, height, width = depth.shape
    image, row, column = np.ogrid[:count, :height, :width]
    jump = np.zeros(depth.shape, bool)
    filled = np.where(np.isfinite(depth), depth, 1000)
    for axis in (1, 2):
        for shift in (-1, 1):
            jump |= np.abs(filled - np.roll(filled, shift, axis)) > 12
    row_from = np.clip(row + jump * rng.integers(-1, 2, depth.shape), 0, height - 1)
    column_from = np.clip(column + jump * rng.integers(-1, 2, depth.shape), 0, width - 1)
    seen = depth[image, row_from, column_from]
    missing = jump & (rng.random(depth.shape) < 0.25)
    for _ in range(3):
        x, y = rng.uniform(0, width, (count, 1, 1)), rng.uniform(0, height, (count, 1, 1))
        radius = rng.uniform(0, 0.04, (count, 1, 1)) * min(height, width)
        missing |= (row - y) ** 2 + (column - x) ** 2 < radius**2
    seen = np.where(missing, np.inf, seen)
    step = rng.uniform(1, 4, (count, 1, 1)).astype(np.float32)
    return np.asarray(np.where(np.isfinite(seen), np.rint(np.where(np.isfinite(seen), seen, 0) / step) * step, np.inf))
