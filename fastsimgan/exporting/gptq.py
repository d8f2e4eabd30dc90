"""Rounding a refiner's residual branches to 8 bits: what is seen of images like those to come, and weights that make up
for each other's errors (Frantar et al., 2023, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.models import refiner as network

Array = NDArray[Any]

_NEIGHBOURHOODS = 1 << 15  # of which moments are taken: four times as many change nothing (0.1 dB)


@torch.no_grad()
def calibrate(module: network.Refiner, images: Tensor) -> dict[str, Array]:
    """What rounding to 8 bits has to know of each block, over images like those to come.

    ``blocks.I.in``, ``blocks.I.hidden`` and ``blocks.I.branch`` are each channel's largest magnitude (``[width]``);
    ``blocks.I.conv1`` and ``blocks.I.conv2`` the second moments of what the layer's kernels see, with a 1 for the
    bias (``[9 * width + 1, 9 * width + 1]``). ``images`` is ``[B, C, H, W]`` in [-1, 1].
    """
    x = F.relu(module.first(images))
    found = {}
    for index, block in enumerate(module.blocks):
        assert isinstance(block, network.ResidualBlock)
        hidden = F.relu(block.conv1(x))
        branch = block.conv2(hidden)
        for name, value in (("in", x), ("hidden", hidden), ("branch", branch)):
            found[f"blocks.{index}.{name}"] = value.abs().amax((0, 2, 3)).numpy()
        found[f"blocks.{index}.conv1"], found[f"blocks.{index}.conv2"] = moments_of(x), moments_of(hidden)
        x = F.relu(x + branch)
    return found


def moments_of(features: Tensor) -> Array:
    """Means of the products of any two values in a 3x3 neighbourhood (as weights ``[C, 3, 3]``), a 1 behind them."""
    count, _, height, width = features.shape
    pixels = torch.arange(count * height * width)
    if len(pixels) > _NEIGHBOURHOODS:  # at random: any regular step is in step with the width of some images
        pixels = torch.randint(len(pixels), (_NEIGHBOURHOODS,), generator=torch.Generator().manual_seed(0))
    image, y, x = pixels // (height * width), pixels // width % height, pixels % width
    padded = F.pad(features, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    taps = torch.stack([padded[image, y + dy, x + dx] for dy in range(3) for dx in range(3)], 2).flatten(1)
    seen = torch.cat([taps, taps.new_ones(len(taps), 1)], 1)
    means: Array = (seen.T @ seen).double().div(len(seen)).numpy()
    return means


def compensated(weights: Array, moments: Array, rounded: Callable[[Array], Array], top: float) -> Array:
    """Rounded weights whose layer's output is nearest to the exact one's: columns are rounded one after the other, and
    those behind make up for each one's error as far as they see the same (Frantar et al., 2023, arXiv 2210.17323).

    Args:
        weights: ``[outputs, inputs + 1]``, in units of the grid; the last column is the bias, which stays exact.
        moments: ``[inputs + 1, inputs + 1]``, means of the products of what the columns are multiplied by.
        rounded: to the grid.
        top: the grid's largest magnitude.
    """
    damped = moments + np.eye(len(moments)) * 1e-3 * np.trace(moments) / len(moments)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    columns = weights.T.astype(np.float64)
    for index in range(len(moments) - 1):
        exact = columns[index].copy()
        columns[index] = rounded(exact.clip(-top, top))
        error = (exact - columns[index]) / factor[index, index]
        columns[index + 1 :] -= factor[index, index + 1 :, None] * error
    result: Array = columns.T
    return result


def to_float8(values: Array) -> Array:
    """The nearest numbers that float8 e4m3 has, float64."""
    rounded: Array = torch.from_numpy(values).to(torch.float8_e4m3fn).double().numpy()
    return rounded
