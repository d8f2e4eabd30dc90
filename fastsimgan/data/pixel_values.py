"""Pixel values: how stored images become the networks' numbers and come back, for NumPy arrays and for torch tensors.

Stored images are ``uint8`` in [0, 255], ``uint16`` in [0, 65535] or ``float32`` in [0, 1]. The networks see ``float32``
in [-1, 1], because the refiner ends in a tanh. Arrays keep channels last (``[B, H, W]`` or ``[B, H, W, C]``), as files
do; tensors keep them first (``[B, C, H, W]``), as networks do.

torch is never imported here: a caller who holds a tensor has imported it already.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fastsimgan.data.ragged import Images, RaggedImages
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import allocate
from fastsimgan.storage.names import printable

if TYPE_CHECKING:
    from torch import Tensor

#: The stored types, and the value that stands for white in each.
WHITE = {"uint8": 255, "uint16": 65535, "float32": 1}
Span = tuple[float, float]
UNIT: Span = (0.0, 1.0)  # in which floats must lie, where no other range is stated
HAIR = 1 / 1024  # by which floats may leave [0, 1], a quarter of an 8-bit level: rounding, which is clipped
APART = 4  # times by which one side's bright values may be above the other's before it is told


@overload
def normalise(values: np.ndarray) -> np.ndarray: ...
@overload
def normalise(values: Tensor) -> Tensor: ...
def normalise(values: Any) -> Any:
    """Stored values of any shape -> float32 in [-1, 1]: black is -1 and white is +1 in every stored type.

    Raises TypeError if the type is none of uint8, uint16 and float32.
    """
    half = _white(values.dtype) / 2
    return (values.float() if _is_tensor(values) else values.astype(np.float32)) / half - 1


@overload
def quantise(values: np.ndarray, dtype: Any) -> np.ndarray: ...
@overload
def quantise(values: Tensor, dtype: Any) -> Tensor: ...
def quantise(values: Any, dtype: Any) -> Any:
    """Floats in [-1, 1], of any shape -> stored values of ``dtype`` (a NumPy or torch type, or its name).

    Integers are rounded to the nearest, and what is outside [-1, 1] is clipped, so that white never wraps to black.
    ``quantise(normalise(u), u.dtype)`` is ``u``, exactly, for every uint8 and uint16 value. NaN has no stored value:
    what it becomes is undefined. Raises TypeError if ``dtype`` is none of uint8, uint16 and float32.
    """
    white = _white(dtype)
    if _is_tensor(values):
        scaled = ((values.float() + 1) * (white / 2)).clamp(0, white)
        return scaled if white == 1 else scaled.round().to(getattr(sys.modules["torch"], _name(dtype)))
    scaled = np.clip((values.astype(np.float32) + 1) * (white / 2), 0, white)
    return scaled if white == 1 else np.rint(scaled).astype(_name(dtype))


@overload
def to_float(images: np.ndarray) -> np.ndarray: ...
@overload
def to_float(images: Tensor) -> Tensor: ...
def to_float(images: Any) -> Any:
    """Stored images -> float32 ``[B, C, H, W]`` in [-1, 1].

    uint8 ``u`` becomes ``u / 127.5 - 1``, uint16 ``u / 32767.5 - 1``, float32 ``2 u - 1``.

    Args:
        images: an array ``[B, H, W]`` or ``[B, H, W, C]``, or a tensor ``[B, H, W]`` or ``[B, C, H, W]``.

    Raises TypeError for any other type of values and ValueError for any other number of dimensions.
    """
    if images.ndim not in (3, 4):
        raise ValueError(f"images must have 3 or 4 dimensions, got shape {tuple(images.shape)}")
    floats = normalise(images)
    if images.ndim == 3:
        return floats[:, None]
    return floats if _is_tensor(floats) else np.ascontiguousarray(floats.transpose(0, 3, 1, 2))


@overload
def from_float(images: np.ndarray, dtype: Any) -> np.ndarray: ...
@overload
def from_float(images: Tensor, dtype: Any) -> Tensor: ...
def from_float(images: Any, dtype: Any) -> Any:
    """The networks' ``[B, C, H, W]`` in [-1, 1] -> stored images of ``dtype``, rounded and clipped as by `quantise`.

    A tensor keeps its shape; an array becomes ``[B, H, W]`` if C is 1, else ``[B, H, W, C]``.
    Raises TypeError for an unknown ``dtype`` and ValueError for another number of dimensions.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")
    stored = quantise(images, dtype)
    if _is_tensor(stored):
        return stored
    return stored[:, 0] if stored.shape[1] == 1 else np.ascontiguousarray(stored.transpose(0, 2, 3, 1))


def as_images(images: Any, name: str = "images") -> np.ndarray:
    """Whatever a caller has as a set of images: an array of any byte order, a list of arrays, or a tensor.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``, or a tensor ``[N, C, H, W]`` or ``[N, H, W]``; uint8, uint16 or
            floats in [0, 1]. float16 and float64 become float32.
        name: for messages.

    Raises InputError if it is none of these; ranges are not looked at.
    """
    if _is_tensor(images):
        planes = images.detach().cpu()
        if planes.ndim == 4:
            planes = planes.permute(0, 2, 3, 1)
        array = planes.float().numpy() if planes.is_floating_point() else planes.numpy()
        array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    else:
        try:
            array = images if isinstance(images, np.ndarray) else np.asarray(images)  # a mapped file stays one
        except ValueError as error:
            raise InputError(f"{name} must be arrays of one size and kind: {error}") from None
    if array.dtype.hasobject or array.dtype.kind not in "uf" or array.ndim not in (3, 4):
        raise InputError(
            f"{name} must be [N, H, W] or [N, H, W, C], uint8, uint16 or float32 in [0, 1], "
            f"got {array.dtype} {list(array.shape)}" + (": put one image in a list" if array.ndim == 2 else "")
        )
    dtype = np.dtype("float32") if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return array if array.dtype == dtype else array.astype(dtype)


@dataclass(frozen=True)
class ValueRange:
    """Of some images: the least and largest value, where 1 % are below and 1 % above, and what stands for white."""

    least: float
    largest: float
    low: float
    high: float
    white: int

    def __str__(self) -> str:
        return (
            f"{self.least:g} to {self.largest:g} (98 % of them {self.low:g} to {self.high:g}) "
            f"of {'0 to ' + format(self.white, 'd')}"
        )


def check_range(images: np.ndarray, path: Path, first: int, span: Span = UNIT) -> np.ndarray:
    """The images, with floats a hair outside ``span`` clipped; a copy only where there are such.

    Raises InputError if a float is further outside, or not a number. ``images[0]`` is image ``first`` of the file.
    """
    if images.dtype.kind != "f":
        return images
    low, high = span
    hair = HAIR * (high - low)
    good = ((images >= low - hair) & (images <= high + hair)).reshape(len(images), -1).all(axis=1)
    if not good.all():
        worst = int(np.argmin(good))
        raise InputError(f"{printable(path)}: image {first + worst}: {out_of_range(images[worst], span)}")
    outside = images.min() < low or images.max() > high
    return np.clip(images, np.float32(low), np.float32(high)) if outside else images


def out_of_range(values: np.ndarray, span: Span) -> str:
    """Why floats that are not all in ``span`` are refused, and the way out."""
    low, high = span
    rule = "in [0, 1]" if span == UNIT else f"in the refiner's range {low:g} to {high:g} (train --range)"
    if not np.isfinite(values).all():
        return f"float images must be {rule}, got NaN or infinity: give such pixels a value, such as the background's"
    least, largest = float(values.min()), float(values.max())
    way = ""
    if span == UNIT and least >= 0 and 1 < largest <= 255 and bool((values == np.rint(values)).all()):
        way = ": divide by 255"
    elif span == UNIT:
        way = "; train --range LO HI takes another range, such as metres, and the refiner keeps it"
    return f"float images must be {rule}, got {least:g} to {largest:g}{way}"


def in_units(images: Images, span: Span, name: str) -> Images:
    """Floats in ``span`` -> the same images in [0, 1].

    Raises InputError if they are no floats, or if one is not in ``span``. ``name`` is for messages.
    """
    if images.dtype != np.float32:
        raise InputError(f"--range must be given for float images, got {name} of {images.dtype}")
    low, high = span
    if isinstance(images, RaggedImages):
        found: Images = RaggedImages.empty(
            [(h, w) for h, w in images.sizes.tolist()], images.channels, "float32", Path()
        )
    else:
        found = allocate(images.shape, "float32", Path())
    for i in range(len(images)):
        if not bool(((images[i] >= low) & (images[i] <= high)).all()):
            raise InputError(f"{name}: image {i}: {out_of_range(images[i], span)}")
        found[i][...] = (images[i] - low) / (high - low)
    return found


def value_range(images: Images, span: Span = UNIT) -> ValueRange:
    """The range of stored values, of at most 256 images spread over the set; floats as shares of ``span``."""
    step = max(1, len(images) // 256)
    if isinstance(images, RaggedImages):
        values = np.concatenate([images[i].reshape(-1) for i in range(0, len(images), step)])
    else:
        values = np.ascontiguousarray(images[::step]).reshape(-1)
    if span != UNIT:
        values = (values - span[0]) / (span[1] - span[0])
    low, high = np.percentile(values[:: max(1, values.size // 1_000_000)], (1, 99))
    return ValueRange(float(values.min()), float(values.max()), float(low), float(high), _white(images.dtype))


def mismatch(synthetic: ValueRange, real: ValueRange) -> str | None:
    """What is wrong with two sides' ranges, if it is: a scale that one side does not share."""
    for name, side in (("synthetic", synthetic), ("real", real)):
        if side.white > 1 and side.largest <= 1 < side.white:
            return f"{name} values are at most {side.largest:g} of {side.white}: black to the networks"
    ours, theirs = (max(side.high, side.white / 1000) / side.white for side in (synthetic, real))
    if not 1 / APART < ours / theirs < APART:
        return (
            f"synthetic values reach {ours:.2g} of white and real ones {theirs:.2g}: is one side stored in another "
            "scale (12 bits in 16, 0 to 1 in 8)?"
        )
    return None


def _is_tensor(values: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _name(dtype: Any) -> str:
    """``np.uint8``, ``np.dtype("uint8")``, ``torch.uint8`` and ``"uint8"`` are all ``"uint8"``, in any byte order."""
    text = str(dtype)
    return text.removeprefix("torch.") if text.startswith("torch.") else np.dtype(dtype).name


def _white(dtype: Any) -> int:
    name = _name(dtype)
    if name not in WHITE:
        raise TypeError(f"stored images must be {', '.join(WHITE)}, got {name}")
    return WHITE[name]
