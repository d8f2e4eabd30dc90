"""NYU Hand Pose: ``depth_K_NNNNNNN.png``, ``synthdepth_K_NNNNNNN.png`` and ``joint_data.mat`` in ``train`` or ``test``.

K is one of three cameras, N a frame from 1 on; a pixel's depth in millimetres is ``green * 256 + blue``. As in §3.2 the
*rendered* frame tells where the hand is, for the real frame too: a hand is cut out by the square about its rendered
mask, a tenth larger, and resampled to the nearest pixel, so that no depth arises that was not measured. Of a real frame
what lies within ``MARGIN`` pixels of the mask and within ``REACH_MM`` of the rendered depths is the hand; the rest is
background.

The paper's value is 0 for background and depth - 2,000 mm for the hand. Stored is -32 times that, so that background is
0, the nearest is the brightest, and every millimetre is kept.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.datasets.eye_set import scan
from fastsimgan.data.datasets.matlab_v5 import MAX_BYTES, read_matlab
from fastsimgan.data.formats.image_file import read_image
from fastsimgan.data.simulators.hands import JOINTS
from fastsimgan.errors import InputError
from fastsimgan.hardware.threads import in_threads
from fastsimgan.storage.atomic import staged
from fastsimgan.storage.names import natural_key, printable

CAMERAS = (1, 2, 3)
BACKGROUND_MM = 2000
UNITS_PER_MM = 32
LARGER = 1.1  # side of the square, over that of the mask
MARGIN = 8
REACH_MM = 50
_NAME = re.compile(r"synthdepth_([1-3])_([0-9]{7})\.png")


@dataclass
class Imported:
    """How many hands were written, what the scan met by name, and what was rejected, reason by name."""

    images: int
    arrays: list[str]
    counts: dict[str, int]
    rejected: dict[str, str] = field(default_factory=dict)


def import_nyu_hands(
    folder: Path,
    output: Path,
    *,
    rendered: bool,
    cameras: Sequence[int] = CAMERAS,
    size: int = 224,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write the frames of ``folder`` to one uncompressed ``.npz``, with only a few of them in memory at a time.

    Args:
        folder: the dataset's ``train`` or ``test``.
        output: the ``.npz``; it must not exist. Beside it as much again is needed for a while.
        rendered: the rendered hands, in place of the real ones.
        cameras: which of 1, 2, 3.
        size: height and width of the hands.
        progress: called with the number of frames that are done, and of all.

    Returns:
        What was written: ``images`` uint16 ``[N, size, size]`` (see above); ``joints`` float32 ``[N, 36, 2]``, pixels
        (x, y) of these images with (0, 0) the centre of the top left one; ``depths`` float32 ``[N, 36]``, mm less
        2,000; ``camera`` and ``frame`` int64 ``[N]``. Frames by camera, then number. No file is written if N is 0.

    Raises:
        InputError: a setting, ``joint_data.mat`` or the output breaks a rule. Single frames that do are rejected.
    """
    if not cameras or any(camera not in CAMERAS for camera in cameras):
        raise InputError(f"cameras must be among 1, 2 and 3, got {' '.join(map(str, cameras)) or 'none'}")
    if not 16 <= size <= 1024:
        raise InputError(f"size must be from 16 to 1024, got {size}")
    uvd = _joints(folder / "joint_data.mat")
    frames = _frames(folder, cameras)
    found = Imported(0, [], {"frames": len(frames), "labelled frames": uvd.shape[1]})

    cut = partial(_cut_or_reason, uvd=uvd, rendered=rendered, size=size)
    places, depths, kept = [], [], []
    with staged(output) as written, tempfile.TemporaryFile(dir=written.parent) as pixels:
        for done, ((path, camera, number), result) in enumerate(zip(frames, in_threads(cut, frames), strict=True), 1):
            progress(done, len(frames))
            if isinstance(result, InputError):
                found.rejected[path.name] = str(result)
                continue
            pixels.write(result[0].tobytes())
            places.append(result[1])
            depths.append(result[2])
            kept.append((camera, number))
        found.images = len(kept)
        if not kept:
            written.touch()  # nothing to keep: the caller is told by the count, and the file goes
        else:
            camera_and_frame = np.array(kept, np.int64).T
            joints = {"joints": np.array(places, np.float32), "depths": np.array(depths, np.float32)}
            labels = joints | dict(zip(("camera", "frame"), camera_and_frame, strict=True))
            _write(written, pixels, (len(kept), size, size), labels)
            found.arrays = ["images", *labels]
    if not kept:
        output.unlink()
    return found


def _frames(folder: Path, cameras: Sequence[int]) -> list[tuple[Path, int, int]]:
    """Rendered frames of these cameras in natural order: path, camera, number."""
    frames = []
    for path in sorted(scan(folder, "synthdepth_*.png"), key=natural_key):
        match = _NAME.fullmatch(path.name)
        if match is not None and int(match[1]) in cameras:
            frames.append((path, int(match[1]), int(match[2])))
    return frames


def _joints(path: Path) -> np.ndarray:
    """``joint_uvd`` ``[3, frames, 36, 3]``: pixel (x, y) and depth in mm."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"must have at most {MAX_BYTES} bytes")
        uvd = read_matlab(data).get("joint_uvd")
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from error
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    if (
        not isinstance(uvd, np.ndarray)
        or uvd.dtype.kind != "f"
        or uvd.ndim != 4
        or uvd.shape != (len(CAMERAS), uvd.shape[1], JOINTS, 3)
    ):
        got = f"{uvd.dtype} {list(uvd.shape)}" if isinstance(uvd, np.ndarray) else type(uvd).__name__
        raise InputError(f"{printable(path)}: joint_uvd must be floats [3, frames, {JOINTS}, 3], got {got}")
    return uvd


def read_depth(path: Path) -> np.ndarray:
    """A depth PNG in millimetres: int32 ``[H, W]``. InputError if it is none."""
    pixels = read_image(path).pixels
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise InputError(f"{printable(path)}: must be an 8-bit RGB PNG, got {pixels.dtype} {list(pixels.shape)}")
    return pixels[..., 1].astype(np.int32) * 256 + pixels[..., 2]


def _cut_or_reason(
    frame: tuple[Path, int, int], uvd: np.ndarray, rendered: bool, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | InputError:
    """`_cut` of (path, camera, number), or why it is rejected."""
    path, camera, number = frame
    try:
        if not 1 <= number <= uvd.shape[1]:
            raise InputError(f"{printable(path)}: joint_data.mat has frames 1 to {uvd.shape[1]}, got {number}")
        return _cut(path, uvd[camera - 1, number - 1], rendered, size)
    except InputError as error:
        return error


def _cut(path: Path, uvd: np.ndarray, rendered: bool, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame: its hand, its joints and their depths."""
    if not np.isfinite(uvd).all():
        raise InputError(f"{printable(path)}: joint_uvd must be finite, got NaN or Inf for this frame")
    depth = read_depth(path)
    hand = (depth > 0) & (depth < BACKGROUND_MM)
    rows, columns = np.flatnonzero(hand.any(1)), np.flatnonzero(hand.any(0))
    if not len(rows):
        raise InputError(f"{printable(path)}: must show a hand nearer than {BACKGROUND_MM} mm, got none")
    if not rendered:
        near, far = depth[hand].min() - REACH_MM, depth[hand].max() + REACH_MM
        real = path.with_name(path.name.removeprefix("synth"))
        depth = read_depth(real)
        if depth.shape != hand.shape:
            raise InputError(
                f"{printable(real)}: must have the rendered frame's size {list(hand.shape)}, got {list(depth.shape)}"
            )
        hand = _dilated(hand, MARGIN) & (depth > max(0, near)) & (depth < min(far, BACKGROUND_MM))
        if not hand.any():
            raise InputError(f"{printable(real)}: must show a hand where the rendered frame does, got none")
    # edges of the square, in pixels from the image's own edges
    side = LARGER * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    top, left = (rows[0] + rows[-1] + 1 - side) / 2, (columns[0] + columns[-1] + 1 - side) / 2
    steps = (np.arange(size) + 0.5) * side / size
    down, across = (np.floor(first + steps).astype(int) for first in (top, left))
    inside = ((down >= 0) & (down < hand.shape[0]))[:, None] & ((across >= 0) & (across < hand.shape[1]))
    where = np.ix_(down.clip(0, hand.shape[0] - 1), across.clip(0, hand.shape[1] - 1))
    image = np.where(inside & hand[where], UNITS_PER_MM * (BACKGROUND_MM - depth[where]), 0).astype("<u2")
    joints = (uvd[:, :2] + 0.5 - [left, top]) * size / side - 0.5
    return image, joints, uvd[:, 2] - BACKGROUND_MM


def _dilated(mask: np.ndarray, margin: int) -> np.ndarray:
    """``mask`` ``[H, W]`` and all within ``margin`` pixels of it, each way."""
    for axis in (0, 1):
        edges = [(margin + 1, margin) if each == axis else (0, 0) for each in (0, 1)]
        count = np.moveaxis(np.cumsum(np.pad(mask, edges), axis, dtype=np.int32), axis, 0)
        mask = np.moveaxis(count[2 * margin + 1 :] > count[: -2 * margin - 1], 0, axis)
    return mask


def _write(path: Path, pixels: Any, shape: tuple[int, ...], labels: dict[str, np.ndarray]) -> None:
    """An uncompressed ``.npz``: ``images`` of that ``shape`` from the file ``pixels``, then ``labels``."""
    pixels.seek(0)
    with zipfile.ZipFile(path, "x", allowZip64=True) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "<u2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            while block := pixels.read(1 << 22):
                member.write(block)
        for name, array in labels.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
