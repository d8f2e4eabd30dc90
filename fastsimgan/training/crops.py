"""Which part of each image a training step sees: all of it, or a random crop of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastsimgan.config import TrainConfig
from fastsimgan.data.ragged import Images, Size, channels_of, sizes_of, sizes_text
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import available_memory
from fastsimgan.inference import tiles
from fastsimgan.models import discriminator
from fastsimgan.training.data_parallel import DataParallelGroup

SMALL = 256 * 256
"""Pixels up to which images that are all of one size are trained on whole: the paper's have 35x55 and 224x224."""

BUDGET = {"cpu": 1 << 29, "cuda": 8 << 30}
"""Bytes that a step's features and the history may take where the crop's size is ours to choose. On a CPU it is time
that a step takes, rather than memory, that asks for small ones."""

STEP = 8  # a side that is ours to choose is a multiple of it


@dataclass(frozen=True)
class Crop:
    """The (height, width) that networks see; whether every image has just that; why, for a person, or ""."""

    size: Size
    whole: bool
    reason: str


def field(config: TrainConfig) -> int:
    """Pixels each way that one output of R or of D depends on, the larger of the two."""
    first = 7 if config.network == "hand" else 3
    sees = 2 * tiles.margin({"first_kernel": first, "blocks": config.blocks}) + 1
    return max(sees, discriminator.receptive_field(config.network))


def step_bytes(config: TrainConfig, channels: int) -> int:
    """About what a training step takes a pixel of the crop: features kept for backward, and the history.

    A block of R keeps three layers' features; D's first layer has a quarter of 96 a pixel. Measured in float32 on a CPU
    (peak RSS over that before the first iteration, batch 8, crops of 128x128): 3,922 bytes an image and pixel with 64
    maps and RGB, where this says 4,144; 2,523 with 32 and grey, 2,192.
    """
    part = config.batch_size // config.accumulate
    blocks = 1 if config.recompute else config.blocks
    features = 4 * (config.hidden_channels * (3 * blocks + 3) + 64 + 4 * channels)
    return part * features + config.history * channels


def choose_crop(
    sets: Mapping[str, Images],
    config: TrainConfig,
    device: torch.device,
    group: DataParallelGroup | None = None,
) -> Crop:
    """The size of the crops for both sides: ``config.crop``, or by what the images and the memory allow.

    Args:
        sets: "synthetic" and "real".
        config: its ``crop``, and what decides about memory.
        device: that is trained on.
        group: the processes that share each batch; None is this one alone.

    Raises:
        InputError: the crop does not fit an image, or is too small for the networks to see a patch whole.
    """
    sizes = {name: np.unique(sizes_of(images), axis=0) for name, images in sets.items()}
    together = np.unique(np.concatenate(list(sizes.values())), axis=0)
    height, width = (int(least) for least in together.min(0))
    one = len(together) == 1
    least = field(config)
    if config.crop is not None:
        _check_fits(config.crop, sizes, sets)
        for side, name, smallest in zip(config.crop, ("high", "wide"), (height, width), strict=True):
            if side < min(least, smallest):
                raise InputError(
                    f"--crop must be at least {least}x{least}, which a value of R or D depends on, got {side} {name}"
                )
        whole = one and config.crop == (height, width)
        return Crop(config.crop, whole, "" if whole else f"{_text(config.crop)} at random places (--crop)")
    if one and (height * width <= SMALL or config.resume):  # a run that chose crops says so, see `RunDirectory`
        return Crop((height, width), True, "")
    if min(height, width) < least:
        name = next(name for name, found in sizes.items() if int(found.min()) < least)
        number = int(np.argmax(sizes_of(sets[name]).min(1) < least))
        small = _text(tuple(sizes_of(sets[name])[number].tolist()))
        raise InputError(
            f"{name} images of several sizes must be at least {least}x{least} pixels, which a value of R or D depends "
            f"on, got {small} (image {number}): leave such images out, or --crop H W up to that size"
        )
    channels = channels_of(next(iter(sets.values())))
    group = group or DataParallelGroup()
    budget = group.smallest(_budget(device))
    pixels = budget * group.size // step_bytes(config, channels)
    # about square, and the other side longer where one is all that there is
    high = _rounded(min(height, max(least, int(pixels**0.5), pixels // width)), height, least)
    wide = _rounded(min(width, max(least, pixels // high)), width, least)
    limit = f"{budget / (1 << 30):.2g} GiB a step"
    if one and (high, wide) == (height, width):
        return Crop((height, width), True, f"images whole, {_text((high, wide))}: they fit {limit} (--crop H W)")
    among = ", ".join(f"{name} {sizes_text(found)}" for name, found in sizes.items())
    why = f"the largest that fits every image and {limit}"
    if high * wide > pixels:
        takes = high * wide * step_bytes(config, channels) / group.size / (1 << 30)
        why = f"no smaller ones show R and D all that a value depends on; a step takes about {takes:.2g} GiB"
    reason = f"{_text((high, wide))} at random places of images ({among}): {why} (--crop H W)"
    return Crop((high, wide), False, reason)


def _budget(device: torch.device) -> int:
    """`BUDGET`, or half of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return int(min(BUDGET[device.type], free // 2))


def _rounded(side: int, longest: int, least: int) -> int:
    """A multiple of `STEP`, unless it is all that an image has."""
    return side if side == longest else max(least, side // STEP * STEP)


def _check_fits(crop: Size, sizes: Mapping[str, np.ndarray], sets: Mapping[str, Images]) -> None:
    for name, found in sizes.items():
        if (found < crop).any():
            number = int(np.argmax((sizes_of(sets[name]) < crop).any(1)))
            small = _text(tuple(sizes_of(sets[name])[number].tolist()))
            raise InputError(f"--crop must fit every image, got {_text(crop)} and {name} image {number} of {small}")


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
