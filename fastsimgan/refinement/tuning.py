"""How many images a run of refinement takes at a time, whether R is compiled for them, and what its blocks are run by.

Decided when a run begins and kept in its ``run.json``: on a GPU all of it decides about rounding. Imports torch only
where there is a CUDA driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import warn

from fastsimgan.refinement.records import OPTIONAL, named

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 64
"""Images at a time, at most, on a CPU."""
BATCH_SIZE_CUDA = 1024
PIXELS_PER_BATCH = 1 << 18
"""At most, whatever the batch size says: a network's features take hundreds of bytes a pixel."""
MOST_PIXELS = 1 << 20  # on CUDA: 62 waves of tiles on 132 multiprocessors; twice as many would save 1 % of a last wave
PIXELS_PER_PROCESSOR = 1 << 13  # 64 tiles of 128 pixels, one after another
BYTES_PER_MAP = 48  # of a pixel: what is alive in a block, once for graphs and once for what runs without
SHARE_OF_MEMORY = 1 / 8  # of the GPU: others may be on it
RESIDUAL_BLOCK = "auto"  # what "auto" takes depends on the device's kind alone
COMPILE_FROM = 1e16
"""Operations in a run from which R is compiled for a GPU: a minute or two of them on an H100 (estimated; not measured),
where compiling takes half a minute in every worker."""


@dataclass(frozen=True)
class Choice:
    """Images and pixels at a time, whether R is compiled, and the implementation of its residual blocks.

    On the disk these are a part of a run's settings; there they stand only where they are not the CPU's.
    """

    batch_size: int = field(default=BATCH_SIZE, metadata=named("batch size", optional=True))
    pixels: int = field(default=PIXELS_PER_BATCH, metadata=named("pixels in a batch", optional=True))
    compiled: bool = field(default=False, metadata=OPTIONAL)
    residual_block: str = field(default=RESIDUAL_BLOCK, metadata=named("residual block", optional=True))


@dataclass(frozen=True)
class Shape:
    """What is known of a refiner from its file's header."""

    width: int = 64  # the paper's, and the usual one
    weights: int = 0  # 0: unknown


def on_cuda(device: str) -> bool:
    """Whether ``device``, as `choose_device` takes it, is CUDA here; raises as that does."""
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return False
    from fastsimgan.hardware.device import choose_device

    return choose_device(device).type == "cuda"


def choose(device: str, refiner: Path, images: tuple[int, int, int] | None, precision: str = "float32") -> Choice:
    """What a new run takes on this machine.

    On CUDA, as many pixels as keep every multiprocessor of the smallest device at work for `PIXELS_PER_PROCESSOR` of
    them, as a power of two from `PIXELS_PER_BATCH` to `MOST_PIXELS`, and no more than `SHARE_OF_MEMORY` holds; and R is
    compiled where all images have one size and there is work of `COMPILE_FROM`. In 16 bits there is a race then, whose
    times are printed: the implementation of R's residual blocks that wins on the first device is taken on all of them.

    Args:
        device: as `choose_device` takes it.
        refiner: the refiner's file or its run's folder.
        images: count, height and width, where all are of one size and nothing is to be encoded; else None.
        precision: what R computes in.

    Raises:
        InputError, UnavailableError: as `choose_device` does.
    """
    if not on_cuda(device):
        return Choice()
    import torch

    from fastsimgan.hardware.device import choose_device

    chosen = choose_device(device)
    shape = read_shape(refiner)
    every = range(torch.cuda.device_count()) if device in ("auto", "cuda") else [chosen]  # workers share them out
    about = [torch.cuda.get_device_properties(each) for each in every]
    pixels = useful_pixels(
        min(each.multi_processor_count for each in about), min(each.total_memory for each in about), shape.width
    )
    if images is None or 2.0 * shape.weights * math.prod(images) < COMPILE_FROM:
        return Choice(BATCH_SIZE_CUDA, pixels)
    if importlib.util.find_spec("triton") is None:
        warn("R is not compiled, although there is work enough: triton is not installed", stacklevel=2)
        return Choice(BATCH_SIZE_CUDA, pixels)
    count, height, width = images
    batch = min(count, fitting(BATCH_SIZE_CUDA, pixels, height, width))
    block = _fastest_block((batch, shape.width, height, width), precision, chosen)
    return Choice(BATCH_SIZE_CUDA, pixels, compiled=True, residual_block=block)


def _fastest_block(shape: tuple[int, int, int, int], precision: str, device: torch.device) -> str:
    from fastsimgan.hardware.precision import DTYPES
    from fastsimgan.ops import residual_block
    from fastsimgan.ops._dispatch import INTERPRETED
    from fastsimgan.ops.residual_block_race import race

    if precision == "float32" or INTERPRETED or residual_block.implementations()["triton"] is not None:
        return RESIDUAL_BLOCK
    result = race(shape, DTYPES[precision], False, device, features=DTYPES[precision])
    print(result, file=sys.stderr)
    return result.impl


def useful_pixels(processors: int, memory: int, width: int) -> int:
    """Pixels in a batch for a GPU of so many multiprocessors and bytes and a refiner of ``width`` feature maps."""
    useful = min(MOST_PIXELS, max(PIXELS_PER_BATCH, processors * PIXELS_PER_PROCESSOR))
    fit = int(memory * SHARE_OF_MEMORY) // (BYTES_PER_MAP * width)
    return 1 << max(0, min(useful, fit).bit_length() - 1)


def fitting(choice_size: int, pixels: int, height: int, width: int) -> int:
    """Images of one size in a full batch."""
    return max(1, min(choice_size, pixels // (height * width)))


def read_shape(refiner: Path) -> Shape:
    """Feature maps and weights by the header of a safetensors file; what a wrong or another file holds is unknown."""
    file = refiner / "refiner.safetensors" if refiner.is_dir() else refiner
    if file.suffix != ".safetensors":
        return Shape()
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(min(1 << 20, int.from_bytes(opened.read(8), "little"))))
        settings = json.loads(header.pop("__metadata__")["settings"])
        weights = sum(math.prod(each["shape"]) for each in header.values() if len(each["shape"]) == 4)
        return Shape(int(settings["width"]), weights)
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it says what is wrong
        return Shape()


def _has_driver() -> bool:
    """Whether torch could find a CUDA device: importing it, to ask, takes seconds."""
    if "torch" in sys.modules:
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
