"""What a run reads: each kind of input as fixed blocks, each block as units (files) or a range of images (arrays)."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tarfile import TarInfo
from typing import Any

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_file import ARRAY_FORMATS, FORMATS, lost_of, read_bytes, read_header, read_image
from fastsimgan.data.formats.image_folder import no_image
from fastsimgan.data.formats.listing import STATE, Links, Unit, is_image, list_units
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.open_images import holds_shards, open_arrays
from fastsimgan.data.formats.webdataset import find_shards, is_shard, look_into, read_samples, shard_stem
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable

FILES_PER_BLOCK = 1024  # units; a kill loses a few seconds' work, and ten million files make ten thousand manifests
BYTES_PER_BLOCK = 1 << 24  # of packed images
LOOKED_AT = 100  # images of a folder whose headers `describe` reads


@dataclass(frozen=True)
class Part:
    """One file of a unit: on the disk (``path``), or read already (``data``), then with its tar header."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    info: TarInfo | None = None

    def read(self) -> bytes:
        """Raises InputError if it cannot be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return read_bytes(self.path)


@dataclass(frozen=True)
class RawUnit:
    """An image with its sidecars, encoded as the input has them, or parts with no image among them."""

    position: int  # in its block
    parts: tuple[Part, ...]
    image: int | None  # which part
    where: Path  # what an error about the image is to name


class FolderInput:
    """A folder of images with sidecars and any other files.

    The listing is made once, at the run's start, and kept with its records: a run refines what was there then. A run
    that goes on compares the directories' times, and lists anew only if one has changed.
    """

    kind = "folder"

    def __init__(self, path: Path, images: str | None = None, links: Links = "files", key: str | None = None) -> None:
        self.path = path
        self.images = images
        self.links = links
        self.key = key
        self.identity: dict[str, Any] = {"input": _absolute(path), "input kind": self.kind}
        self._offsets: list[int] = []
        self._listing = Path()
        self._unread = ""
        self.counts = (0, 0)  # images, other files

    @property
    def blocks(self) -> int:
        """Number of blocks; known after `prepare` or `attach`."""
        return len(self._offsets) - 1

    def prepare(self, state: Path) -> None:
        """List the folder into ``state``.

        Raises InputError if it holds no image, breaks `list_units`'s rules, or, without ``images``, if some of its
        images seem to be labels or pictures among them would come out unrefined (`Census`).
        """
        census = Census()
        facts = self._list(state / "listing.jsonl", census, FORMATS)
        if not facts["images"] and census.arrays:
            census = Census()
            facts = self._list(state / "listing.jsonl", census, ARRAY_FORMATS)
        if not facts["images"]:
            raise InputError(no_image(self.path, self.images, facts["others"], census))
        if self.images is None:
            census.check(
                printable(self.path), lambda name: read_image(self.path / name, key=self.key, span=None), Reading.flag
            )
            refuse_unread(self.path, census)
        facts["unread"] = census.unread_text()
        (state / "listing.json").write_text(json.dumps(facts))
        self._take(state, facts)

    def attach(self, state: Path) -> None:
        """Take the listing from ``state``. Raises InputError if the folder's names have changed since."""
        try:
            facts = json.loads((state / "listing.json").read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{printable(state)}: the listing of the input cannot be read: {error}") from error
        if any(_mtime(self.path / folder) != mtime for folder, mtime in facts["folders"]):
            again = self._list(None, Census(), facts["formats"])
            if again["sha256"] != facts["sha256"]:
                raise InputError(
                    f"{printable(self.path)}: files must be those of the run's start ({facts['images']} images, "
                    f"{facts['others']} others), got {again['images']} images, {again['others']} others, or other names"
                )
        self._take(state, facts)

    def units(self, block: int) -> Iterator[RawUnit]:
        """The units of one block. Nothing is read yet."""
        with self._listing.open("rb") as file:
            file.seek(self._offsets[block])
            lines = file.read(self._offsets[block + 1] - self._offsets[block]).splitlines()
        for position, line in enumerate(lines):
            image, *others = json.loads(line)
            names = [name for name in (image, *others) if name is not None]
            paths = [self.path / name for name in names]
            parts = tuple(map(Part, names, paths))
            yield RawUnit(position, parts, None if image is None else 0, paths[0])

    def block_sha256(self, block: int) -> str | None:
        """None: each file has its own in the manifest."""
        return None

    def shard(self, block: int) -> Path | None:
        """None: the files are the folder's own."""
        return None

    def shard_name(self, block: int) -> str | None:
        """Of the shard that a block is to become."""
        return f"{block:08d}.tar"

    def describe(self) -> str:
        """What was found, in one line; sizes, depths and sidecars are those of the first hundred images."""
        kinds: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        sidecars: Counter[str] = Counter()
        units = (unit for block in range(self.blocks) for unit in self.units(block) if unit.image is not None)
        for unit in islice(units, LOOKED_AT):
            try:
                header = read_header(unit.where, key=self.key)
                kinds[f"{header} {header.format}"] += 1
                lost.update(lost_of(unit.where))
            except InputError:
                kinds["not readable"] += 1
            stem = len(unit.parts[0].name.rpartition(".")[0])
            sidecars.update(part.name[stem:] for part in unit.parts[1:])
        listed = ", ".join(f"{count} {kind}" if len(kinds) > 1 else kind for kind, count in kinds.most_common(5))
        looked = f"first {LOOKED_AT}: " if self.counts[0] > LOOKED_AT else ""
        beside = " ".join(printable(suffix) for suffix, _ in sidecars.most_common(8))
        return (
            f"{printable(self.path)}: folder, {self.counts[0]} images, {looked}{listed}, {self.counts[1]} other files"
            + (f" (sidecars {beside})" if beside else "")
            + (f"; {self._unread}" if self._unread else "")
            + _lost_text(lost, looked)
        )

    def _list(self, target: Path | None, census: Census, formats: Iterable[str]) -> dict[str, Any]:
        digest = hashlib.sha256()
        folders: list[tuple[str, int]] = []
        offsets, size, images, others = [0], 0, 0, 0
        file = None if target is None else target.open("wb")
        try:
            visited = lambda folder, mtime: folders.append((folder, mtime))  # noqa: E731
            units = list_units(self.path, self.images, visited, links=self.links, formats=set(formats))
            while chunk := list(islice(units, FILES_PER_BLOCK)):
                data = b"".join(_line(unit) for unit in chunk)
                digest.update(data)
                if file is not None:
                    file.write(data)
                size += len(data)
                offsets.append(size)
                images += sum(unit.image is not None for unit in chunk)
                others += sum(len(unit.others) for unit in chunk)
                for unit in chunk:
                    if unit.image is not None:
                        census.image(unit.image)
                    else:
                        census.alone(unit.others[0])
        finally:
            if file is not None:
                file.close()
        return {
            "formats": sorted(formats),
            "images": images,
            "others": others,
            "sha256": digest.hexdigest(),
            "offsets": offsets,
            "folders": folders,
        }

    def _take(self, state: Path, facts: dict[str, Any]) -> None:
        self._listing = (state / "listing.jsonl").absolute()
        self._offsets = facts["offsets"]
        self.counts = facts["images"], facts["others"]
        self._unread = facts.get("unread", "")
        self.identity |= {
            "images": self.images,
            "links": self.links,
            "array": self.key,
            "units in a block": FILES_PER_BLOCK,
            "listing sha256": facts["sha256"],
        }


class ShardsInput:
    """WebDataset shards: a block is a shard. Where a folder is given, the files beside its shards make blocks as well:
    they are carried along, never refined.
    """

    kind = "shards"

    def __init__(self, path: Path, images: str | None = None) -> None:
        self.path = path
        self.images = images
        self.shards = find_shards(path)
        self.beside = _beside(path, {shard.name for shard in self.shards}) if path.is_dir() else []
        facts = [(name, path / name) for name in self.beside]
        stats = [(name, at.stat()) for name, at in [(shard.name, shard) for shard in self.shards] + facts]
        names = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        self.identity: dict[str, Any] = {
            "input": _absolute(path),
            "input kind": self.kind,
            "images": images,
            "shards": len(self.shards),
            "files beside them": len(self.beside),
            "shards' and files' names, sizes and times, sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        }

    @property
    def blocks(self) -> int:
        """Number of shards, and of blocks of the files beside them."""
        return len(self.shards) + -(-len(self.beside) // FILES_PER_BLOCK)

    def prepare(self, state: Path) -> None:
        """Look into the shards. Raises InputError as `look_into` does, and at pictures that would stay unrefined."""
        census = look_into(self.path, self.shards, Reading(images=self.images))
        if self.images is None:
            refuse_unread(self.path, census)

    def attach(self, state: Path) -> None:
        """Nothing to do: a change shows in the identity."""

    def shard(self, block: int) -> Path | None:
        """The shard that a block is; None for a block of files beside the shards."""
        return self.shards[block] if block < len(self.shards) else None

    def shard_name(self, block: int) -> str | None:
        """Of the shard that a block is to become; None for a block of files beside the shards."""
        return f"{shard_stem(self.shards[block])}.tar" if block < len(self.shards) else None

    def units(self, block: int) -> Iterator[RawUnit]:
        """The samples of one shard, read as they come, or files beside the shards, not read yet.

        Raises InputError if a shard is one of our own and short of images.
        """
        shard = self.shard(block)
        if shard is None:
            first = (block - len(self.shards)) * FILES_PER_BLOCK
            for position, name in enumerate(self.beside[first : first + FILES_PER_BLOCK]):
                yield RawUnit(position, (Part(name, self.path / name),), None, self.path / name)
            return
        count = 0
        for position, sample in enumerate(read_samples(shard, self.images)):
            parts = tuple(Part(info.name, None, data, info) for info, data in sample.members)
            where = shard if sample.image is None else shard / parts[sample.image].name
            count += sample.image is not None
            if sample.image is None and self.images is None:
                census = Census()
                for part in parts:
                    census.alone(part.name)
                refuse_unread(shard, census)
            yield RawUnit(position, parts, sample.image, where)
        ours = self._ours.get(shard.name)
        if ours is not None and self.images is None and ours["images"] != count:
            raise InputError(f"{printable(shard)}: must hold {ours['images']} images, as we wrote, got {count}")

    def block_sha256(self, block: int) -> str | None:
        """The shard's; None for files beside. Raises InputError if one of our own shards was changed since."""
        shard = self.shard(block)
        if shard is None:
            return None
        found = hash_file(shard)
        ours = self._ours.get(shard.name)
        if ours is not None and ours["sha256"] != found:
            raise InputError(f"{printable(shard)}: must have SHA-256 {ours['sha256']}, as we wrote, got {found}")
        return found

    def refuse_shared_names(self) -> None:
        """Raise InputError if a file beside the shards is called as the folder to which a shard's members would go."""
        stems = {shard_stem(shard) for shard in self.shards}
        for name in self.beside:
            if (first := name.partition("/")[0]) in stems:
                raise InputError(
                    f"{printable(self.path)}: files beside shards must not be called as the folder that a shard's "
                    f"members go to, got {printable(name)} beside {printable(first)}.tar"
                )

    @cached_property
    def _ours(self) -> dict[str, dict[str, Any]]:
        """What our own manifests say of these shards, by name; empty if we did not write them."""
        state = self.shards[0].parent / STATE
        if not (state / "done.json").exists():
            return {}
        headers = [json.loads(path.open("rb").readline()) for path in sorted((state / "blocks").iterdir())]
        return {header["file"]: header for header in headers if "file" in header}

    def describe(self) -> str:
        """What was found, in one line. Opens no shard."""
        size = sum(shard.stat().st_size for shard in self.shards)
        text = f"{printable(self.path)}: WebDataset, {len(self.shards)} shards, {size / 1e6:.1f} MB"
        if self.beside:
            listed = ", ".join(printable(name) for name in self.beside[:3])
            more = f" and {len(self.beside) - 3} more" if len(self.beside) > 3 else ""
            images = sum(is_image(name, None) for name in self.beside)
            text += f"; carried along beside them: {listed}{more}" + (
                f" ({images} images, unrefined)" if images else ""
            )
        return text


def _beside(folder: Path, shards: set[str]) -> list[str]:
    """Every other file under a folder of shards, in `list_units`'s order. Raises InputError at shards further down."""
    found = []
    for unit in list_units(
        folder, images="", skip=shards.__contains__
    ):  # a glob that no name matches: none is an image
        (name,) = unit.others
        if is_shard(name):
            raise InputError(
                f"{printable(folder)}: shards must lie in the folder itself, or in one folder below it alone, got "
                f"{printable(name)} too: give that folder, or a quoted glob that matches all"
            )
        found.append(name)
    return found


class ArraysInput:
    """An ``.npz``, ``.npy`` or HDF5 file: a block is a range of images."""

    def __init__(self, arrays: ArrayImages | HDF5Images, batch_size: int) -> None:
        self.arrays = arrays
        self.path = arrays.path
        self.kind = "hdf5" if isinstance(arrays, HDF5Images) else "npz" if arrays.archive else "npy"
        channels, height, width = arrays.shape
        size = channels * height * width * arrays.dtype.itemsize
        self.batch_size = batch_size
        self.per_block = max(1, BYTES_PER_BLOCK // size // batch_size) * batch_size
        status = self.path.stat()
        self.identity: dict[str, Any] = {
            "input": _absolute(self.path),
            "input kind": self.kind,
            "input size and time": [status.st_size, status.st_mtime_ns],
            "images in a block": self.per_block,
            "array": arrays.key,
        }

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be shorter."""
        return -(-len(self.arrays) // self.per_block)

    def prepare(self, state: Path) -> None:
        """Nothing to do."""

    def attach(self, state: Path) -> None:
        """Nothing to do: a change shows in the identity."""

    def range(self, block: int) -> tuple[int, int]:
        """First image of a block, and the one after its last."""
        return block * self.per_block, min(len(self.arrays), (block + 1) * self.per_block)

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        return self.arrays.describe()


Input = FolderInput | ShardsInput | ArraysInput


def open_input(
    path: Path, *, batch_size: int, images: str | None = None, key: str | None = None, links: Links = "files"
) -> Input:
    """Find out what ``path`` holds. Reads names and headers only.

    Raises InputError if there is nothing, if it is nothing that can be refined, or if its headers break a rule.
    """
    if holds_shards(path):
        return ShardsInput(path, images)
    if path.is_dir():
        return FolderInput(path, images, links, key)
    if not path.exists():
        raise InputError(f"{printable(path)}: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)")
    if images is not None:
        raise InputError(f"images must be given for folders and shards only, got {images!r} for {printable(path)}")
    return ArraysInput(open_arrays(path, key), batch_size)


def refuse_unread(where: Path, census: Census) -> None:
    """Raise InputError if pictures of kinds that are not read would come out as they are among refined ones."""
    if unread := census.unread_text():
        raise InputError(
            f"{printable(where)}: {unread}: they would come out unrefined among refined ones; convert them (magick "
            "mogrify -format png), or --images 'GLOB' tells which files are images and leaves these as they are"
        )


def _lost_text(lost: Counter[str], looked: str) -> str:
    if not lost:
        return ""
    listed = ", ".join(f"{printable(what)} ({count})" for what, count in lost.most_common(5))
    return f"; not kept in the output, {looked}{listed}"


def _line(unit: Unit) -> bytes:
    return json.dumps([unit.image, *unit.others]).encode("ascii") + b"\n"


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _absolute(path: Path) -> str:
    return os.path.realpath(path)
