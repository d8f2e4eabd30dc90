"""A large picture in tiles, so that its features never fill the memory: each tile sees as far around it as R does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BYTES = 3 << 25
"""Of one layer's features in float32, about which a tile has; three or four layers are alive at a time."""
NARROW = 32
"""Feature maps that a narrower refiner is counted as: libraries pad to whole vectors, and a pixel has other costs."""
ALIGNED = 48
"""Tiles begin at multiples of this many rows and columns: Winograd's own tiles then lie as they do in the whole."""


def margin(settings: Mapping[str, Any]) -> int:
    """Pixels that R sees each way: half of the first kernel, and two 3x3 convolutions a block."""
    return int(settings["first_kernel"]) // 2 + 2 * int(settings["blocks"])


def pixels(settings: Mapping[str, Any]) -> int:
    """Pixels of a picture up to which it is refined whole."""
    return BYTES // (4 * max(NARROW, int(settings["width"])))


def in_tiles(call: Callable[[Tensor], Tensor], images: Tensor, *, margin: int, most: int, dtype: torch.dtype) -> Tensor:
    """``call(images)`` for a ``call`` whose output at a pixel depends on ``margin`` pixels around it, tile by tile.

    Args:
        call: ``[1, C, h, w]`` -> the same shape, of ``dtype``; zeros lie beyond the borders.
        images: ``[B, C, H, W]``.
        margin: as above.
        most: pixels of a tile, about.
        dtype: of what comes out.
    """
    around = -(-margin // ALIGNED) * ALIGNED
    side = max(ALIGNED, (int(most**0.5) - 2 * around) // ALIGNED * ALIGNED)
    height, width = images.shape[2:]
    out = torch.empty_like(images, dtype=dtype)
    for image in range(len(images)):
        for top in range(0, height, side):
            for left in range(0, width, side):
                first, before = _start(top, height, side, around), _start(left, width, side, around)
                rows, columns = slice(first, top + side + around), slice(before, left + side + around)
                tile = call(images[image : image + 1, :, rows, columns])
                inner = tile[0, :, top - first :, left - before :][:, :side, :side]
                out[image, :, top : top + side, left : left + side] = inner
    return out


def _start(place: int, length: int, side: int, around: int) -> int:
    """Where the tile begins whose inner part begins at ``place``: the last one further back, so that it is no smaller.

    Libraries take other paths for small pictures, which round otherwise.
    """
    return max(0, min(place - around, (length - side - 2 * around) // ALIGNED * ALIGNED))
