"""Stored images as R sees them: equalised where it was trained so, then in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimgan.data.equalisation import equalise
from fastsimgan.data.pixel_values import from_float, to_float
from fastsimgan.hardware.device import images_channels_last


def prepare(images: Tensor, histogram: str) -> Tensor:
    """Stored images ``[N, C, H, W]`` to what R sees: equalised if ``histogram`` is "equalise", then in [-1, 1]."""
    return images_channels_last(to_float(equalised(images, histogram)))


def equalised(images: Tensor, histogram: str) -> Tensor:
    """Stored images ``[N, C, H, W]``, equalised if ``histogram`` is "equalise"; floats become uint16 then."""
    if histogram != "equalise":
        return images
    # equalisation counts grey values, so floats take 16 bits on the way in
    return equalise(from_float(to_float(images), torch.uint16) if images.is_floating_point() else images)
