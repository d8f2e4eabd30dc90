"""Images and labels in NumPy's own files: ``.npz`` (``images``, label arrays, files) and ``.npy`` (images alone).

Nothing is ever unpickled. Every array's header is checked before its data is read.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

IMAGES = "images"  # the array that holds the images
FILES = "files/"  # members of an .npz under this name are files that travel along, not arrays
MAX_CHANNELS = 4  # anything larger in last place is not channels: most likely the array is [N, C, H, W]
Span = tuple[float, float]
UNIT: Span = (0.0, 1.0)  # in which floats must lie, where no other range is stated
HAIR = 1 / 1024  # by which floats may leave [0, 1], a quarter of an 8-bit level: rounding, which is clipped
_SMALLEST = 8  # height and width from which on an unnamed array is taken for images


class ArrayImages:
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
        self.file_names: list[str] = []  # without ``files/``
        headers = self._headers()
        self.key = choose_key(path, {name.removesuffix(".npy"): header for name, header in headers.items()}, key)
        self.stored_shape, self.stored_dtype = headers.pop(f"{self.key}.npy")
        self._shape = check_images(path, self.key, self.stored_shape, self.stored_dtype)
        self.label_names: list[str] = []
        self.other_names: list[str] = []
        for name, (shape, dtype) in headers.items():
            label = printable(name.removesuffix(".npy"))
            if dtype.hasobject:
                raise InputError(
                    f"{printable(path)}: array {label} must hold plain values, got Python objects (pickled)"
                )
            of_each = shape[:1] == self._shape[:1]
            (self.label_names if of_each else self.other_names).append(name.removesuffix(".npy"))

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels = self._shape[3] if len(self._shape) == 4 else 1
        return channels, self._shape[1], self._shape[2]

    @property
    def dtype(self) -> np.dtype:
        """The images' type as they are read: uint8, uint16 or float32, in native byte order."""
        return read_as(self.stored_dtype)

    @property
    def bit_depth(self) -> int:
        """Bits a channel: 8, 16 or 32."""
        return self.stored_dtype.itemsize * 8

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

        ``mapped``: where an ``.npz`` holds them uncompressed, map them from the disk; their checksum is then unchecked.
        """
        if self._images is None:
            with self._reading():
                if self.archive:
                    with zipfile.ZipFile(self.path) as archive:
                        if mapped:
                            self._images = _map_member(archive, f"{self.key}.npy")
                        if self._images is None:
                            self._images = _read_member(archive, f"{self.key}.npy")
                else:
                    self._images = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if len(self._shape) > len(self.stored_shape):
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
            return {name: _read_member(archive, f"{name}.npy") for name in names}

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

    def file_sha256(self) -> dict[str, str]:
        """SHA-256 of every file under ``files/``, by name. Raises InputError if one is damaged."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files()}

    def write_again(self, path: Path, images: Iterable[np.ndarray]) -> None:
        """Write this file at ``path`` with other images of the same shape and type; all else is copied byte for byte.

        ``images`` are consecutive pieces ``[n, H, W(, C)]`` that add up to all N; they are written as they come.
        Raises InputError if an array to be copied is damaged, OSError if ``path`` cannot be written.
        """
        if not self.archive:
            with path.open("xb") as file:
                self._write_images(file, images)
            return
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(path, "x") as new:
            for member in old.infolist():
                info = zipfile.ZipInfo(member.filename, member.date_time)
                info.compress_type = member.compress_type
                info.external_attr = member.external_attr
                with new.open(info, "w", force_zip64=True) as file:
                    if member.filename == f"{self.key}.npy":
                        self._write_images(file, images)
                    else:
                        file.writelines(self._chunks(old, member))

    def _write_images(self, file: IO[bytes], images: Iterable[np.ndarray]) -> None:
        descr = np.lib.format.dtype_to_descr(self.stored_dtype)
        header = {"descr": descr, "fortran_order": False, "shape": self.stored_shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in images:
            file.write(piece.astype(self.stored_dtype, copy=False).tobytes())

    def _chunks(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
        with self._reading(), archive.open(member) as file:
            while chunk := file.read(1 << 20):
                yield chunk

    def _headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array in the file, by member name."""
        with self._reading():
            if not self.archive:
                with self.path.open("rb") as file:
                    shape, dtype, offset = _read_header(file)
                    self._check_size("images", shape, dtype, self.path.stat().st_size - offset)
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
                        self._check_memory(member.filename, member.file_size)
                        self.file_names.append(member.filename.removeprefix(FILES))
                        continue
                    with archive.open(member) as file:
                        shape, dtype, offset = _read_header(file)
                    self._check_size(member.filename.removesuffix(".npy"), shape, dtype, member.file_size - offset)
                    self._check_memory(member.filename.removesuffix(".npy"), member.file_size)
                    headers[member.filename] = shape, dtype
            return headers

    def _check_size(self, name: str, shape: tuple[int, ...], dtype: np.dtype, held: int) -> None:
        """A header may promise more than the file holds, and NumPy would allocate all of it first."""
        promised = dtype.itemsize
        for length in shape:
            promised *= length  # Python integers do not overflow, NumPy's would
        if not dtype.hasobject and promised != held:
            raise InputError(
                f"{printable(self.path)}: array {printable(name)} must hold {promised} bytes, as {dtype}{list(shape)} "
                f"takes, got {held}"
            )

    def _check_memory(self, name: str, size: int) -> None:
        """Compressed zeros shrink a thousandfold, so that a small file can fill the memory."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise InputError(
                f"{printable(self.path)}: array {printable(name)} must fit the memory of {memory} bytes, got {size}"
            )

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


def check_range(images: np.ndarray, path: Path, first: int, span: Span = UNIT) -> np.ndarray:
    """The images, with floats a hair outside ``span`` clipped; a copy only where there are such.

    Raises InputError if a float is further outside, or not a number. ``images[0]`` is image ``first`` of the file.
    """
    if images.dtype.kind != "f":
        return images
    low, high = span
    hair = HAIR * (high - low)
    good = ((images >= low - hair) & (images <= high + hair)).reshape(len(images), -1).all(axis=1)
    if not good.all():
        worst = int(np.argmin(good))
        raise InputError(f"{printable(path)}: image {first + worst}: {out_of_range(images[worst], span)}")
    outside = images.min() < low or images.max() > high
    return np.clip(images, np.float32(low), np.float32(high)) if outside else images


def out_of_range(values: np.ndarray, span: Span) -> str:
    """Why floats that are not all in ``span`` are refused, and the way out."""
    low, high = span
    rule = "in [0, 1]" if span == UNIT else f"in the refiner's range {low:g} to {high:g} (train --range)"
    if not np.isfinite(values).all():
        return f"float images must be {rule}, got NaN or infinity: give such pixels a value, such as the background's"
    least, largest = float(values.min()), float(values.max())
    way = ""
    if span == UNIT and least >= 0 and 1 < largest <= 255 and bool((values == np.rint(values)).all()):
        way = ": divide by 255"
    elif span == UNIT:
        way = "; train --range LO HI takes another range, such as metres, and the refiner keeps it"
    return f"float images must be {rule}, got {least:g} to {largest:g}{way}"


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


_HEADER_READERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and the length in bytes of the header at the start of ``file``."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f".npy format must be 1.0 or 2.0, got {'.'.join(map(str, version))}")
    shape, _, dtype = _HEADER_READERS[version](file)
    return shape, dtype, file.tell()


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading to the end is what makes zipfile check the CRC
            raise ValueError(f"{name} is longer than its header says")
    return array


def _map_member(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """The array of an uncompressed member, mapped from the disk; None if it is compressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or archive.filename is None:
        return None
    with open(archive.filename, "rb") as file:
        # The member's data follow a local header of 30 bytes, the name and an extra field of its own length.
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _HEADER_READERS[version](file)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _names(headers: Iterable[str]) -> str:
    return ", ".join(printable(name.removesuffix(".npy")) for name in headers) or "nothing"
