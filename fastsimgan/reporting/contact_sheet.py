"""Contact sheets: the quickest way to see what a refiner does."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.pixel_values import from_float
from fastsimgan.storage.atomic import write_atomically

_LABEL_WIDTH = 76  # pixels left of the rows, for their names


def save_contact_sheet(path: Path, synthetic: Tensor, refined: Tensor, real: Tensor) -> None:
    """Write a PNG of four rows: synthetic, refined, their difference, and the nearest real image of each.

    The difference is drawn around mid-grey, at half its size, so that black and white are changes of the full range.
    "Nearest" is the smallest Euclidean distance to the refined image after a 4x4 mean, which forgives noise.

    Args:
        path: where; replaced at once if it is there.
        synthetic, refined: ``[N, C, H, W]`` in [-1, 1].
        real: ``[M, C, H, W]`` in [-1, 1].
    """
    nearest = torch.cdist(_coarse(refined), _coarse(real)).argmin(1)
    rows = {
        "synthetic": synthetic,
        "refined": refined,
        "difference": (refined - synthetic) / 2,
        "nearest real": real[nearest],
    }
    save_rows(path, {name: _pixels(images) for name, images in rows.items()})


def save_rows(path: Path, rows: dict[str, NDArray[np.uint8]]) -> None:
    """Write a PNG with one named row of images, each ``[N, H, W]`` or ``[N, H, W, 3]`` uint8, under the other."""
    height, width = next(iter(rows.values())).shape[1:3]
    zoom = max(1, round(120 / width))  # small images are shown larger, without smoothing
    count = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (_LABEL_WIDTH + count * (width * zoom + 2), len(rows) * (height * zoom + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (height * zoom + 2)
        draw.text((4, top + height * zoom // 2 - 6), name, fill="black")
        for column, pixels in enumerate(images):
            tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (_LABEL_WIDTH + column * (width * zoom + 2), top))
    encoded = io.BytesIO()
    sheet.save(encoded, format="PNG")
    write_atomically(path, encoded.getvalue())


def _coarse(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, min(4, *images.shape[2:])).flatten(1)


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    return from_float(images.cpu().numpy(), np.uint8)
