"""WebDataset shards: tar files in which consecutive members with the same key make a sample. Read one at a time.

The key is a member's path up to the first dot of its base name, the rest is its extension: ``d/0001.png``,
``d/0001.json`` and ``d/0001.mask.png`` are one sample. Nothing is ever extracted to the disk here.
"""

from __future__ import annotations

import glob
import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from fastsimgan.data.formats.image_file import MAX_FILE_BYTES, decode_image
from fastsimgan.data.formats.labels import Labels, is_label_file
from fastsimgan.data.formats.listing import ALL, is_image, is_junk
from fastsimgan.data.formats.mask_detection import LOOKED_AT, Census
from fastsimgan.data.formats.stored_image import FORMATS, Header
from fastsimgan.data.ragged import Images, Packer, one_size
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import allocate
from fastsimgan.hardware.threads import AHEAD, in_threads, thread_count
from fastsimgan.storage.names import natural_key, printable
from fastsimgan.storage.regular_file import read_regular, require_regular

BUFFER = 1 << 20  # bytes read of a shard at a time
HELD = 1 << 26  # bytes of images, at most, that are looked at before a run
MOST_SHARDS = 1_000_000  # that a brace pattern may mean

Member = tuple[tarfile.TarInfo, bytes]


@dataclass(frozen=True)
class Sample:
    """Members in the order of the shard; ``image`` is the position among them of the image, None without one."""

    members: list[Member]
    image: int | None


class ShardImages:
    """The images of one or more shards, in order, as a set to train on.

    Raises InputError as `find_shards` and `look_into` do.
    """

    def __init__(self, path: Path, reading: Reading | None = None) -> None:
        self.path = path
        self.reading = reading or Reading()
        self.shards = find_shards(path)
        self.census = look_into(path, self.shards, self.reading)
        self.left_out: list[str] = []
        """``NAME: REASON`` of what `load` has left out."""
        self.resized = 0
        """Images that `load` has brought to another size."""

    def describe(self) -> str:
        """What was found, in one line. Opens nothing."""
        size = sum(shard.stat().st_size for shard in self.shards)
        unread = self.census.unread_text()
        return f"{printable(self.path)}: WebDataset, {len(self.shards)} shards, {size / 1e6:.1f} MB" + (
            f"; in the first: {unread}" if unread else ""
        )

    def load(self) -> np.ndarray:
        """`load_set` of images that have one size. Raises InputError as that does, and if ``reading.any_size``."""
        return one_size(self.path, self.reading.any_size, self.load_set)

    def load_set(self) -> Images:
        """All images, ``[N, H, W]`` or ``[N, H, W, 3]`` (see `allocate`), or, with ``reading.any_size``, of any sizes.

        Raises InputError if a shard breaks a rule of `read_samples`, if an image is bad, naming it, or if two differ in
        size or kind, or if there is none.
        """

        def encoded() -> Iterator[tuple[bytes, Path]]:
            for shard in self.shards:
                for sample in read_samples(shard, self.reading.images):
                    if sample.image is not None:
                        info, data = sample.members[sample.image]
                        yield data, shard / info.name

        def decode(found: tuple[bytes, Path]) -> tuple[Path, tuple[Header, np.ndarray] | InputError]:
            try:
                image = decode_image(*found, self.reading.upright, span=self.reading.span)
            except InputError as error:
                if self.reading.on_error == "fail":
                    raise self.reading.way_out(error) from None
                return found[1], error
            # here, so that no large pictures wait that are to become small
            return found[1], (image.header, self.reading.scaled(self.reading.coloured(image.pixels, colour)))

        images: np.ndarray | None = None
        packer = Packer(self.path) if self.reading.any_size else None
        first: tuple[Path, Header] | None = None
        count = 0
        colour = self.reading.colour if self.reading.colour in ("grey", "rgb") else ""
        self.left_out, self.resized = [], 0
        ahead = 4 * thread_count() if self.reading.any_size else AHEAD
        for where, found in in_threads(decode, encoded(), ahead):
            if isinstance(found, InputError):
                self.left_out.append(str(found))
                continue
            header, pixels = found
            self.resized += pixels.shape[:2] != header.shape[:2]
            if first is None:
                first = where, header
                shape = pixels.shape
            if self.reading.differ((pixels.shape, shape)) or header.dtype != first[1].dtype:
                one = "kind" if self.reading.any_size else "size and kind"
                raise InputError(
                    f"{printable(self.path)}: images must be of one {one}, {printable(first[0])} is {first[1]} "
                    f"and {printable(where)} is {header}"
                )
            count += 1
            if packer is not None:
                packer.add(pixels)
                continue
            if images is None:
                most = sum(_count_images(shard, self.reading.images) for shard in self.shards)
                images = allocate((most, *pixels.shape), header.dtype, self.path)
            images[count - 1] = pixels
        if not count:
            raise InputError(f"{printable(self.path)}: must hold at least one image ({' '.join(FORMATS)}), got none")
        if packer is not None:
            return packer.finish()
        assert images is not None
        return images[:count]

    def labels(self) -> dict[str, np.ndarray]:
        """What sidecars, tables beside the shards or class folders say of every image (see `Labels`)."""
        names = [
            f"{shard_stem(shard)}/{sample.members[sample.image][0].name}"
            for shard in self.shards
            for sample in read_samples(shard, self.reading.images)
            if sample.image is not None
        ]
        found = Labels(names, inside=True)
        for shard in self.shards:
            for info, data in read_members(shard):
                if is_label_file(info.name):
                    found.take(f"{shard_stem(shard)}/{info.name}", data)
        if self.path.is_dir():
            for path in sorted(self.path.iterdir()):
                if path.is_file() and is_label_file(path.name):
                    found.take(path.name, read_regular(path))
        return found.arrays()


def find_shards(path: Path) -> list[Path]:
    """The shards that ``path`` stands for: one ``.tar``, a folder that holds them, a glob or a brace pattern
    (``data-{000..012}.tar``, ``{a,b}.tar``); gzipped ones (``.tar.gz``, ``.tgz``) too. In natural order.

    Raises InputError if there is none, if one of a pattern is missing, or if two have one name.
    """
    if path.is_dir():
        found = [entry for entry in path.iterdir() if is_shard(entry.name)]
    elif path.exists():
        found = [path]
    else:
        named = _braces(str(path))
        found = [Path(name) for each in named for name in glob.glob(each) if is_shard(name)]
        if len(named) > 1 and (
            missing := [name for name in named if not glob.has_magic(name) and not Path(name).exists()]
        ):
            raise InputError(
                f"{printable(path)}: every shard of a pattern must exist, got none at {printable(missing[0])} "
                f"({len(missing)} of {len(named)} are missing)"
            )
    if not found:
        raise InputError(f"{printable(path)}: must be, hold or match at least one .tar shard, got none")
    names = [shard_stem(shard) for shard in found]
    if len(set(names)) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{printable(path)}: shards must differ in file name, got {printable(twin)} twice")
    return sorted(found, key=natural_key)


def is_shard(name: str) -> bool:
    """Whether a file is called as a shard: ``.tar``, ``.tar.gz`` or ``.tgz``."""
    return name.endswith((".tar", ".tar.gz", ".tgz")) and not is_junk(PurePosixPath(name).name)


def shard_stem(path: Path) -> str:
    """``a.tar.gz`` -> ``a``: what a shard's members are put under outside it, and its name in an output."""
    name = path.name.removesuffix(".gz")
    return name[:-4] if name.endswith((".tar", ".tgz")) else path.stem


def _braces(pattern: str) -> list[str]:
    """``a{0..2}{x,y}`` -> its six names, as a shell has it."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is None:
        step = 1 if int(last) >= int(first) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) and len(first) == len(last) else 0
        if abs(int(last) - int(first)) > MOST_SHARDS:
            raise InputError(f"{printable(pattern)}: a pattern must mean at most {MOST_SHARDS} shards")
        pieces = [f"{i:0{width}d}" for i in range(int(first), int(last) + step, step)]
    else:
        pieces = listed.split(",")
    return [name for piece in pieces for name in _braces(pattern[: match.start()] + piece + pattern[match.end() :])]


def look_into(path: Path, shards: list[Path], reading: Reading) -> Census:
    """Look at the first samples of one shard of each kind of name, and find an image at all.

    Raises InputError if no shard holds an image, naming the first member and why it is none, and, without
    ``reading.images``, if some images seem to be labels (`Census`).
    """
    census = Census()
    held: dict[str, tuple[bytes, Path]] = {}
    patterns: set[str] = set()
    found, first, dotted, left = False, "", "", HELD
    for shard in shards:
        pattern = re.sub(r"\d+", "#", shard.name)
        new = pattern not in patterns and len(patterns) < LOOKED_AT
        if found and not new:
            continue
        patterns.add(pattern)
        seen = 0
        for sample in read_samples(shard, reading.images):
            names = [info.name for info, _ in sample.members if info.isfile()]
            first = first or (names[0] if names else "")
            seen += 1
            if sample.image is None:
                for name in names:
                    census.alone(f"{shard_stem(shard)}/{name}")
                    dotted = dotted or (name if is_image(name, None) else "")
            else:
                found = True
                info, data = sample.members[sample.image]
                left -= len(data)
                name = f"{shard_stem(shard)}/{info.name}" if len(shards) > 1 else info.name
                census.image(name)
                held[name] = data, shard / info.name
            if found and (not new or seen >= LOOKED_AT or left < 0):
                break
    if not found:
        why = ""
        if dotted:
            key, _, extension = PurePosixPath(dotted).name.partition(".")
            why = (
                f": WebDataset takes a name up to its first dot, so {printable(dotted)} is the .{printable(extension)} "
                f"of {printable(key)}; rename it, or --images 'GLOB' tells which files are images"
            )
        elif unread := census.unread_text():
            why = f": {unread}"
        elif first:
            why = f": the first member is {printable(first)}"
        of = " ".join(FORMATS) + (f", matching {reading.images}" if reading.images else "")
        raise InputError(f"{printable(path)}: must hold at least one image ({of}), got none{why}")
    if reading.images is None:
        census.check(printable(path), lambda name: decode_image(*held[name], span=None), reading.flag)
    return census


def _count_images(path: Path, images: str | None) -> int:
    """Members that are called like images; their bytes are passed over. Raises InputError if it is no tar."""
    with _opened(path) as (_, tar):
        return sum(info.isfile() and _is_image(info.name, images) for info in tar)


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
    if images not in (None, ALL):
        return is_image(name, images)
    extension = PurePosixPath(name).name.partition(".")[2].lower()
    return extension in {suffix[1:] for suffix in FORMATS} and not is_junk(name)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tarfile.TarFile]]:
    """A shard's file, unpacked, and the tar in it; whatever is wrong while they are open is an InputError."""
    try:
        require_regular(path)
        with path.open("rb", buffering=BUFFER) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            raw: IO[bytes] = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
            with tarfile.open(fileobj=raw, mode="r:", errors="surrogateescape") as tar:
                yield raw, tar
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
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
