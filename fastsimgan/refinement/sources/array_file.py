"""A packed file as work units: ranges of its images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastsimgan.data.formats.array_file import check_images
from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.pixel_values import Span, check_range
from fastsimgan.errors import InputError
from fastsimgan.refinement.records import named
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.sources.unit_parts import Decoded, SourceIdentity, absolute
from fastsimgan.storage.names import printable


@dataclass(frozen=True)
class ArraysIdentity(SourceIdentity):
    """What makes two packed files the same one."""

    size_and_time: tuple[int, int] = field(metadata=named("input size and time"))  # bytes, ns
    per_unit: int = field(metadata=named("images in a block"))
    key: str = field(metadata=named("array"))


class ArrayFile:
    """An ``.npz``, ``.npy`` or HDF5 file as work units.

    Args:
        arrays: the opened file.
        batch_size: images refined at a time, at least 1; a unit has a multiple of them.

    Attributes:
        shape: ``[N, H, W]`` or ``[N, H, W, C]`` of its images.
        per_unit: images in a work unit; the last may have fewer.
        work_units: how many there are.
    """

    def __init__(self, arrays: ArrayImages | HDF5Images, batch_size: int) -> None:
        self.arrays = arrays
        self.path: Path = arrays.path
        self.kind = "hdf5" if isinstance(arrays, HDF5Images) else "npz" if arrays.archive else "npy"
        self.shape = check_images(arrays.path, arrays.key, arrays.stored_shape, arrays.stored_dtype)
        channels, height, width = arrays.shape
        self.channels = channels
        self.size = height, width
        nbytes = channels * height * width * arrays.dtype.itemsize
        self.per_unit = max(1, unit_parts.BYTES_PER_UNIT // nbytes // batch_size) * batch_size
        self.work_units = -(-len(arrays) // self.per_unit)
        status = self.path.stat()
        self.identity = ArraysIdentity(
            absolute(self.path), self.kind, (status.st_size, status.st_mtime_ns), self.per_unit, arrays.key
        )

    def range(self, work_unit: int) -> tuple[int, int]:
        """First image of a unit, and the one after its last."""
        return work_unit * self.per_unit, min(len(self.arrays), (work_unit + 1) * self.per_unit)

    def only_arrays(self, to: str) -> None:
        """Raise InputError if the file holds what its conversion to ``to`` has no place for."""
        if isinstance(self.arrays, HDF5Images):  # an .npz cannot hold such a thing
            self.arrays.only_arrays(to)

    def check_channels(self, channels: int) -> None:
        """Raise InputError if the images have others than a refiner's ``channels``."""
        if self.channels != channels:
            raise InputError(
                f"{printable(self.path)}: images must have {channels} channel(s), as the refiner has, "
                f"got {self.channels}"
            )


class ImageRange:
    """One work unit's images, to be taken batch by batch in their order.

    Args:
        file: what they are out of.
        work_unit: which unit.
        span: in which floats must lie.

    Raises:
        InputError: if they cannot be read.
    """

    def __init__(self, file: ArrayFile, work_unit: int, span: Span) -> None:
        self.file = file
        self.first, end = file.range(work_unit)
        self._span = span
        self._stored = file.arrays.read_range(self.first, end)
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of each image."""
        return self.file.size

    def take(self, start: int, end: int) -> tuple[np.ndarray, list[Decoded] | None]:
        """Images ``start`` to ``end - 1`` of the range, ``[n, H, W]`` or ``[n, H, W, C]`` as they are read.

        With them come the samples of which they are the images, without pixels; None where they stay arrays.

        Raises:
            InputError: if a float is outside the span.
        """
        piece = np.ascontiguousarray(self._stored[start:end])
        self._digest.update(piece.reshape(-1).view(np.uint8).data)
        piece = np.array(piece, dtype=self.file.arrays.dtype)  # torch wants memory that it may write to
        return check_range(piece, self.file.path, self.first + start, self._span), None

    def sha256(self) -> str:
        """SHA-256 of the stored images that were taken, one after another."""
        return self._digest.hexdigest()
