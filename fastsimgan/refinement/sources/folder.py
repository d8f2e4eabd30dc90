"""A folder of images with sidecars and any other files."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from fastsimgan.data.formats.image_file import decode_image, lost_of, read_header, read_image
from fastsimgan.data.formats.image_folder import no_image
from fastsimgan.data.formats.listing import Unit, list_units
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, FORMATS, StoredImage
from fastsimgan.data.pixel_values import Span
from fastsimgan.data.reading import Links, Reading
from fastsimgan.errors import InputError
from fastsimgan.refinement.records import from_json, named, to_json
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.sources.base import Source, refuse_unread
from fastsimgan.refinement.sources.unit_parts import Part, Sample, SourceIdentity, absolute
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable

LOOKED_AT = 100  # images whose headers `describe` reads


@dataclass(frozen=True)
class FolderIdentity(SourceIdentity):
    """What makes two folders the same one."""

    images: str | None
    links: Links
    key: str | None = field(metadata=named("array"))
    samples_per_unit: int = field(metadata=named("units in a block"))
    listing_sha256: str = field(metadata=named("listing sha256"))
    facts_sha256: str = field(metadata=named("files' sizes and times, sha256"))


@dataclass(frozen=True)
class Listing:
    """``listing.json``: of ``listing.jsonl``, which has one line a sample, ``[image or null, other files...]``, and of
    ``listing.facts``, which has the size and time (ns) of each of these files, two int64."""

    formats: list[str]  # suffixes of images
    images: int
    others: int
    sha256: str
    offsets: list[int]  # of each work unit's first line, and the end
    folders: list[tuple[str, int]]  # with their times in ns
    facts_sha256: str
    unread: str = ""  # what `describe` says of pictures that are not read


class FolderSource(Source):
    """A folder of images with sidecars and any other files.

    The listing is made once, at the run's start, and kept with its records: a run refines what was there then. A run
    that goes on compares the directories' times, and lists anew only if one has changed; `refuse_changes` compares each
    file's size and time.

    Args:
        path: the folder.
        images: a glob that tells which files are images; None: all that have an image's suffix.
        links: which are followed (`list_units`).
        key: name of the array of images, of images that are files of arrays.
    """

    kind = "folder"
    linkable = True

    def __init__(self, path: Path, images: str | None = None, links: Links = "files", key: str | None = None) -> None:
        self.path = path
        self.glob = images
        self.links = links
        self.key = key
        self.identity = SourceIdentity(absolute(path), self.kind)
        self._file = Path()
        self._listing: Listing | None = None

    @property
    def listing(self) -> Listing:
        """What was found; known after `prepare` or `attach`."""
        assert self._listing is not None
        return self._listing

    @property
    def work_units(self) -> int:
        """How many there are; known after `prepare` or `attach`."""
        return len(self.listing.offsets) - 1

    def prepare(self, state: Path) -> None:
        """List the folder into ``state``.

        Raises:
            InputError: if it holds no image, breaks `list_units`'s rules, or, without a glob, if some of its images
                seem to be labels or pictures among them would come out unrefined (`Census`).
        """
        census = Census()
        listing = self._list(state / "listing.jsonl", census, FORMATS)
        if not listing.images and census.arrays:
            census = Census()
            listing = self._list(state / "listing.jsonl", census, ARRAY_FORMATS)
        if not listing.images:
            raise InputError(no_image(self.path, self.glob, listing.others, census))
        if self.glob is None:
            census.check(
                printable(self.path), lambda name: read_image(self.path / name, key=self.key, span=None), Reading.flag
            )
            refuse_unread(self.path, census)
        listing = replace(listing, unread=census.unread_text())
        (state / "listing.json").write_text(json.dumps(to_json(listing)))
        self._take(state, listing)

    def attach(self, state: Path) -> None:
        """Take the listing from ``state``.

        Raises:
            InputError: if the folder's names have changed since.
        """
        try:
            listing = from_json(Listing, json.loads((state / "listing.json").read_bytes()))
        except (OSError, ValueError) as error:
            raise InputError(f"{printable(state)}: the listing of the input cannot be read: {error}") from error
        for name, sha256 in (("listing.jsonl", listing.sha256), ("listing.facts", listing.facts_sha256)):
            if (found := hash_file(state / name)) != sha256:
                raise InputError(f"{printable(state / name)}: must have SHA-256 {sha256}, as we wrote, got {found}")
        self.began_before = True
        if any(_mtime(self.path / folder) != mtime for folder, mtime in listing.folders):
            again = self._list(None, Census(), listing.formats)
            if again.sha256 != listing.sha256:
                raise InputError(
                    f"{printable(self.path)}: files must be those of the run's start ({listing.images} images, "
                    f"{listing.others} others), got {again.images} images, {again.others} others, or other names"
                )
        self._take(state, listing)

    def refuse_changes(self, state: Path) -> None:
        """Look at each file again.

        Raises:
            InputError: naming the first whose size or time is not that of the run's start.
        """
        with (state / "listing.jsonl").open("rb") as lines, (state / "listing.facts").open("rb") as facts:
            for line in lines:
                names = [name for name in json.loads(line) if name is not None]
                known = array("q", facts.read(16 * len(names)))
                for at, name in enumerate(names):
                    size, time = _facts(self.path, name)
                    if known[2 * at : 2 * at + 2] != array("q", (size, time)):
                        was, now = ("gone" if bytes_ < 0 else f"{bytes_} bytes" for bytes_ in (known[2 * at], size))
                        raise InputError(
                            f"{printable(self.path / name)}: must be as at the run's start, but was changed since "
                            f"({was} then, {now} now): start anew with another --output"
                        )

    def samples(self, work_unit: int) -> Iterator[Sample]:
        """One unit's samples. Nothing is read yet."""
        first, end = self.listing.offsets[work_unit : work_unit + 2]
        with self._file.open("rb") as file:
            file.seek(first)
            lines = file.read(end - first).splitlines()
        for position, line in enumerate(lines):
            image, *others = json.loads(line)
            names = [name for name in (image, *others) if name is not None]
            paths = [self.path / name for name in names]
            yield Sample(position, tuple(map(Part, names, paths)), None if image is None else 0, paths[0])

    def decode(self, sample: Sample, data: bytes, span: Span | None) -> StoredImage:
        """A sample's image from its bytes, floats in ``span``. A file of arrays is one, too."""
        return decode_image(data, sample.where, key=self.key, span=span)

    def describe(self) -> str:
        """What was found, in one line; sizes, depths and sidecars are those of the first hundred images."""
        kinds: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        sidecars: Counter[str] = Counter()
        samples = (sample for unit in range(self.work_units) for sample in self.samples(unit))
        for sample in islice((sample for sample in samples if sample.image is not None), LOOKED_AT):
            try:
                header = read_header(sample.where, key=self.key)
                kinds[f"{header} {header.format}"] += 1
                lost.update(lost_of(sample.where))
            except InputError:
                kinds["not readable"] += 1
            stem = len(sample.parts[0].name.rpartition(".")[0])
            sidecars.update(part.name[stem:] for part in sample.parts[1:])
        found = self.listing
        listed = ", ".join(f"{count} {kind}" if len(kinds) > 1 else kind for kind, count in kinds.most_common(5))
        looked = f"first {LOOKED_AT}: " if found.images > LOOKED_AT else ""
        beside = " ".join(printable(suffix) for suffix, _ in sidecars.most_common(8))
        return (
            f"{printable(self.path)}: folder, {found.images} images, {looked}{listed}, {found.others} other files"
            + (f" (sidecars {beside})" if beside else "")
            + (f"; {found.unread}" if found.unread else "")
            + _lost_text(lost, looked)
        )

    def _list(self, target: Path | None, census: Census, formats: Iterable[str]) -> Listing:
        digest, facts_digest = hashlib.sha256(), hashlib.sha256()
        folders: list[tuple[str, int]] = []
        offsets, size, images, others = [0], 0, 0, 0
        file = None if target is None else target.open("wb")
        facts = None if target is None else target.with_suffix(".facts").open("wb")
        try:
            visited = lambda folder, mtime: folders.append((folder, mtime))  # noqa: E731
            samples = list_units(self.path, self.glob, visited, links=self.links, formats=set(formats))
            while chunk := list(islice(samples, unit_parts.SAMPLES_PER_UNIT)):
                data = b"".join(_line(sample) for sample in chunk)
                digest.update(data)
                if file is not None and facts is not None:
                    file.write(data)
                    names = (name for sample in chunk for name in (sample.image, *sample.others) if name is not None)
                    numbers = array("q", chain.from_iterable(_facts(self.path, name) for name in names)).tobytes()
                    facts.write(numbers)
                    facts_digest.update(numbers)
                size += len(data)
                offsets.append(size)
                images += sum(sample.image is not None for sample in chunk)
                others += sum(len(sample.others) for sample in chunk)
                for sample in chunk:
                    if sample.image is not None:
                        census.image(sample.image)
                    else:
                        census.alone(sample.others[0])
        finally:
            for opened in (file, facts):
                if opened is not None:
                    opened.close()
        sha256, facts_sha256 = digest.hexdigest(), facts_digest.hexdigest()
        return Listing(sorted(formats), images, others, sha256, offsets, folders, facts_sha256)

    def _take(self, state: Path, listing: Listing) -> None:
        self._file = (state / "listing.jsonl").absolute()
        self._listing = listing
        self.identity = FolderIdentity(
            self.identity.path,
            self.kind,
            self.glob,
            self.links,
            self.key,
            unit_parts.SAMPLES_PER_UNIT,
            listing.sha256,
            listing.facts_sha256,
        )


def _lost_text(lost: Counter[str], looked: str) -> str:
    if not lost:
        return ""
    listed = ", ".join(f"{printable(what)} ({count})" for what, count in lost.most_common(5))
    return f"; not kept in the output, {looked}{listed}"


def _line(sample: Unit) -> bytes:
    return json.dumps([sample.image, *sample.others]).encode("ascii") + b"\n"


def _facts(folder: Path, name: str) -> tuple[int, int]:
    """Size and time (ns) of a file, or what a link leads to; negative where it is gone."""
    try:
        status = os.stat(f"{folder}/{name}")
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
