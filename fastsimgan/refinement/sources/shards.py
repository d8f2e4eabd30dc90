"""WebDataset shards, and the files beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastsimgan.data.formats.listing import STATE, is_image, list_units
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.webdataset import find_shards, is_shard, look_into, read_samples, shard_stem
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.refinement.manifest import ManifestHeader
from fastsimgan.refinement.records import from_json, named
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.sources.base import Source, refuse_unread
from fastsimgan.refinement.sources.unit_parts import Part, Sample, SourceIdentity, absolute
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable


@dataclass(frozen=True)
class ShardsIdentity(SourceIdentity):
    """What makes two sets of shards the same one."""

    images: str | None
    shards: int
    beside: int = field(metadata=named("files beside them"))
    facts_sha256: str = field(metadata=named("shards' and files' names, sizes and times, sha256"))


class ShardsSource(Source):
    """WebDataset shards: a work unit is a shard. Where a folder is given, the files beside its shards make units as
    well: they are carried along, never refined.

    Args:
        path: as `find_shards` takes it.
        images: a glob that tells which members are images; None: all that have an image's suffix.
    """

    kind = "shards"
    in_shards = True

    def __init__(self, path: Path, images: str | None = None) -> None:
        self.path = path
        self.glob = images
        self.shards = find_shards(path)
        self.beside = _beside(path, {shard.name for shard in self.shards}) if path.is_dir() else []
        facts = [(name, path / name) for name in self.beside]
        stats = [(name, at.stat()) for name, at in [(shard.name, shard) for shard in self.shards] + facts]
        names = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        self.identity = ShardsIdentity(absolute(path), self.kind, images, len(self.shards), len(self.beside), digest)

    @property
    def work_units(self) -> int:
        """Number of shards, and of units of the files beside them."""
        return len(self.shards) + unit_parts.units_of(len(self.beside))

    def prepare(self, state: Path) -> None:
        """Look into the shards.

        Raises:
            InputError: as `look_into` does, and at pictures that would stay unrefined.
        """
        census = look_into(self.path, self.shards, Reading(images=self.glob))
        if self.glob is None:
            refuse_unread(self.path, census)

    def towards(self, to: str) -> Source:
        """These shards.

        Raises:
            InputError: if a file beside them is called as the folder to which a shard's members would go.
        """
        stems = set() if to == "shards" else {shard_stem(shard) for shard in self.shards}
        for name in self.beside:
            if (first := name.partition("/")[0]) in stems:
                raise InputError(
                    f"{printable(self.path)}: files beside shards must not be called as the folder that a shard's "
                    f"members go to, got {printable(name)} beside {printable(first)}.tar"
                )
        return self

    def shard(self, work_unit: int) -> Path | None:
        """The shard that a unit is; None for a unit of files beside the shards."""
        return self.shards[work_unit] if work_unit < len(self.shards) else None

    def shard_name(self, work_unit: int) -> str | None:
        """Of the shard that a unit is to become; None for a unit of files beside the shards."""
        shard = self.shard(work_unit)
        return None if shard is None else f"{shard_stem(shard)}.tar"

    def samples(self, work_unit: int) -> Iterator[Sample]:
        """The samples of one shard, read as they come, or files beside the shards, not read yet.

        Raises:
            InputError: if a shard is one of our own and short of images.
        """
        shard = self.shard(work_unit)
        if shard is None:
            first = (work_unit - len(self.shards)) * unit_parts.SAMPLES_PER_UNIT
            for position, name in enumerate(self.beside[first : first + unit_parts.SAMPLES_PER_UNIT]):
                yield Sample(position, (Part(name, self.path / name),), None, self.path / name)
            return
        count = 0
        for position, sample in enumerate(read_samples(shard, self.glob)):
            parts = tuple(Part(info.name, None, data, info) for info, data in sample.members)
            where = shard if sample.image is None else shard / parts[sample.image].name
            count += sample.image is not None
            if sample.image is None and self.glob is None:
                census = Census()
                for part in parts:
                    census.alone(part.name)
                refuse_unread(shard, census)
            yield Sample(position, parts, sample.image, where)
        ours = self._ours.get(shard.name)
        if ours is not None and self.glob is None and ours.images != count:
            raise InputError(f"{printable(shard)}: must hold {ours.images} images, as we wrote, got {count}")

    def unit_sha256(self, work_unit: int) -> str | None:
        """The shard's; None for files beside.

        Raises:
            InputError: if one of our own shards was changed since.
        """
        shard = self.shard(work_unit)
        if shard is None:
            return None
        found = hash_file(shard)
        ours = self._ours.get(shard.name)
        if ours is not None and ours.written.sha256 != found:
            raise InputError(f"{printable(shard)}: must have SHA-256 {ours.written.sha256}, as we wrote, got {found}")
        return found

    @cached_property
    def _ours(self) -> dict[str, ManifestHeader]:
        """What our own manifests say of these shards, by name; empty if we did not write them."""
        state = self.shards[0].parent / STATE
        if not (state / "done.json").exists():
            return {}
        manifests = sorted((state / "blocks").iterdir())
        headers = [from_json(ManifestHeader, json.loads(path.open("rb").readline())) for path in manifests]
        return {header.written.file: header for header in headers if header.written.file is not None}

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
    """Every other file under a folder of shards, in `list_units`'s order.

    Raises:
        InputError: at shards further down.
    """
    found = []
    # a glob that no name matches: none is an image
    for sample in list_units(folder, images="", skip=shards.__contains__):
        (name,) = sample.others
        if is_shard(name):
            raise InputError(
                f"{printable(folder)}: shards must lie in the folder itself, or in one folder below it alone, got "
                f"{printable(name)} too: give that folder, or a quoted glob that matches all"
            )
        found.append(name)
    return found
