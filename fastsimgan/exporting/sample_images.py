"""The images that an export compares its files on, and calibrates the quantised ones on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.reading import Reading
from fastsimgan.data.simulators.builtin import builtin_pair
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

COMPARED = 64
"""Images on which each file is compared with PyTorch, at most; the quantised ones are calibrated on as many others."""


def _images_in(path: Path) -> Callable[[str], str]:
    """How to say which files of a folder are the images to compare on: the folder and a glob, as one path."""
    return lambda glob: f"--images '{printable(path)}/{glob}'"


def sample_images(path: Path | None, channels: int, key: str | None) -> tuple[Tensor, str]:
    """uint8 ``[N, C, H, W]`` to compare and calibrate on, and what they are."""
    if path is None:
        if channels == 1:
            return torch.from_numpy(builtin_pair(0)[0]["images"][: 2 * COMPARED])[:, None], "the built-in eyes"
        noise = torch.randint(0, 256, (2 * COMPARED, channels, 32, 32), generator=torch.Generator().manual_seed(0))
        return noise.to(torch.uint8), "noise, for want of --images"
    source = open_images(path, Reading(key=key, links="inside", flag=_images_in(path)))
    array = source.load()
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        array = np.rint(array * 255).astype(np.uint8)
    chosen = np.linspace(0, len(array) - 1, min(len(array), 2 * COMPARED)).astype(int)
    chosen = np.concatenate([chosen[::2], chosen[1::2]])  # both halves from the whole set
    planes = torch.from_numpy(array[chosen])
    planes = planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2).contiguous()
    if planes.shape[1] != channels:
        raise InputError(
            f"{printable(path)}: images must have {channels} channel(s), as the refiner has, got {planes.shape[1]}"
        )
    return planes, f"{min(COMPARED, len(planes))} of {printable(path.name)}"
