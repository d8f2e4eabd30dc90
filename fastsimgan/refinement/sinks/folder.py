"""A tree that mirrors the source."""

from __future__ import annotations

import threading
from pathlib import Path

from fastsimgan.data.formats.image_file import encode_image
from fastsimgan.data.formats.webdataset import shard_stem
from fastsimgan.errors import InputError
from fastsimgan.refinement.manifest import ManifestLine, Written, sha256
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sinks.base import Sink, UnitWriter, carry, name_in_tree
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.unit_parts import Decoded, Part, Sample
from fastsimgan.storage.names import printable


class FolderSink(Sink):
    """A tree that mirrors the source: each file under its own name, sidecars byte for byte.

    Args:
        run: whose output it is.
        source: what is refined.
        link: make hard links to labels instead of copies.
    """

    def __init__(self, run: RunDirectory, source: Source, *, link: bool = False) -> None:
        self.run = run
        self.source = source
        self.link = link

    def open_unit(self, work_unit: int) -> UnitWriter:
        """What writes a unit, from its beginning."""
        return FolderWriter(self.run, self.source.shard(work_unit), self.link)


class FolderWriter(UnitWriter):
    """Writes one unit of a `FolderSink`, or the files beside the shards of a `ShardsSink`.

    Args:
        run: whose output it is.
        shard: out of which the samples are; None where they have their own names.
        link: make hard links to labels instead of copies.
    """

    def __init__(self, run: RunDirectory, shard: Path | None, link: bool) -> None:
        self.run = run
        self.shard = shard
        self.link = link
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def put(self, decoded: Decoded) -> list[ManifestLine]:
        """Write a sample with its refined image, if it has one; returns its lines. Any thread, in any order."""
        encoded = None if decoded.image is None else encode_image(decoded.image)
        lines = []
        for index, part in enumerate(decoded.sample.parts):
            if part.is_folder:
                continue
            name = self._name(part)
            target = self.run.partial / name
            if index == decoded.sample.image:
                assert encoded is not None
                with self.run.writing():
                    self.run.write_file(target, encoded)
                lines.append(ManifestLine(name, sha256=sha256(encoded), source_sha256=decoded.sha256))
            else:
                lines.append(ManifestLine(name, sha256=carry(self.run, part, target, self.link)))
        return lines

    def leave_out(self, sample: Sample) -> list[str]:
        """Names of a bad sample's files, none of which the output will hold."""
        names = [self._name(part) for part in sample.parts]
        for name in names:  # an earlier try, killed before its commit, may have found it good
            (self.run.partial / name).unlink(missing_ok=True)
        return names

    def close(self) -> Written:
        """Nothing is left to do: each file has a line of its own."""
        return Written()

    def _name(self, part: Part) -> str:
        if self.shard is None:
            return part.name
        full = name_in_tree(self.shard, part)
        with self._lock:
            if full in self._names:
                raise InputError(
                    f"{printable(self.shard)}: members must differ in name, got "
                    f"{printable(full.removeprefix(f'{shard_stem(self.shard)}/'))} twice"
                )
            self._names.add(full)
        return full
