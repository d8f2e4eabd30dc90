"""WebDataset shards: tar files in which consecutive members with the same key make a sample. Read one at a time.

The key is a member's path up to the first dot of its base name, the rest is its extension: ``d/0001.png``,
``d/0001.json`` and ``d/0001.mask.png`` are one sample. Nothing is ever extracted to the disk here.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from fastsimgan.data.files import natural_key, printable
from fastsimgan.data.images import FORMATS, MAX_FILE_BYTES, Header, decode_image
from fastsimgan.data.listing import is_image
from fastsimgan.data.room import room_for
from fastsimgan.data.threads import in_threads
from fastsimgan.errors import InputError

BUFFER = 1 << 20  # bytes read of a shard at a time

Member = tuple[tarfile.TarInfo, bytes]


@dataclass(frozen=True)
class Sample:
    """Members in the order of the shard; ``image`` is the position among them of the image, None without one."""

    members: list[Member]
    image: int | None


class ShardImages:
    """The images of one or more shards, in order, as a set to train on. Raises InputError as `find_shards` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards = find_shards(path)

    def describe(self) -> str:
        """What was found, in one line. Opens nothing."""
        size = sum(shard.stat().st_size for shard in self.shards)
        return f"{printable(self.path)}: WebDataset, {len(self.shards)} shards, {size / 1e6:.1f} MB"

    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, 3]``, uint8 or uint16 (see `room_for`).

        Raises InputError if a shard breaks a rule of `read_samples`, if an image is bad, naming it, or if two differ in
        size or kind, or if there is none.
        """

        def encoded() -> Iterator[tuple[bytes, Path]]:
            for shard in self.shards:
                for sample in read_samples(shard):
                    if sample.image is not None:
                        info, data = sample.members[sample.image]
                        yield data, shard / info.name

        images: np.ndarray | None = None
        first: tuple[Path, Header] | None = None
        count = 0
        for where, image in in_threads(lambda found: (found[1], decode_image(*found)), encoded()):
            if images is None or first is None:
                first = where, image.header
                most = sum(_count_images(shard) for shard in self.shards)
                images = room_for((most, *image.header.shape), image.header.dtype, self.path)
            if (image.header.shape, image.header.dtype) != (first[1].shape, first[1].dtype):
                raise InputError(
                    f"{printable(self.path)}: images must be of one size and kind, {printable(first[0])} is {first[1]} "
                    f"and {printable(where)} is {image.header}"
                )
            images[count] = image.pixels
            count += 1
        if images is None:
            raise InputError(f"{printable(self.path)}: must hold at least one image ({' '.join(FORMATS)}), got none")
        return images[:count]

    def labels(self) -> dict[str, np.ndarray]:
        """Empty: labels in a shard only travel along; ``refine --to npz`` makes arrays of them."""
        return {}


def find_shards(path: Path) -> list[Path]:
    """The shards that ``path`` stands for: one ``.tar``, a folder that holds them, or a glob; in natural order.

    Raises InputError if there is none, or if two have one name.
    """
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix == ".tar"]
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path)) if name.endswith(".tar")]
    if not found:
        raise InputError(f"{printable(path)}: must be, hold or match at least one .tar shard, got none")
    names = [shard.name for shard in found]
    if len(set(names)) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{printable(path)}: shards must differ in file name, got {printable(twin)} twice")
    return sorted(found, key=natural_key)


def _count_images(path: Path) -> int:
    """Members that are called like images; their bytes are passed over. Raises InputError if it is no tar."""
    with _opened(path) as (_, tar):
        return sum(info.isfile() and _is_image(info.name, None) for info in tar)


def read_samples(path: Path, images: str | None = None) -> Iterator[Sample]:
    """The samples of one shard, in order.

    Args:
        path: an uncompressed tar file.
        images: a glob over member names that tells which are images. None: extension exactly that of an image
            (``.png``, and not ``.mask.png``).

    Raises InputError if the file is no tar or is cut short, at links, devices and sparse members, and at a sample with
    two images.
    """
    key: str | None = None
    members: list[Member] = []
    for member in read_members(path):
        new = sample_key(member[0].name)
        if members and new != key:
            yield _sample(path, members, images)
            members = []
        key = new
        members.append(member)
    if members:
        yield _sample(path, members, images)


def sample_key(name: str) -> str:
    """``d.x/a.mask.png`` -> ``d.x/a``."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _sample(path: Path, members: list[Member], images: str | None) -> Sample:
    found = [i for i, (info, _) in enumerate(members) if info.isfile() and _is_image(info.name, images)]
    if len(found) > 1:
        first, second = (printable(members[i][0].name) for i in found[:2])
        raise InputError(
            f"{printable(path)}: a sample must hold one image, got {first} and {second}; "
            "--images 'GLOB' tells which of them are images"
        )
    return Sample(members, found[0] if found else None)


def _is_image(name: str, images: str | None) -> bool:
    if images is not None:
        return is_image(name, images)
    return PurePosixPath(name).name.partition(".")[2].lower() in {suffix[1:] for suffix in FORMATS}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tarfile.TarFile]]:
    """A shard's file and the tar in it; whatever is wrong with either while they are open is an InputError."""
    try:
        with (
            path.open("rb", buffering=BUFFER) as raw,
            tarfile.open(fileobj=raw, mode="r:", errors="surrogateescape") as tar,
        ):
            yield raw, tar
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{printable(path)}: cannot be read as tar: {printable(str(error))}") from error
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror or printable(str(error))}") from error


def read_members(path: Path) -> Iterator[Member]:
    """Every file and folder of one tar with its bytes, in order. Raises InputError as `read_samples` does."""
    with _opened(path) as (raw, tar):
        for info in tar:
            if info.isdir():
                yield info, b""
                continue
            if not info.isfile() or info.issparse():
                raise InputError(
                    f"{printable(path)}: members must be plain files and folders, "
                    f"{printable(info.name)} is a link, device or sparse file"
                )
            if info.size > MAX_FILE_BYTES:
                raise InputError(
                    f"{printable(path)}: members must have at most {MAX_FILE_BYTES} bytes, "
                    f"{printable(info.name)} has {info.size}"
                )
            file = tar.extractfile(info)
            assert file is not None  # it is a plain file
            data = file.read()
            if len(data) != info.size:
                raise InputError(f"{printable(path)}: cut short within {printable(info.name)}")
            yield info, data
        # tarfile takes a file that ends anywhere between two members for a whole one
        raw.seek(tar.offset)
        if raw.read(512) != bytes(512):
            raise InputError(f"{printable(path)}: must end with an end-of-archive mark, got a truncated tar")
