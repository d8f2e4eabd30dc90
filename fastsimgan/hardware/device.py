"""The device asked for by name, and the memory order in which convolutions are fastest."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsimgan.errors import InputError, UnavailableError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def channels_last(module: AnyModule, device: torch.device) -> AnyModule:
    """Move ``module`` to ``device`` with its weights in channels_last, in which convolutions are faster."""
    # torch's own annotation of Module.to leaves memory_format out
    moved: AnyModule = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def images_channels_last(images: Tensor) -> Tensor:
    """``[N, C, H, W]`` in channels_last by its strides as well.

    Contiguous images of one channel count as channels_last, but convolutions take them for the other order and give
    their feature maps in it, to be turned at once by the next layer.
    """
    count, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(-1)
    return pixels.view(count, height, width, channels).permute(0, 3, 1, 2)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU; anything else is taken at its word.

    A CUDA device comes with its index: "cuda" alone would mean another one as soon as another is current.

    Raises:
        InputError: not a device's name.
        UnavailableError: CUDA was asked for and there is none, or none of that index.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device must be "auto", "cpu" or "cuda", got {name!r}') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"device {name!r} was asked for, and torch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnavailableError(f"device {name!r} was asked for, and there are {torch.cuda.device_count()} here")
        return torch.device("cuda", index)
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Where ``device`` is CUDA's current one; nothing on a CPU.

    Work that names no device goes to the current one: streams, captures of CUDA graphs, Triton's launches. On another
    than the tensors' it is wrong without an error.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def short_of_memory(device: torch.device, way_out: str) -> Iterator[None]:
    """Where a CUDA device without memory for what is asked of it becomes an UnavailableError that ends in ``way_out``.

    On a CPU nothing changes: there the system decides, and seldom by an error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        asked = next(iter(re.findall(r"Tried to allocate ([\d.]+ \w+)", str(error))), "more")
        raise UnavailableError(
            f"{device} must have memory for {asked} at once, got {free / 2**20:.0f} MiB free of "
            f"{total / 2**20:.0f} MiB: {way_out}"
        ) from error


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of giving them back to the system; does nothing elsewhere.

    Training on a CPU allocates and frees the same large activations in every step, and by default each one is mapped
    and zeroed by the kernel anew: a fifth of a step's time for the gaze refiner on two cores.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and the heap's end stays


def keep_some_freed_memory() -> None:
    """Have glibc keep freed memory, up to 64 MiB in each of its arenas, as it does in any process that has freed a
    block of 32 MiB once; the process keeps it so.

    For those who refine: a layer's features are freed after the next, and by default their pages are given back to the
    system and zeroed anew a dozen times a batch, which can take as long as the layers do in 8 bits.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)  # never touched, so no memory is taken
