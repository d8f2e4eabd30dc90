"""Images and labels in NumPy's own files: ``.npz`` (``images``, label arrays, files) and ``.npy`` (images alone).

Nothing is ever unpickled. Every array's header is checked before its data is read.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastsimgan.data.formats.array_file import (
    FILES,
    IMAGES,
    PackedImages,
    check_images,
    check_memory,
    check_size,
    choose_key,
    combined_sha256,
)
from fastsimgan.data.formats.npy_format import map_member, read_header, read_member, write_images
from fastsimgan.data.pixel_values import UNIT, Span, check_range
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


class ArrayImages(PackedImages):
    """An ``.npz`` or ``.npy`` file of images ``[N, H, W]`` or ``[N, H, W, C]``, C from 1 to 4.

    Images are uint8, uint16, or floats in [0, 1] (or ``span``), which are read as float32. One picture, ``[H, W]`` or
    ``[H, W, 3]``, is a set of one. In an ``.npz`` they are the array ``images``, or ``key``, or the only one that can
    be images. The other arrays are its labels; those that are not of length N belong to no image (``other_names``) and
    travel along, and so do members under ``files/``, files of any kind.
    A ``.npy`` is memory-mapped; the images of an ``.npz`` are read into memory the first time that they are asked for.

    Raises InputError at once if the file breaks a rule that its headers show, and on reading if its data does.
    """

    def __init__(self, path: Path, key: str | None = None, span: Span = UNIT) -> None:
        self.path = path
        self.span = span
        self.archive = _is_archive(path)
        self._images: np.ndarray | None = None
        self._opened: zipfile.ZipFile | None = None
        self._file_names: list[str] = []
        headers = self._headers()
        self.key = choose_key(path, {name.removesuffix(".npy"): header for name, header in headers.items()}, key)
        self.stored_shape, self.stored_dtype = headers.pop(f"{self.key}.npy")
        self.images_shape = check_images(path, self.key, self.stored_shape, self.stored_dtype)
        self.label_names: list[str] = []
        self.other_names: list[str] = []
        for name, (shape, dtype) in headers.items():
            label = printable(name.removesuffix(".npy"))
            if dtype.hasobject:
                raise InputError(
                    f"{printable(path)}: array {label} must hold plain values, got Python objects (pickled)"
                )
            of_each = shape[:1] == self.images_shape[:1]
            (self.label_names if of_each else self.other_names).append(name.removesuffix(".npy"))

    @property
    def file_names(self) -> list[str]:
        """Members under ``files/``, without that."""
        return self._file_names

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        channels, height, width = self.shape
        labels = f"labels {', '.join(map(printable, self.label_names))}" if self.label_names else "no labels"
        colour = "grey" if channels == 1 else f"{channels} channels"
        labels += f", carried along: {', '.join(map(printable, self.other_names))}" if self.other_names else ""
        files = f", {len(self.file_names)} other files" if self.file_names else ""
        files += f" (images: the array {printable(self.key)})" if self.archive and self.key != "images" else ""
        kind = f"{height}x{width} {self.bit_depth}-bit {colour}"
        return f"{printable(self.path)}: {len(self)} images, {kind}, {labels}{files}"

    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, C]`` as stored, in native byte order.

        Raises InputError if the file's data is damaged or a float is outside ``span``.
        """
        images = self.stored_images().astype(self.dtype, copy=False)
        return check_range(images, self.path, 0, self.span)

    def stored_images(self, mapped: bool = False) -> np.ndarray:
        """The images as the file holds them, byte order included; floats unchecked. Raises InputError if damaged.

        ``mapped``: where an ``.npz`` holds them uncompressed, map them from the disk.
        """
        if self._images is None:
            with self._reading():
                if self.archive:
                    with zipfile.ZipFile(self.path) as archive:
                        if mapped:
                            self._images = map_member(archive, f"{self.key}.npy")
                        if self._images is None:
                            self._images = read_member(archive, f"{self.key}.npy")
                else:
                    self._images = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if len(self.images_shape) > len(self.stored_shape):
                self._images = self._images[None]
        return self._images

    def read_range(self, first: int, end: int) -> np.ndarray:
        """Images ``first`` to ``end - 1`` as `stored_images` gives them, mapped from the disk where possible."""
        return self.stored_images(mapped=True)[first:end]

    def labels(self) -> dict[str, np.ndarray]:
        """The other arrays of length N by name; none in a ``.npy``. Raises InputError if they are damaged."""
        return self._read(self.label_names)

    def others(self) -> dict[str, np.ndarray]:
        """The arrays of other lengths, by name. Raises InputError if they are damaged."""
        return self._read(self.other_names)

    def _read(self, names: list[str]) -> dict[str, np.ndarray]:
        if not self.archive:
            return {}
        with self._reading(), zipfile.ZipFile(self.path) as archive:
            return {name: read_member(archive, f"{name}.npy") for name in names}

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file under ``files/``. Raises InputError if one is damaged."""
        if self.file_names:
            with zipfile.ZipFile(self.path) as archive:
                for name in self.file_names:
                    yield name, b"".join(self._chunks(archive, archive.getinfo(FILES + name)))

    def read_file(self, name: str) -> bytes:
        """The bytes of one of `file_names`. The archive stays open. Raises InputError if they are damaged."""
        with self._reading():
            if self._opened is None:
                self._opened = zipfile.ZipFile(self.path)
            return self._opened.read(FILES + name)

    def label_sha256(self) -> dict[str, str]:
        """SHA-256 of every other array as the file holds it, header included, and one of all files under ``files/``.

        Raises InputError if one is damaged.
        """
        if not self.archive:
            return {}
        found = {}
        with zipfile.ZipFile(self.path) as archive:
            for name in (*self.label_names, *self.other_names):
                digest = hashlib.sha256()
                for chunk in self._chunks(archive, archive.getinfo(f"{name}.npy")):
                    digest.update(chunk)
                found[name] = digest.hexdigest()
        return found | combined_sha256(self.file_sha256())

    def write_again(self, path: Path, images: Iterable[np.ndarray]) -> None:
        """Write this file at ``path`` with other images of the same shape and type; all else is copied byte for byte.

        ``images`` are consecutive pieces ``[n, H, W(, C)]`` that add up to all N; they are written as they come.
        Raises InputError if an array to be copied is damaged, OSError if ``path`` cannot be written.
        """
        if not self.archive:
            with path.open("xb") as file:
                write_images(file, self.stored_shape, self.stored_dtype, images)
            return
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(path, "x") as new:
            for member in old.infolist():
                info = zipfile.ZipInfo(member.filename, member.date_time)
                info.compress_type = member.compress_type
                info.external_attr = member.external_attr
                with new.open(info, "w", force_zip64=True) as file:
                    if member.filename == f"{self.key}.npy":
                        write_images(file, self.stored_shape, self.stored_dtype, images)
                    else:
                        file.writelines(self._chunks(old, member))

    def _chunks(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
        with self._reading(), archive.open(member) as file:
            while chunk := file.read(1 << 20):
                yield chunk

    def _headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array in the file, by member name."""
        with self._reading():
            if not self.archive:
                with self.path.open("rb") as file:
                    shape, dtype, offset = read_header(file)
                    check_size(self.path, "images", shape, dtype, self.path.stat().st_size - offset)
                return {f"{IMAGES}.npy": (shape, dtype)}
            headers = {}
            with zipfile.ZipFile(self.path) as archive:
                seen: set[str] = set()
                for member in archive.infolist():
                    carried = member.filename.startswith(FILES)
                    if not (carried or member.filename.endswith(".npy")) or member.filename in seen:
                        raise InputError(
                            f"{printable(self.path)}: must hold only .npy arrays, each once, "
                            f"got {printable(member.filename)}"
                        )
                    seen.add(member.filename)
                    if carried:
                        check_memory(self.path, member.filename, member.file_size)
                        self._file_names.append(member.filename.removeprefix(FILES))
                        continue
                    with archive.open(member) as file:
                        shape, dtype, offset = read_header(file)
                    check_size(self.path, member.filename.removesuffix(".npy"), shape, dtype, member.file_size - offset)
                    check_memory(self.path, member.filename.removesuffix(".npy"), member.file_size)
                    headers[member.filename] = shape, dtype
            return headers

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what the zip and NumPy readers raise on damaged bytes into an InputError that names the file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # zipfile and NumPy's parser raise BadZipFile, zlib.error, ValueError, SyntaxError, RuntimeError, ...
            reason = getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__
            raise InputError(f"{printable(self.path)}: cannot be read as NumPy arrays: {reason}") from error


def _is_archive(path: Path) -> bool:
    """Tell ``.npz`` from ``.npy`` by the file's first bytes, whatever its suffix."""
    try:
        with path.open("rb") as file:
            start = file.read(len(np.lib.format.MAGIC_PREFIX))
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be opened: {error.strerror}") from error
    if start != np.lib.format.MAGIC_PREFIX and not start.startswith(b"PK"):
        raise InputError(f"{printable(path)}: must be a folder of images, an .npz or an .npy, got something else")
    return start.startswith(b"PK")
