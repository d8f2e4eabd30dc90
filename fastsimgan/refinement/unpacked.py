"""Packed images as the files that they are to become: `refine --to folder` and `--to shards` of an array file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_file import FORMATS, Header
from fastsimgan.data.formats.label_table import parse
from fastsimgan.data.formats.labels import Labels, is_label_file
from fastsimgan.data.formats.listing import STATE, stems
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.errors import InputError
from fastsimgan.refinement import sources
from fastsimgan.refinement.sources import ArraysInput, Part, RawUnit
from fastsimgan.storage.names import printable


class UnpackedInput(ArraysInput):
    """An ``.npz``, ``.npy`` or HDF5 file as units: the reverse of `PackedOutput`.

    - An image is called as the array ``name`` says, where all of its entries have an image's suffix; if not,
      ``00000000.png`` and so on.
    - Files under ``files/`` become files again: those with an image's stem go with it, the others make blocks of their
      own after the images'.
    - The label arrays become a JSON sidecar of each image, ``{"pitch_yaw": [0.1, -0.2]}``, unless the sidecar or
      ``metadata.jsonl`` that the file carries says the same already.

    Raises InputError if images are float32 or have 2 or 4 channels, if a label is nothing that JSON can hold, and if
    two files would get one name or one a name outside the output.
    """

    def __init__(self, arrays: ArrayImages | HDF5Images, batch_size: int, to: str) -> None:
        super().__init__(arrays, batch_size)
        channels, height, width = arrays.shape
        if arrays.dtype.name == "float32" or channels not in (1, 3):
            raise InputError(
                f"{printable(self.path)}: images must be uint8 or uint16, grey or RGB, to become files, got "
                f"{arrays.dtype} with {channels} channel(s)"
            )
        if isinstance(arrays, HDF5Images):
            arrays.only_arrays(to)
        if arrays.other_names:
            raise InputError(
                f"{printable(self.path)}: array {printable(arrays.other_names[0])} must have length {len(arrays)}, as "
                "images has, to become files of each image; --to npz or hdf5 keeps it"
            )
        self.shape = (height, width) if channels == 1 else (height, width, channels)
        labels = arrays.labels()
        self.names = _image_names(labels, len(arrays))
        self.named = self.names is not None
        if self.names is None:
            self.names = [f"{i:08d}.png" for i in range(len(arrays))]
        else:
            del labels["name"]
        for name, array in labels.items():
            if array.dtype.kind not in "biufUS" or array.dtype.itemsize > 8 and array.dtype.kind == "f":
                raise InputError(
                    f"{printable(self.path)}: array {printable(name)} must hold numbers, booleans or strings to become "
                    f"JSON, got {array.dtype}"
                )
        self.labels = labels
        by_stem: dict[str, int] = {}
        for i, name in enumerate(self.names):
            self._check_name(name)
            kind = FORMATS[PurePosixPath(name).suffix.lower()]
            if arrays.dtype == np.uint16 and (kind == "JPEG" or (kind == "TIFF" and channels == 3)):
                raise InputError(f"{printable(self.path)}: {kind} must not hold 16-bit images, got {printable(name)}")
            if (twin := by_stem.setdefault(name[: name.rindex(".")], i)) != i:
                raise InputError(
                    f"{printable(self.path)}: images must differ in name up to the suffix, got "
                    f"{printable(self.names[twin])} and {printable(name)}"
                )
        taken = set(self.names)
        self.owned: dict[int, list[str]] = {}  # names of files by the image that they go with
        self.alone: list[str] = []
        for name in arrays.file_names:
            self._check_name(name)
            if name in taken:
                raise InputError(f"{printable(self.path)}: files must differ in name, got {printable(name)} twice")
            taken.add(name)
            owners = [by_stem[stem] for stem in stems(name) if stem in by_stem]
            if owners:  # the longest stem comes first: a.b.json goes with a.b.png
                self.owned.setdefault(owners[0], []).append(name)
            else:
                self.alone.append(name)

    @property
    def image_blocks(self) -> int:
        """Number of blocks that are ranges of images."""
        return super().blocks

    @property
    def blocks(self) -> int:
        """Number of blocks: the images', then those of the files that go with no image."""
        return self.image_blocks + -(-len(self.alone) // sources.FILES_PER_BLOCK)

    def shard(self, block: int) -> Path | None:
        """None: nothing comes out of a shard."""
        return None

    def shard_name(self, block: int) -> str | None:
        """Of the shard that a block is to become; None for files that go with no image."""
        return f"{block:08d}.tar" if block < self.image_blocks else None

    def files_alone(self, block: int) -> Iterator[RawUnit]:
        """The units of a block of files. Raises InputError if one is damaged."""
        size = sources.FILES_PER_BLOCK
        first = (block - self.image_blocks) * size
        for position, name in enumerate(self.alone[first : first + size]):
            yield RawUnit(position, (Part(name, data=self.arrays.read_file(name)),), None, self.path / name)

    def unit(self, image: int, position: int) -> tuple[RawUnit, Header]:
        """An image's files but for its pixels, and what is to be written of it.

        Raises InputError if a label array says something else than the sidecar that the file carries.
        """
        assert self.names is not None
        name = self.names[image]
        carried = {name: self.arrays.read_file(name) for name in self.owned.get(image, ())}
        sidecar = f"{name[: name.rindex('.')]}.json"
        if self.labels:
            row = {key: _plain(array[image], self.path, key) for key, array in self.labels.items()}
            if not any(_says(known, row) for known in self._known(name, carried.get(sidecar))):
                if sidecar in carried:
                    raise InputError(
                        f"{printable(self.path)}: arrays {', '.join(map(printable, row))} must be in files/"
                        f"{printable(sidecar)}, as it is to be the image's sidecar; image {image} has others there"
                    )
                carried[sidecar] = (json.dumps(row) + "\n").encode()
        parts = (Part(name), *(Part(name, data=data) for name, data in carried.items()))
        header = Header(self.shape, self.arrays.dtype.name, FORMATS[PurePosixPath(name).suffix.lower()])
        return RawUnit(position, parts, 0, self.path / name), header

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        called = "named as the array name says" if self.named else "named 00000000.png and so on"
        return f"{self.arrays.describe()}; {called}"

    def _known(self, name: str, sidecar: bytes | None) -> Iterator[dict[str, Any]]:
        """What the carried files say of an image."""
        if sidecar is not None:
            yield parse(sidecar)
        for said in self._said:
            yield from said.of(name)

    @cached_property
    def _said(self) -> tuple[Labels, Labels]:
        """What tables among the files, and the images' folders, say of the images.

        The first part of a name may be that of a shard, which tables and folders do not know.
        """
        assert self.names is not None
        found = Labels(self.names), Labels(self.names, inside=True)
        for name in filter(is_label_file, self.alone):
            for said in found:
                said.take(name, self.arrays.read_file(name))
        return found

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if "" in parts or ".." in parts or "." in parts or parts[0] == STATE or "\0" in name:
            raise InputError(f"{printable(self.path)}: names must stay inside the output, got {printable(name)!r}")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{printable(self.path)}: names must be Unicode text, got {printable(name)}") from None


def _image_names(labels: dict[str, np.ndarray], count: int) -> list[str] | None:
    """The array ``name`` as a list, if it holds names of image files."""
    array = labels.get("name")
    if array is None or array.shape != (count,) or array.dtype.kind not in "US":
        return None
    try:
        names = [name if isinstance(name, str) else name.decode() for name in array.tolist()]
    except UnicodeDecodeError:
        return None
    return names if all(PurePosixPath(name).suffix.lower() in FORMATS for name in names) else None


def _plain(value: Any, path: Path, key: str) -> Any:
    """One image's label as JSON has it."""
    if np.asarray(value).dtype.kind != "S":
        return value.tolist()
    try:
        return np.strings.decode(value, "utf-8").tolist()
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)}: array {printable(key)} must be UTF-8 to become JSON") from None


def _says(known: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether ``known`` holds all of ``row``; two that are not a number are the same."""
    return all(key in known and json.dumps(known[key]) == json.dumps(_as(known[key], row[key])) for key in row)


def _as(known: Any, value: Any) -> Any:
    """``value``, with 1.0 as 1 where ``known`` has whole numbers: an array has one type for all images."""
    if isinstance(known, list) and isinstance(value, list) and len(known) == len(value):
        return [_as(one, other) for one, other in zip(known, value, strict=True)]
    return known if type(known) in (int, float) and known == value and not isinstance(value, bool) else value
