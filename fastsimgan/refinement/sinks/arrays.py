"""The source's packed file again, or one of another kind with the same arrays."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.formats.array_file import IMAGES
from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.data.formats.packed_writer import WRITERS
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.manifest import Written
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sinks.base import Sink, UnitWriter, flush
from fastsimgan.refinement.sources.array_file import ArrayFile
from fastsimgan.storage.names import printable


class ArraysSink(Sink):
    """The source's file again, with refined images; other arrays are copied byte for byte at the end.

    Or, where ``kind`` is not the source's, a new file with the same arrays. Units are written into one file of raw
    pixels, each in its place: an ``.npy`` as it will be, the images of an ``.npz`` or HDF5 file without header.

    Args:
        run: whose output it is.
        file: what is refined.
        kind: "npz", "npy" or "hdf5".
    """

    in_order = True  # and hashed so

    def __init__(self, run: RunDirectory, file: ArrayFile, kind: str) -> None:
        self.run = run
        self.file = file
        self.kind = kind
        self.dtype: np.dtype = file.arrays.stored_dtype
        self.row = int(np.prod(file.shape[1:])) * self.dtype.itemsize  # bytes of an image
        self.header = _npy_header(file.arrays.stored_shape, self.dtype) if kind == "npy" else b""
        self.raw = run.partial / (run.output.name if kind == "npy" else "images.raw")

    def open_unit(self, work_unit: int) -> UnitWriter:
        """What writes a unit, from its beginning."""
        return ArraysWriter(self, work_unit)

    def finish(self) -> dict[str, str] | None:
        """Put the file together; returns the label arrays' SHA-256, equal before and after.

        Raises:
            InputError: if an array to be copied is damaged.
        """
        arrays, run = self.file.arrays, self.run
        if self.kind == "npy":
            return {}
        final = run.partial / run.output.name
        with run.writing():
            if not self.raw.exists():  # it is put together, and perhaps published, already
                return open_arrays(final if final.exists() else run.output, self._key).label_sha256()
            temporary = run.temporary()
            temporary.parent.mkdir(exist_ok=True)
            if self.kind == self.file.kind:
                arrays.write_again(temporary, self._pieces())
            else:
                self._convert(temporary)
            flush(temporary)
        written = open_arrays(temporary, self._key)
        labels = written.label_sha256()
        same = labels == arrays.label_sha256() if self.kind == self.file.kind else _same_labels(written, arrays)
        if not same:
            raise InputError(f"{printable(run.output)}: label arrays must be those of the input; the copy differs")
        run_paths.rename(temporary, final)
        self.raw.unlink()
        return labels

    def _convert(self, path: Path) -> None:
        arrays = self.file.arrays
        if IMAGES in (*arrays.label_names, *arrays.other_names):
            raise InputError(
                f"{printable(arrays.path)}: --key {printable(arrays.key)} must stay in a file of the same kind, as "
                "another array is called images"
            )
        with WRITERS[self.kind](path, self.run.output) as new:
            new.images(self.file.shape, self.dtype, self._pieces())
            for name, array in (arrays.labels() | arrays.others()).items():
                new.array(name, array)
            for name, data in arrays.files():
                new.file(name, data)

    @property
    def _key(self) -> str | None:
        """What the array of images is called in the output."""
        return self.file.arrays.key if self.kind == self.file.kind else None

    def _pieces(self) -> Iterator[np.ndarray]:
        """Each unit's refined images ``[n, H, W(, C)]``, from the raw file."""
        for work_unit in range(self.file.work_units):
            first, end = self.file.range(work_unit)
            with self.raw.open("rb") as file:
                file.seek(len(self.header) + first * self.row)
                flat = np.fromfile(file, self.dtype, (end - first) * self.row // self.dtype.itemsize)
            yield flat.reshape(end - first, *self.file.shape[1:])


class ArraysWriter(UnitWriter):
    """Writes one unit of an `ArraysSink`."""

    def __init__(self, sink: ArraysSink, work_unit: int) -> None:
        self.run = sink.run
        self.dtype = sink.dtype
        first, _ = sink.file.range(work_unit)
        self._position = len(sink.header) + first * sink.row
        self._digest = hashlib.sha256()
        self._next = 0
        self._waiting: dict[int, np.ndarray] = {}
        with self.run.writing():
            # neither appended to nor cut: other workers write their own units
            self._file = os.fdopen(os.open(sink.raw, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb", 0)
            if first == 0:
                os.pwrite(self._file.fileno(), sink.header, 0)

    def put_images(self, number: int, images: np.ndarray) -> None:
        """Write batch ``number`` of the unit, ``[n, H, W]`` or ``[n, H, W, C]``; one that comes too early waits."""
        self._waiting[number] = images
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def _write(self, images: np.ndarray) -> None:
        stored = np.ascontiguousarray(images.astype(self.dtype, copy=False))
        data = stored.reshape(-1).view(np.uint8).data
        self._digest.update(data)
        with self.run.writing():
            while data:
                written = os.pwrite(self._file.fileno(), data, self._position)
                self._position += written
                data = data[written:]

    def close(self) -> Written:
        """Flush to the disk."""
        assert not self._waiting
        with self.run.writing():
            os.fsync(self._file.fileno())
            self._file.close()
        return Written(sha256=self._digest.hexdigest())


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What an ``.npy`` of ``shape`` and ``dtype`` begins with."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _same_labels(one: ArrayImages | HDF5Images, other: ArrayImages | HDF5Images) -> bool:
    """Whether two files of different kinds hold the same labels and files; text may be encoded in two ways."""

    def values(arrays: ArrayImages | HDF5Images) -> dict[str, Any]:
        return {
            name: array.tolist() if array.dtype.kind in "US" else (array.dtype, array.shape, array.tobytes())
            for name, array in (arrays.labels() | arrays.others()).items()
        }

    return values(one) == values(other) and one.file_sha256() == other.file_sha256()
