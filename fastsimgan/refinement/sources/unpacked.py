"""Packed images as the files that they are to become: `refine --to folder` and `--to shards` of an array file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastsimgan.data.formats.label_table import parse
from fastsimgan.data.formats.labels import Labels, is_label_file
from fastsimgan.data.formats.listing import STATE, stems
from fastsimgan.data.formats.stored_image import FORMATS, Header, StoredImage
from fastsimgan.data.pixel_values import Span
from fastsimgan.errors import InputError
from fastsimgan.refinement.manifest import sha256
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.sources.array_file import ArrayFile, ImageRange
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.unit_parts import Decoded, Part, Sample
from fastsimgan.storage.names import printable


class UnpackedSource(Source):
    """An ``.npz``, ``.npy`` or HDF5 file as samples: the reverse of `PackedSink`.

    - An image is called as the array ``name`` says, where all of its entries have an image's suffix; if not,
      ``00000000.png`` and so on.
    - Files under ``files/`` become files again: those with an image's stem go with it, the others make work units of
      their own after the images'.
    - The label arrays become a JSON sidecar of each image, ``{"pitch_yaw": [0.1, -0.2]}``, unless the sidecar or
      ``metadata.jsonl`` that the file carries says the same already.

    Raises:
        InputError: if images are float32 or have 2 or 4 channels, if a label is nothing that JSON can hold, and if two
            files would get one name or one a name outside the output.
    """

    encoded = False

    def __init__(self, file: ArrayFile) -> None:
        self.file = file
        self.path = file.path
        self.kind = file.kind
        self.identity = file.identity
        self._check_kind()
        height, width = file.size
        self.shape = (height, width) if file.channels == 1 else (height, width, file.channels)
        self.labels = file.arrays.labels()
        names = _image_names(self.labels, len(file.arrays))
        self.named = names is not None
        if names is None:
            names = [f"{i:08d}.png" for i in range(len(file.arrays))]
        else:
            del self.labels["name"]
        self.names = names
        self._check_labels()
        self.owned: dict[int, list[str]] = {}  # names of files by the image that they go with
        self.alone: list[str] = []
        self._give_files(self._check_names())

    def _check_kind(self) -> None:
        """Raise InputError if the images, or what lies beside them, cannot be files."""
        arrays = self.file.arrays
        if arrays.dtype.name == "float32" or self.file.channels not in (1, 3):
            raise InputError(
                f"{printable(self.path)}: images must be uint8 or uint16, grey or RGB, to become files, got "
                f"{arrays.dtype} with {self.file.channels} channel(s)"
            )
        self.file.only_arrays("files")
        if arrays.other_names:
            raise InputError(
                f"{printable(self.path)}: array {printable(arrays.other_names[0])} must have length {len(arrays)}, as "
                "images has, to become files of each image; --to npz or hdf5 keeps it"
            )

    def _check_labels(self) -> None:
        """Raise InputError if a label is nothing that JSON can hold."""
        for name, array in self.labels.items():
            if array.dtype.kind not in "biufUS" or array.dtype.itemsize > 8 and array.dtype.kind == "f":
                raise InputError(
                    f"{printable(self.path)}: array {printable(name)} must hold numbers, booleans or strings to become "
                    f"JSON, got {array.dtype}"
                )

    def _check_names(self) -> dict[str, int]:
        """Every image by its stem.

        Raises:
            InputError: if one cannot be called as it is.
        """
        by_stem: dict[str, int] = {}
        wide, colour = self.file.arrays.dtype == np.uint16, self.file.channels == 3
        for i, name in enumerate(self.names):
            self._check_name(name)
            kind = FORMATS[PurePosixPath(name).suffix.lower()]
            if wide and (kind == "JPEG" or (kind == "TIFF" and colour)):
                raise InputError(f"{printable(self.path)}: {kind} must not hold 16-bit images, got {printable(name)}")
            if (twin := by_stem.setdefault(name[: name.rindex(".")], i)) != i:
                raise InputError(
                    f"{printable(self.path)}: images must differ in name up to the suffix, got "
                    f"{printable(self.names[twin])} and {printable(name)}"
                )
        return by_stem

    def _give_files(self, by_stem: dict[str, int]) -> None:
        """Give each file that the arrays carry to its image.

        Raises:
            InputError: if one cannot be called as it is.
        """
        taken = set(self.names)
        for name in self.file.arrays.file_names:
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
    def work_units(self) -> int:
        """How many there are: the images', then those of the files that go with no image."""
        return self.file.work_units + unit_parts.units_of(len(self.alone))

    def check_channels(self, channels: int) -> None:
        """Raise InputError if the images have others than a refiner's ``channels``."""
        self.file.check_channels(channels)

    def shard_name(self, work_unit: int) -> str | None:
        """Of the shard that a unit is to become; None for files that go with no image."""
        return super().shard_name(work_unit) if work_unit < self.file.work_units else None

    def images(self, work_unit: int, span: Span) -> ImageRange | None:
        """One unit's images with their samples; None for a unit of files.

        Raises:
            InputError: if they cannot be read.
        """
        return UnpackedRange(self, work_unit, span) if work_unit < self.file.work_units else None

    def samples(self, work_unit: int) -> Iterator[Sample]:
        """The samples of a unit of files.

        Raises:
            InputError: if one is damaged.
        """
        first = (work_unit - self.file.work_units) * unit_parts.SAMPLES_PER_UNIT
        for position, name in enumerate(self.alone[first : first + unit_parts.SAMPLES_PER_UNIT]):
            yield Sample(position, (Part(name, data=self.file.arrays.read_file(name)),), None, self.path / name)

    def sample(self, image: int, position: int) -> tuple[Sample, Header]:
        """An image's files but for its pixels, and what is to be written of it.

        Args:
            image: in the file.
            position: in its work unit.

        Raises:
            InputError: if a label array says something else than the sidecar that the file carries.
        """
        name = self.names[image]
        carried = {name: self.file.arrays.read_file(name) for name in self.owned.get(image, ())}
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
        header = Header(self.shape, self.file.arrays.dtype.name, FORMATS[PurePosixPath(name).suffix.lower()])
        return Sample(position, parts, 0, self.path / name), header

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        called = "named as the array name says" if self.named else "named 00000000.png and so on"
        return f"{self.file.arrays.describe()}; {called}"

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
        found = Labels(self.names), Labels(self.names, inside=True)
        for name in filter(is_label_file, self.alone):
            for said in found:
                said.take(name, self.file.arrays.read_file(name))
        return found

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if "" in parts or ".." in parts or "." in parts or parts[0] == STATE or "\0" in name:
            raise InputError(f"{printable(self.path)}: names must stay inside the output, got {printable(name)!r}")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{printable(self.path)}: names must be Unicode text, got {printable(name)}") from None


class UnpackedRange(ImageRange):
    """Images of an `UnpackedSource`, each with the other files of its sample."""

    def __init__(self, source: UnpackedSource, work_unit: int, span: Span) -> None:
        super().__init__(source.file, work_unit, span)
        self.source = source

    def take(self, start: int, end: int) -> tuple[np.ndarray, list[Decoded] | None]:
        """Images ``start`` to ``end - 1``, ``[n, H, W]`` or ``[n, H, W, 3]``, and their samples.

        Raises:
            InputError: as `UnpackedSource.sample`.
        """
        pixels, _ = super().take(start, end)
        pixels = pixels.reshape(len(pixels), *self.source.shape)
        return pixels, [self._sample(start + i, image) for i, image in enumerate(pixels)]

    def _sample(self, position: int, image: np.ndarray) -> Decoded:
        sample, header = self.source.sample(self.first + position, position)
        return Decoded(sample, StoredImage(image[:0], header), sha256(image.tobytes()))


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
