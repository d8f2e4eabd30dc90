"""What the files of arrays (``.npz``, ``.npy``, HDF5) have in common: which array holds the images, and its rules."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from fastsimgan.data.pixel_values import Span
from fastsimgan.data.ragged import Images
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

IMAGES = "images"  # the array that holds the images
FILES = "files/"  # members of an .npz under this name are files that travel along, not arrays
MAX_CHANNELS = 4  # anything larger in last place is not channels: most likely the array is [N, C, H, W]
_SMALLEST = 8  # height and width from which on an unnamed array is taken for images


class PackedImages(ABC):
    """Images of one size and kind in one file, with labels and other files beside them.

    Attributes:
        path: the file.
        span: in which floats must lie.
        key: the array of the images.
        images_shape: ``(N, H, W)`` or ``(N, H, W, C)``; of one picture, N is 1.
        stored_shape, stored_dtype: as the file has them.
        label_names: arrays of length N.
        other_names: arrays that belong to no image, and travel along.
    """

    path: Path
    span: Span
    key: str
    images_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype
    label_names: list[str]
    other_names: list[str]
    left_out: tuple[str, ...] = ()
    """Of a file all images are taken."""

    def __len__(self) -> int:
        return self.images_shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels = self.images_shape[3] if len(self.images_shape) == 4 else 1
        return channels, self.images_shape[1], self.images_shape[2]

    @property
    def dtype(self) -> np.dtype:
        """The images' type as they are read: uint8, uint16 or float32, in native byte order."""
        return read_as(self.stored_dtype)

    @property
    def bit_depth(self) -> int:
        """Bits a channel: 8, 16 or 32."""
        return self.stored_dtype.itemsize * 8

    @property
    @abstractmethod
    def file_names(self) -> list[str]:
        """Names of the files that travel along, without ``files/``."""

    @abstractmethod
    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""

    @abstractmethod
    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, C]``, of `dtype`.

        Raises InputError if the file's data is damaged or a float is outside ``span``.
        """

    def load_set(self) -> Images:
        """As `load`: images of a file have one size."""
        return self.load()

    @abstractmethod
    def read_range(self, first: int, end: int) -> np.ndarray:
        """Images ``first`` to ``end - 1`` as the file holds them; floats unchecked. Raises InputError if damaged."""

    @abstractmethod
    def labels(self) -> dict[str, np.ndarray]:
        """The other arrays of length N by name. Raises InputError if they are damaged."""

    @abstractmethod
    def others(self) -> dict[str, np.ndarray]:
        """The arrays of other lengths, by name. Raises InputError if they are damaged."""

    @abstractmethod
    def label_sha256(self) -> dict[str, str]:
        """SHA-256 of every other array, and one of all files. Raises InputError if one is damaged."""

    @abstractmethod
    def write_again(self, path: Path, images: Iterable[np.ndarray]) -> None:
        """Write this file at ``path`` with other images of the same shape and type; all else is copied as it is stored.

        ``images`` are consecutive pieces ``[n, H, W(, C)]`` that add up to all N.
        Raises InputError if an array to be copied is damaged, OSError if ``path`` cannot be written.
        """

    @abstractmethod
    def read_file(self, name: str) -> bytes:
        """The bytes of one of `file_names`. Raises InputError if they are damaged."""

    @abstractmethod
    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file that travels along. Raises InputError if one is damaged."""

    def file_sha256(self) -> dict[str, str]:
        """SHA-256 of every one of `files`, by name. Raises InputError if one is damaged."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files()}


def combined_sha256(files: dict[str, str]) -> dict[str, str]:
    """One SHA-256 of many files' names and SHA-256, under the name ``files/``; nothing where there are none."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{files[name]} {name}\n".encode("utf-8", "surrogateescape"))
    return {FILES: digest.hexdigest()} if files else {}


def read_as(stored: np.dtype) -> np.dtype:
    """The type in which images are read: floats of any length are float32, integers stay what they are."""
    return np.dtype("float32") if stored.kind == "f" else stored.newbyteorder("=")


def choose_key(path: Path, held: Mapping[str, tuple[tuple[int, ...], np.dtype]], key: str | None) -> str:
    """The name of the array of images among those that a file holds, by name with shape and type.

    Raises InputError if the asked-for one is not there; if nothing was asked for, and there is neither ``images`` nor
    just one array that can be images.
    """
    if key is not None:
        if key not in held:
            raise InputError(
                f"{printable(path)}: must hold an array named {printable(key)} (--key), got {_names(held)}"
            )
        return key
    if IMAGES in held:
        return IMAGES
    found = [name for name, (shape, dtype) in held.items() if _may_be_images(shape, dtype)]
    if len(found) > 1 and len(usual := [name for name in found if name.lower() in _USUAL]) == 1:
        return usual[0]
    if len(found) != 1:
        raise InputError(
            f"{printable(path)}: must hold an array named images, got {_names(held)}"
            + (f"; --key NAME tells which: {_names(found)}" if found else "")
        )
    return found[0]


def _may_be_images(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    if dtype.hasobject or (dtype.kind, dtype.itemsize) not in _KINDS or len(shape) not in (3, 4):
        return False
    height, width = shape[:2] if len(shape) == 3 and shape[2] <= MAX_CHANNELS else shape[1:3]
    return min(height, width) >= _SMALLEST and (len(shape) == 3 or shape[3] <= MAX_CHANNELS)


_USUAL = ("image", "colors", "colours", "color", "colour", "rgb", "arr_0")
_KINDS = {("u", 1), ("u", 2), ("f", 2), ("f", 4), ("f", 8)}


def check_images(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape ``[N, H, W]`` or ``[N, H, W, C]`` of an array of images; of one picture, N is 1.

    Raises InputError if it cannot be images.
    """
    if dtype.hasobject or (dtype.kind, dtype.itemsize) not in _KINDS:
        got = "Python objects (pickled)" if dtype.hasobject else dtype.newbyteorder("=").name
        way = ": astype(np.uint8), where they are 0 to 255" if dtype.kind == "i" else ""
        raise InputError(
            f"{printable(path)}: {printable(name)} must be uint8, uint16 or float32 in [0, 1], got {got}{way}"
        )
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) >= _SMALLEST):
        shape = (1, *shape)
    if len(shape) not in (3, 4) or (len(shape) == 4 and not 1 <= shape[3] <= MAX_CHANNELS):
        way = ""
        if len(shape) == 4 and shape[1] in (1, 3, 4):
            way = "; it looks like [N, C, H, W], which np.moveaxis(images, 1, -1) turns round"
        raise InputError(
            f"{printable(path)}: {printable(name)} must be [N, H, W] or [N, H, W, C] with C from 1 to {MAX_CHANNELS}, "
            f"got shape {shape}{way}"
        )
    if 0 in shape:
        raise InputError(f"{printable(path)}: {printable(name)} must not be empty, got shape {shape}")
    return shape


def check_size(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, held: int) -> None:
    """A header may promise more than the file holds, and NumPy would allocate all of it first."""
    promised = dtype.itemsize
    for length in shape:
        promised *= length  # Python integers do not overflow, NumPy's would
    if not dtype.hasobject and promised != held:
        raise InputError(
            f"{printable(path)}: array {printable(name)} must hold {promised} bytes, as {dtype}{list(shape)} "
            f"takes, got {held}"
        )


def check_memory(path: Path, name: str, size: int) -> None:
    """Compressed zeros shrink a thousandfold, so that a small file can fill the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(
            f"{printable(path)}: array {printable(name)} must fit the memory of {memory} bytes, got {size}"
        )


def _names(headers: Iterable[str]) -> str:
    return ", ".join(printable(name.removesuffix(".npy")) for name in headers) or "nothing"
