"""Images in an HDF5 file: a dataset, or a group of one dataset an image, with labels in any others.

Datasets of bytes in a group ``files`` are files that travel along.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.formats.numpy_file import (
    FILES,
    UNIT,
    Span,
    check_images,
    check_range,
    choose_key,
    combined_sha256,
    read_as,
)
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.hardware.memory import room_for
from fastsimgan.storage.names import natural_key, printable

MAGIC = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class HDF5Images:
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
        self._members: list[str] = []  # names of a group's datasets; empty where one dataset holds all images
        with self._reading():
            file = self._open()
            self.key = self._choose(file, key)
            item = file[self.key]
            if not hasattr(item, "shape"):
                self._members = sorted(item, key=lambda name: natural_key(Path(name)))
                if any(self._kind(item, name) is None for name in self._members) or not self._members:
                    raise InputError(f"{printable(path)}: {printable(self.key)} must be a dataset, got a group")
            kinds = [self._kind(file, self.key)] if not self._members else []
            kinds += [self._kind(item, name) for name in self._members]
            for name, kind in zip(self._members, kinds, strict=False):
                if kind != kinds[0]:
                    raise InputError(
                        f"{printable(path)}: images must be of one size and kind, {printable(self.key)}/"
                        f"{printable(self._members[0])} is {kinds[0]} and {printable(name)} is {kind}"
                    )
            assert kinds[0] is not None
            shape, self.stored_dtype = kinds[0]
            self.stored_shape: tuple[int, ...] = (len(self._members), *shape) if self._members else shape
            self.label_names = [
                name for name in file if name not in (self.key.partition("/")[0], FILES.removesuffix("/"))
            ]
        self._shape = check_images(path, self.key, self.stored_shape, self.stored_dtype)
        self.other_names: list[str] = []

    def _choose(self, file: Any, key: str | None) -> str:
        """The name of the dataset or group of images."""
        if key is not None:
            if file.get(key) is None:
                choose_key(self.path, dict.fromkeys(file, ((), np.dtype("u1"))), key)
            if file.get(key, getlink=True).__class__.__name__ != "HardLink":
                raise InputError(f"{printable(self.path)}: {printable(key)} must lie in the file itself, got a link")
            return key.strip("/")
        held: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name in file:
            item = file.get(name) if file.get(name, getlink=True).__class__.__name__ == "HardLink" else None
            if item is None:
                held[name] = (), np.dtype("u1")  # a link, never followed
                continue
            members = () if hasattr(item, "shape") else tuple(item)
            if not members:
                held[name] = (item.shape or (), item.dtype) if hasattr(item, "shape") else ((), np.dtype("u1"))
            elif name != FILES.removesuffix("/") and (kind := self._kind(item, members[0])) is not None:
                held[name] = (len(members), *kind[0]), kind[1]
        if "images" in held and held["images"][0] == ():
            del held["images"]
        return choose_key(self.path, held, None)

    def _kind(self, group: Any, name: str) -> tuple[tuple[int, ...], np.dtype] | None:
        """Shape and type of a dataset in the file itself; None for anything else."""
        item = group.get(name) if group.get(name, getlink=True).__class__.__name__ == "HardLink" else None
        if item is None or getattr(item, "shape", None) is None:
            return None
        if item.external or item.is_virtual:
            raise InputError(
                f"{printable(self.path)}: images must lie in the file itself, got external or virtual data"
            )
        return item.shape, item.dtype

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        return (self._shape[3] if len(self._shape) == 4 else 1), self._shape[1], self._shape[2]

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
        kind = f"{height}x{width} {self.bit_depth}-bit {colour}"
        of = f" (images: {printable(self.key)})" if self.key != "images" else ""
        return f"{printable(self.path)}: HDF5, {len(self)} images, {kind}, {labels}{of}"

    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, C]``, in native byte order (see `room_for`).

        Raises InputError if the file's data is damaged or a float is outside ``span``.
        """
        images = room_for(self._shape, self.dtype, self.path)
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
        image = int(np.prod(self._shape[1:])) * self.dtype.itemsize
        return max(1, (1 << 26) // (image * chunk)) * chunk

    def read_range(self, first: int, end: int) -> np.ndarray:
        """Images ``first`` to ``end - 1`` as the file holds them; floats unchecked. Raises InputError if damaged.

        Read at once what will be needed: a compressed chunk may hold thousands of images.
        """
        with self._reading():
            item = self._open()[self.key]
            if self._members:
                return np.stack([item[name][()] for name in self._members[first:end]])
            images: np.ndarray = item[()][None] if len(self.stored_shape) < len(self._shape) else item[first:end]
            return images

    def others(self) -> dict[str, np.ndarray]:
        """Every other dataset of plain values that is not of length N, by its path in the file."""
        found = {}
        with self._reading():
            for name, item in self._datasets():
                if item.shape is not None and item.shape[:1] != (len(self),):
                    array = _plain(item)
                    if array is not None:
                        found[name] = array
        return found

    def labels(self) -> dict[str, np.ndarray]:
        """Every other dataset of N numbers, booleans or strings (or lists of them), by its path in the file."""
        found = {}
        with self._reading():
            for name, item in self._datasets():
                if item.shape is not None and item.shape[:1] == (len(self),):
                    array = _plain(item)
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
            held = {self.key, *self.labels(), *beside, *(name for name, _ in self._datasets(files=True))}

            def refuse(what: str) -> None:
                raise InputError(
                    f"{printable(self.path)}: must hold only datasets of numbers or strings with length {len(self)}, "
                    f"as images has, and files to become {to}, got {printable(what)}"
                )

            for attribute in file.attrs:
                refuse(f"the attribute {attribute} of the file")
            _only_arrays(file, "", held, refuse)

    @property
    def file_names(self) -> list[str]:
        """Names of the files in the group ``files``."""
        with self._reading():
            return [name.removeprefix(FILES) for name, _ in self._datasets(files=True)]

    def read_file(self, name: str) -> bytes:
        """The bytes of one of `file_names`."""
        with self._reading():
            data: bytes = self._open()[FILES + name][()].tobytes()
            return data

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file in the group ``files``."""
        for name in self.file_names:
            yield name, self.read_file(name)

    def file_sha256(self) -> dict[str, str]:
        """SHA-256 of every file in the group ``files``, by name."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files()}

    def label_sha256(self) -> dict[str, str]:
        """SHA-256 of every other dataset's values, by its path in the file, and one of all in ``files``."""
        found: dict[str, str] = {}
        with self._reading():
            for name, item in self._datasets():
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
                for name, value in old.attrs.items():
                    new.attrs[name] = value
                alone = "/" not in self.key and not self._members
                for name in old:
                    link = old.get(name, getlink=True)
                    if not isinstance(link, h5py.HardLink):
                        new[name] = link  # never followed
                    elif name != self.key or not alone:
                        old.copy(name, new, name)
                source = old[self.key]
                if alone:
                    kept = {
                        key: getattr(source, key) for key in ("chunks", "compression", "compression_opts", "shuffle")
                    }
                    target = new.create_dataset(self.key, self.stored_shape, self.stored_dtype, **kept)
                    for name, value in source.attrs.items():
                        target.attrs[name] = value
                else:
                    target = new[self.key]
                first = 0
                for piece in images:
                    if self._members:
                        for name, image in zip(self._members[first:], piece, strict=False):
                            target[name][...] = image
                    elif len(self.stored_shape) < len(self._shape):
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

    def _datasets(self, files: bool = False) -> list[tuple[str, Any]]:
        """Path and dataset of all but the images: those that are in ``files`` and are bytes, or all others."""
        import h5py

        found = []

        def add(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name != self.key and not name.startswith(f"{self.key}/"):
                is_file = (
                    name.startswith(FILES) and item.dtype == np.uint8 and item.shape is not None and item.ndim == 1
                )
                if is_file == files:
                    found.append((name, item))

        self._open().visititems(add)  # follows no link to another file
        return found

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


def _only_arrays(group: Any, path: str, held: Collection[str], refuse: Callable[[str], None]) -> None:
    import h5py

    for name in group:
        full = path + name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            refuse(f"the link {full}")
        item = group[name]
        for attribute in item.attrs:
            refuse(f"the attribute {attribute} of {full}")
        if isinstance(item, h5py.Group):
            _only_arrays(item, f"{full}/", held, refuse)
        elif full not in held:
            refuse(f"{full} of {item.dtype}{list(item.shape or ())}")


def _plain(item: Any) -> np.ndarray | None:
    """A dataset's values as an array that an ``.npz`` can hold; None for references, records and ragged lists."""
    import h5py

    if h5py.check_string_dtype(item.dtype) is not None and item.dtype.hasobject:
        return np.array(item.asstr()[()], dtype=np.str_)
    return None if item.dtype.hasobject or item.dtype.kind not in "biufcS" else np.asarray(item[()])


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names)) or "nothing"
