"""Where a set of decoded images goes: memory, or, where it would take too much of it, a file mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

SHARE = 2  # a set may take one part in SHARE of the memory that is available


def allocate(shape: tuple[int, ...], dtype: str | np.dtype, path: Path) -> np.ndarray:
    """An array to be filled. Beyond half of the available memory it is a `numpy.memmap` of a file without a name.

    The file is in the folder for temporary files ($TMPDIR) and goes with the array, whatever becomes of the process.

    Args:
        shape, dtype: of the array.
        path: where the images come from, for the message.

    Raises:
        InputError: it fits neither.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= available_memory() // SHARE:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full says so now
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise InputError(
            f"{printable(path)}: {size / 1e9:.1f} GB of images must fit half of the memory or the disk of "
            f"{printable(tempfile.gettempdir())} (TMPDIR): {error.strerror}"
        ) from error


def available_memory() -> int:
    """Bytes that the system can give without swapping; what it holds of files counts, since it can let go of that."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
