"""Pixel values: how stored images become the networks' numbers and come back, for NumPy arrays and for torch tensors.

Stored images are ``uint8`` in [0, 255], ``uint16`` in [0, 65535] or ``float32`` in [0, 1]. The networks see ``float32``
in [-1, 1], because the refiner ends in a tanh. Arrays keep channels last (``[B, H, W]`` or ``[B, H, W, C]``), as files
do; tensors keep them first (``[B, C, H, W]``), as networks do.

torch is never imported here: a caller who holds a tensor has imported it already.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

#: The stored types, and the value that stands for white in each.
WHITE = {"uint8": 255, "uint16": 65535, "float32": 1}


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
