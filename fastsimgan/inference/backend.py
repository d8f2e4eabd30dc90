"""What runs R, as `Refiner` sees it."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Precision = Literal["float32", "float16", "bfloat16"]


class Backend(Protocol):
    """R on one device. Called with ``[B, C, H, W]`` of ``dtype`` on that device; returns the same."""

    name: str
    """``torch``, ``int8`` (our kernels), ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``, and what it computes in."""
    dtype: torch.dtype
    """uint8: stored images, everything is done inside. float32: prepared images in [-1, 1]."""
    largest_batch: int | None
    """Images that one call may have; None is any number."""

    def __call__(self, images: Tensor) -> Tensor: ...
