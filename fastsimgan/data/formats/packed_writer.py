"""Writing packed files: all images in one array, label arrays beside it, and other files byte for byte in ``files/``.

An ``.npz`` is a zip of arrays, in which NumPy hands out any other member as bytes: ``np.load(path)["files/a.json"]``.
In HDF5 each file is a dataset of bytes in the group ``files``. `ArrayImages` and `HDF5Images` read both.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastsimgan.data.formats.array_file import FILES, IMAGES
from fastsimgan.data.formats.npy_format import write_images
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.storage.names import printable


class NpzWriter:
    """An ``.npz``, uncompressed, so that its images can be mapped from the disk. The same content, the same bytes.

    ``path`` is where it is written, ``called`` what errors name.
    """

    def __init__(self, path: Path, called: Path) -> None:
        self._archive = zipfile.ZipFile(path, "x")

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._archive.close()

    def images(self, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
        """``pieces`` are consecutive ``[n, H, W(, C)]`` that add up to ``shape``."""
        with self._archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as file:
            write_images(file, shape, dtype, pieces)

    def array(self, name: str, array: np.ndarray) -> None:
        """One label array."""
        with self._archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)

    def file(self, name: str, data: bytes) -> None:
        """One file, under ``files/``."""
        self._archive.writestr(zipfile.ZipInfo(FILES + name), data)


class HDF5Writer:
    """An HDF5 file, uncompressed; arguments as those of `NpzWriter`. Raises UnavailableError without h5py."""

    def __init__(self, path: Path, called: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise UnavailableError(f"{printable(called)}: HDF5 needs h5py: pip install h5py ({error})") from None
        self._h5py = h5py
        self._called = called
        self._file: Any = h5py.File(path, "x")

    def __enter__(self) -> HDF5Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def images(self, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
        """``pieces`` are consecutive ``[n, H, W(, C)]`` that add up to ``shape``."""
        images = self._file.create_dataset("images", shape, dtype)
        first = 0
        for piece in pieces:
            images[first : first + len(piece)] = piece
            first += len(piece)

    def array(self, name: str, array: np.ndarray) -> None:
        """One label array; Unicode becomes UTF-8. Raises InputError if HDF5 has no such type or name."""
        try:
            if array.dtype.kind == "U":
                text = self._file.create_dataset(name, array.shape, self._h5py.string_dtype())
                text[...] = array.astype(object)
            else:
                self._file.create_dataset(name, data=array)
        except (TypeError, ValueError) as error:  # a UnicodeError is a ValueError
            raise InputError(
                f"{printable(self._called)}: array {printable(name)} of {array.dtype} cannot be held in HDF5: "
                f"{printable(str(error))}"
            ) from error

    def file(self, name: str, data: bytes) -> None:
        """One file, as uint8 in the group ``files``. Raises InputError if HDF5 cannot hold the name."""
        try:
            self._file.create_dataset(FILES + name, data=np.frombuffer(data, np.uint8))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{printable(self._called)}: file {printable(name)} cannot be held in HDF5: {printable(str(error))}"
            ) from error


WRITERS: dict[str, type[NpzWriter] | type[HDF5Writer]] = {"npz": NpzWriter, "hdf5": HDF5Writer}
