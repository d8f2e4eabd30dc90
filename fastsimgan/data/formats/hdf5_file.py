"""Images in an HDF5 file: a dataset, or a group of one dataset an image, with labels in any others.

Datasets of bytes in a group ``files`` are files that travel along.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.formats.array_file import FILES, PackedImages, check_images, combined_sha256
from fastsimgan.data.formats.hdf5_layout import (
    choose_images,
    copy_but_images,
    datasets,
    layout_of,
    plain,
    refuse_all_but,
    refuse_data_elsewhere,
)
from fastsimgan.data.pixel_values import UNIT, Span, check_range
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.hardware.memory import allocate
from fastsimgan.storage.names import printable

MAGIC = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class HDF5Images(PackedImages):
    """Images ``[N, H, W]`` or ``[N, H, W, C]``, C from 1 to 4, of uint8, uint16 or floats in [0, 1], read as float32.

    They are the dataset ``images``, or ``key``, or the only one at the root that can be images; or a group of datasets
    ``[H, W]`` or ``[H, W, C]``, all of one size and kind, one an image in natural order of their names.

    Offers of `ArrayImages` what refinement needs. Raises InputError if the file breaks a rule, among them: no data may
    lie in other files (external or virtual datasets). Raises UnavailableError without h5py.
    """

    def __init__(self, path: Path, key: str | None = None, data: bytes | None = None, span: Span = UNIT) -> None:
        self.path = path
        self.span = span
        self._data = data  # the file's bytes, where they are in memory
        self._file: Any = None
        with self._reading():
            file = self._open()
            refuse_data_elsewhere(file, path)
            self.key = choose_images(file, path, key)
            self._members, shape, self.stored_dtype = layout_of(file, path, self.key)
            self.stored_shape: tuple[int, ...] = (len(self._members), *shape) if self._members else shape
            self.label_names = [
                name for name in file if name not in (self.key.partition("/")[0], FILES.removesuffix("/"))
            ]
        self.images_shape = check_images(path, self.key, self.stored_shape, self.stored_dtype)
        self.other_names: list[str] = []

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        channels, height, width = self.shape
        labels = f"labels {', '.join(map(printable, self.label_names))}" if self.label_names else "no labels"
        colour = "grey" if channels == 1 else f"{channels} channels"
        kind = f"{height}x{width} {self.bit_depth}-bit {colour}"
        of = f" (images: {printable(self.key)})" if self.key != "images" else ""
        return f"{printable(self.path)}: HDF5, {len(self)} images, {kind}, {labels}{of}"

    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, C]``, in native byte order (see `allocate`).

        Raises InputError if the file's data is damaged or a float is outside ``span``.
        """
        images = allocate(self.images_shape, self.dtype, self.path)
        step = self._step()
        for first in range(0, len(self), step):
            part = images[first : first + step]
            part[:] = self.read_range(first, first + len(part))
            part[:] = check_range(part, self.path, first, self.span)
        return images

    def _step(self) -> int:
        """Images of about 64 MB, in whole chunks."""
        with self._reading():
            chunks = None if self._members else self._open()[self.key].chunks
        chunk = chunks[0] if chunks else 1
        image = int(np.prod(self.images_shape[1:])) * self.dtype.itemsize
        return max(1, (1 << 26) // (image * chunk)) * chunk

    def read_range(self, first: int, end: int) -> np.ndarray:
        """Images ``first`` to ``end - 1`` as the file holds them; floats unchecked. Raises InputError if damaged.

        Read at once what will be needed: a compressed chunk may hold thousands of images.
        """
        with self._reading():
            item = self._open()[self.key]
            if self._members:
                return np.stack([item[name][()] for name in self._members[first:end]])
            images: np.ndarray = item[()][None] if len(self.stored_shape) < len(self.images_shape) else item[first:end]
            return images

    def others(self) -> dict[str, np.ndarray]:
        """Every other dataset of plain values that is not of length N, by its path in the file."""
        return self._arrays(of_each=False)

    def labels(self) -> dict[str, np.ndarray]:
        """Every other dataset of N numbers, booleans or strings (or lists of them), by its path in the file."""
        return self._arrays(of_each=True)

    def _arrays(self, of_each: bool) -> dict[str, np.ndarray]:
        found = {}
        with self._reading():
            for name, item in datasets(self._open(), self.key):
                if item.shape is not None and (item.shape[:1] == (len(self),)) == of_each:
                    array = plain(item)
                    if array is not None:
                        found[name] = array
        return found

    def only_arrays(self, to: str) -> None:
        """Raise InputError naming the first thing in the file that is neither a label of each image nor in ``files``.

        What the file is to become (``to``) has no place for it.
        """
        with self._reading():
            file = self._open()
            beside = () if to == "files" else self.others()
            files = (name for name, _ in datasets(file, self.key, files=True))
            held = {self.key, *self.labels(), *beside, *files}

            def refuse(what: str) -> None:
                raise InputError(
                    f"{printable(self.path)}: must hold only datasets of numbers or strings with length {len(self)}, "
                    f"as images has, and files to become {to}, got {printable(what)}"
                )

            for attribute in file.attrs:
                refuse(f"the attribute {attribute} of the file")
            refuse_all_but(file, "", held, refuse)

    @property
    def file_names(self) -> list[str]:
        """Names of the files in the group ``files``."""
        with self._reading():
            return [name.removeprefix(FILES) for name, _ in datasets(self._open(), self.key, files=True)]

    def read_file(self, name: str) -> bytes:
        """The bytes of one of `file_names`."""
        with self._reading():
            data: bytes = self._open()[FILES + name][()].tobytes()
            return data

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file in the group ``files``."""
        for name in self.file_names:
            yield name, self.read_file(name)

    def label_sha256(self) -> dict[str, str]:
        """SHA-256 of every other dataset's values, by its path in the file, and one of all in ``files``."""
        found: dict[str, str] = {}
        with self._reading():
            for name, item in datasets(self._open(), self.key):
                values = item[()]
                array = np.asarray(values)
                data = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
                found[name] = hashlib.sha256(f"{item.dtype} {item.shape} ".encode() + data).hexdigest()
        return found | combined_sha256(self.file_sha256())

    def write_again(self, path: Path, images: Iterable[np.ndarray]) -> None:
        """Write this file at ``path`` with other images of the same shape and type; all else is copied as it is stored.

        ``images`` are consecutive pieces ``[n, H, W(, C)]`` that add up to all N.
        """
        import h5py

        with self._reading():
            old = self._open()
            with h5py.File(path, "x") as new:
                target = copy_but_images(old, new, self.key, whole="/" in self.key or bool(self._members))
                first = 0
                for piece in images:
                    if self._members:
                        for name, image in zip(self._members[first:], piece, strict=False):
                            target[name][...] = image
                    elif len(self.stored_shape) < len(self.images_shape):
                        target[...] = piece[0]
                    else:
                        target[first : first + len(piece)] = piece
                    first += len(piece)

    def with_picture(self, pixels: np.ndarray) -> bytes:
        """The bytes of this file, which is in memory, with another picture in the place of its only one."""
        import h5py

        assert self._data is not None and len(self) == 1
        buffer = io.BytesIO(self._data)
        with h5py.File(buffer, "r+") as new:
            target = new[f"{self.key}/{self._members[0]}"] if self._members else new[self.key]
            target[...] = pixels.reshape(target.shape)
        return buffer.getvalue()

    def _open(self) -> Any:
        """The open file, opened anew in a new process."""
        try:
            import h5py
        except ImportError as error:
            raise UnavailableError(f"{printable(self.path)}: HDF5 needs h5py: pip install h5py ({error})") from None
        if self._file is None:
            self._file = h5py.File(self.path if self._data is None else io.BytesIO(self._data), "r")
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what HDF5 raises on damaged bytes into an InputError that names the file."""
        try:
            yield
        except (InputError, UnavailableError):
            raise
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ValueError, ...
            reason = printable(str(error)) or type(error).__name__
            raise InputError(f"{printable(self.path)}: cannot be read as HDF5: {reason}") from error
