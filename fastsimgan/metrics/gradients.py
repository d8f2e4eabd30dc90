"""Where dark meets light in an image: gradients, and their values between pixels.

Positions are (x, y) in pixels, (0, 0) the centre of the top left pixel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.pixel_values import to_float

Array = NDArray[Any]

REACH = 3.0
"""Shifts are looked for up to this many pixels each way, at 35x55; the reach grows with the image."""


def grey(images: Array) -> Tensor:
    """Stored images ``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, 1, H, W]`` in [-1, 1], colour averaged."""
    planes: Tensor = torch.from_numpy(to_float(np.ascontiguousarray(images)))
    return planes.mean(1, keepdim=True)


def zoom_of(images: Tensor) -> float:
    """How much larger ``images`` ``[N, C, H, W]`` are than 35x55, at which lengths are stated."""
    return min(images.shape[2] / 35, images.shape[3] / 55)


def gradients_of(images: Tensor, zoom: float) -> Tensor:
    """Derivatives of Gaussian-smoothed ``images`` ``[N, 1, H, W]``: ``[N, 2, H, W]``, (x, y), per pixel."""
    sigma = 1.0 * zoom
    reach = math.ceil(3 * sigma)
    axis = torch.arange(-reach, reach + 1).float()
    bump = (-((axis / sigma) ** 2) / 2).exp()
    bump /= bump.sum()
    slope = axis / sigma**2 * bump
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    kernels = torch.stack([bump[:, None] * slope, slope[:, None] * bump])[:, None]
    return F.conv2d(padded, kernels)


def flattened(gradients: Tensor) -> Tensor:
    """Gradients with their strength compressed: one glaring edge must not outvote the rest."""
    strength = gradients.square().sum(1, keepdim=True).sqrt()
    return gradients / (strength + strength.mean((2, 3), keepdim=True) + 1e-6)


def sample(fields: Tensor, places: Tensor) -> Tensor:
    """Bilinear values ``[N, ..., C]`` of ``fields`` ``[N, C, H, W]`` at ``places`` ``[N, ..., 2]``; 0 outside."""
    height, width = fields.shape[2:]
    grid = (places + 0.5) * (2 / torch.tensor([width, height])) - 1
    values = F.grid_sample(fields, grid.flatten(1, -2)[:, None], align_corners=False)  # one long row: it is vectorised
    return values[:, :, 0].transpose(1, 2).unflatten(1, places.shape[1:-1])
