"""Images of several sizes as one set: packed one after the other, with crops of one size out of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import SHARE, allocate, available_memory
from fastsimgan.storage.names import printable

Size = tuple[int, int]
"""(height, width)."""


class RaggedImages:
    """Images of one type and number of channels, of any sizes.

    Args:
        flat: the values of all images, ``[n]``, perhaps a ``numpy.memmap``; an image's are ``[H, W, C]`` in order.
        sizes: int64 ``[N, 2]``, (height, width) of each.
        channels: 1 or more.
        starts: int64 ``[N]``, where in ``flat`` each begins; None: one behind the other.
    """

    def __init__(
        self, flat: NDArray[Any], sizes: NDArray[np.int64], channels: int, starts: NDArray[np.int64] | None = None
    ) -> None:
        self.flat, self.sizes, self.channels = flat, sizes, channels
        lengths = sizes.prod(1) * channels
        self.starts: NDArray[np.int64] = np.cumsum(lengths) - lengths if starts is None else starts

    @classmethod
    def empty(cls, sizes: Sequence[Size], channels: int, dtype: str | np.dtype, path: Path) -> RaggedImages:
        """Images to be filled in; see `allocate`."""
        table = np.array(sizes, np.int64).reshape(-1, 2)
        return cls(allocate((int(table.prod(1).sum()) * channels,), dtype, path), table, channels)

    @classmethod
    def of(cls, images: Images) -> RaggedImages:
        """The same images, without a copy where an array's values lie in order."""
        if isinstance(images, RaggedImages):
            return images
        flat = images.reshape(-1) if images.flags.c_contiguous else np.ascontiguousarray(images).reshape(-1)
        channels = images.shape[3] if images.ndim == 4 else 1
        return cls(flat, np.tile(np.array([images.shape[1:3]], np.int64), (len(images), 1)), channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """One image, ``[H, W]``, or ``[H, W, C]`` where C is not 1; writing to it writes to the set."""
        (height, width), start = self.sizes[index].tolist(), int(self.starts[index])
        image = self.flat[start : start + height * width * self.channels]
        return image.reshape((height, width) if self.channels == 1 else (height, width, self.channels))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.flat.dtype

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return self.flat.nbytes

    @property
    def mapped(self) -> bool:
        """Whether they are in a file."""
        return isinstance(self.flat, np.memmap)

    def only(self, kept: Sequence[int]) -> RaggedImages:
        """The images of these numbers; nothing is copied."""
        return RaggedImages(self.flat, self.sizes[kept], self.channels, self.starts[kept])

    def __repr__(self) -> str:
        return f"RaggedImages({len(self)} images, {sizes_text(self.sizes)}, {self.channels} channel(s), {self.dtype})"


Images = NDArray[Any] | RaggedImages
"""A set: ``[N, H, W]``, ``[N, H, W, C]``, or of several sizes."""


def one_size(path: Path, any_size: bool, load_set: Callable[[], Images]) -> NDArray[Any]:
    """What ``load_set`` gives of ``path``, as an array. Raises InputError if images may be of ``any_size``."""
    if any_size:
        raise InputError(f"{printable(path)}: images of any size are given by load_set")
    images = load_set()
    assert not isinstance(images, RaggedImages)
    return images


class CentreCrops:
    """The middle of each image of a set, as an array would give it: by slices and by arrays of numbers.

    Args:
        images: the set.
        size: of the crops, at most each image's.

    Attributes:
        shape: ``(N, H, W)``, or ``(N, H, W, C)`` where C is not 1.
        dtype: as the set's.
    """

    def __init__(self, images: RaggedImages, size: Size) -> None:
        self._images, self._size = images, size
        self.shape: tuple[int, ...] = (len(images), *size, *((images.channels,) if images.channels > 1 else ()))
        self.dtype = images.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> NDArray[Any]:
        chosen = range(len(self))[which] if isinstance(which, slice) else which.tolist()
        crops = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for to, of in enumerate(chosen):
            free = self._images.sizes[of] - self._size
            crops[to] = crop_of(self._images[of], (int(free[0]) // 2, int(free[1]) // 2), self._size)
        return crops


def crop_of(image: NDArray[Any], corner: tuple[int, int], size: Size) -> NDArray[Any]:
    """A view of an image ``[H, W]`` or ``[H, W, C]``, from (row, column) on."""
    return image[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def sizes_of(images: Images) -> NDArray[np.int64]:
    """(height, width) of the images, ``[n, 2]``: of each, or one for all of an array."""
    if isinstance(images, RaggedImages):
        return images.sizes
    return np.array([images.shape[1:3]], np.int64)


def channels_of(images: Images) -> int:
    """Channels of a set."""
    if isinstance(images, RaggedImages):
        return images.channels
    return int(images.shape[3]) if images.ndim == 4 else 1


def sizes_text(sizes: NDArray[np.int64]) -> str:
    """ "480x640", or "7 sizes from 480x640 to 1080x1920"."""
    found = np.unique(sizes, axis=0)
    found = found[np.argsort(found.prod(1), kind="stable")]
    names = ["x".join(map(str, size)) for size in found.tolist()]
    return names[0] if len(names) == 1 else f"{len(names)} sizes from {names[0]} to {names[-1]}"


def pack(images: Sequence[NDArray[Any]]) -> Images:
    """A list of images ``[H, W]`` or ``[H, W, C]`` as a set: an array where all have one size.

    Raises InputError if two differ in type or number of channels.
    """
    kinds = [(image.dtype, image.shape[2:]) for image in images]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise InputError(
                f"images must be of one type and number of channels, number 0 is {kinds[0][0]} "
                f"{list(images[0].shape)} and number {number} is {kind[0]} {list(images[number].shape)}"
            )
    if len({image.shape for image in images}) == 1:
        return np.stack(list(images))
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    flat = np.concatenate([np.ascontiguousarray(image).reshape(-1) for image in images])
    return RaggedImages(flat, sizes, images[0].shape[2] if images[0].ndim == 3 else 1)


class Packer:
    """Takes images one by one, whose number and sizes nobody knows yet.

    Beyond what `allocate` would keep in memory they go into a file without a name that goes with the set.

    Args:
        path: where the images come from, for messages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[NDArray[Any]] = []
        self._sizes: list[Size] = []
        self._held, self._most = 0, available_memory() // (2 * SHARE)  # at the end the parts are there twice
        self._file: IO[bytes] | None = None

    def add(self, image: NDArray[Any]) -> None:
        """One more ``[H, W]`` or ``[H, W, C]``, of the first one's type and channels. Raises InputError: disk full."""
        self._sizes.append((image.shape[0], image.shape[1]))
        self._parts.append(image)
        self._last = image  # says what kind they are
        self._held += image.nbytes
        if self._held > self._most or self._file is not None:
            self._spill()

    def _spill(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile()
            for part in self._parts:
                self._file.write(np.ascontiguousarray(part).data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{printable(self._path)}: images must fit a quarter of the memory or the disk of "
                f"{printable(tempfile.gettempdir())} (TMPDIR): {error.strerror}"
            ) from error
        self._parts, self._held = [], 0

    def finish(self) -> Images:
        """The set: an array where all have one size."""
        last = self._last
        channels = last.shape[2] if last.ndim == 3 else 1
        if self._file is not None:
            length = os.fstat(self._file.fileno()).st_size // last.itemsize
            flat: NDArray[Any] = np.memmap(self._file, last.dtype, "r+", shape=(length,))
            self._file.close()
        else:
            flat = np.concatenate([np.ascontiguousarray(part).reshape(-1) for part in self._parts])
        self._parts.clear()
        if len(set(self._sizes)) == 1:
            return flat.reshape(len(self._sizes), *last.shape)
        return RaggedImages(flat, np.array(self._sizes, np.int64), channels)
