"""Check a finished output against its manifests: every file there, none changed, none too many."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from fastsimgan.data.formats.array_file import FILES
from fastsimgan.data.formats.listing import STATE
from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.errors import InputError
from fastsimgan.refinement.manifest import (
    Counts,
    ManifestHeader,
    ManifestLine,
    RunRecord,
    Totals,
    read_header,
    read_lines,
    sha256,
)
from fastsimgan.refinement.records import FORMAT, read_json, read_record, to_json
from fastsimgan.refinement.run_paths import partial_of, state_of
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable


def verify(output: Path) -> Counts:
    """Read all of ``output`` again; returns what is in it.

    Raises:
        InputError: naming the first thing that is not as the manifests have it.
    """
    if not os.path.lexists(output):
        hint = f"; {printable(partial_of(output))} is unfinished" if partial_of(output).exists() else ""
        raise InputError(f"{printable(output)}: must exist{hint}")
    is_file = not output.is_dir()
    state = state_of(output, is_file)
    if (found := read_json(state / "run.json").get("format")) != FORMAT:
        raise InputError(f"{printable(state)}: format must be {FORMAT!r}, got {found!r}")
    record = read_record(RunRecord, state / "run.json")
    totals = read_record(Totals, state / "done.json")
    check: _Check = _PackedFile(output, record) if is_file else _Tree(output)
    counts = Counts()
    for work_unit in range(record.work_units):
        manifest = state / "blocks" / f"{work_unit:08d}.jsonl"
        header = read_header(manifest)
        if header.work_unit != work_unit:
            raise InputError(f"{printable(manifest)}: must be block {work_unit}'s, got {header.work_unit}'s")
        counts = replace(
            counts,
            work_units=counts.work_units + 1,
            images=counts.images + header.images,
            failed=counts.failed + header.failed,
            others=counts.others + header.others,
        )
        check.unit(header, read_lines(manifest))
    expected = to_json(totals.counts)
    for key, value in to_json(counts).items():
        if expected[key] != value:
            raise InputError(f"{printable(output)}: must have {expected[key]} {key}, as done.json has, got {value}")
    check.end(totals)
    return counts


class _Check(Protocol):
    """Compares an output of one kind with its manifests."""

    def unit(self, header: ManifestHeader, lines: Iterator[ManifestLine]) -> None:
        """Check one work unit; they come in order."""

    def end(self, totals: Totals) -> None:
        """Check that nothing else is there."""


class _PackedFile(_Check):
    """One file of arrays."""

    def __init__(self, output: Path, record: RunRecord) -> None:
        self.output = output
        identity = record.identity
        same = identity["input kind"] == identity["output kind"]  # a new kind of file calls its images so
        self.arrays = open_arrays(output, identity.get("array") if same else None)
        self._first = 0  # image of the next unit
        self._carried: dict[str, str] = {}  # SHA-256 of files, by name

    def unit(self, header: ManifestHeader, lines: Iterator[ManifestLine]) -> None:
        """Check one unit's images."""
        self._carried |= {line.name: line.sha256 for line in lines if line.sha256 is not None and not line.is_image}
        first, end = self._first, self._first + header.images
        images = self.arrays.read_range(first, end)
        digest = sha256(np.ascontiguousarray(images).reshape(-1).view(np.uint8).data)
        _same(self.output, f"images {first} to {end - 1}", header.written.sha256, digest)
        self._first = end

    def end(self, totals: Totals) -> None:
        """Check the number of images, the files and the label arrays."""
        if self._first != len(self.arrays):
            raise InputError(f"{printable(self.output)}: must hold {self._first} images, got {len(self.arrays)}")
        held = self.arrays.file_sha256()
        for name in sorted(self._carried):
            _same(self.output, f"file {name}", self._carried[name], held.get(name, "none"))
        labels, expected = self.arrays.label_sha256(), totals.labels or {}
        for name in sorted(labels.keys() | expected.keys()):
            what = name if name == FILES else f"array {name}"
            _same(self.output, what, expected.get(name, "none"), labels.get(name, "none"))


class _Tree(_Check):
    """A folder of files or of shards."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._files = 0

    def unit(self, header: ManifestHeader, lines: Iterator[ManifestLine]) -> None:
        """Check one unit's files, or its shard and the files beside."""
        if header.written.file is not None:
            lines = iter(self._shard(header, self.output / header.written.file, lines))
        for line in lines:
            if line.error is None:
                _same(self.output / line.name, "file", line.sha256, hash_file(self.output / line.name))
                self._files += 1

    def _shard(self, header: ManifestHeader, shard: Path, lines: Iterator[ManifestLine]) -> list[ManifestLine]:
        """Check a shard; returns the lines of the files beside it."""
        _same(shard, "file", header.written.sha256, hash_file(shard))
        self._files += 1
        beside = []
        images = 0
        with tarfile.open(shard, "r:", errors="surrogateescape") as tar:
            for line in lines:
                if line.beside:
                    beside.append(line)
                elif line.error is None:
                    member = tar.next()
                    name = None if member is None else member.name
                    if member is None or name != line.name:
                        raise InputError(f"{printable(shard)}: next member must be {line.name}, got {name}")
                    file = tar.extractfile(member)
                    data = b"" if file is None else file.read()
                    _same(shard, f"member {line.name}", line.sha256, sha256(data))
                    images += line.is_image
            if (extra := tar.next()) is not None:
                raise InputError(f"{printable(shard)}: must hold no other members, got {printable(extra.name)}")
        if images != header.images:
            raise InputError(f"{printable(shard)}: must hold {header.images} images, got {images}")
        return beside

    def end(self, totals: Totals) -> None:
        """Check that there are no other files."""
        there = sum(1 for _ in _files(self.output))
        if there != self._files:  # all that the manifests list was found
            raise InputError(
                f"{printable(self.output)}: must hold the {self._files} files of its manifests, got {there}"
            )


def _same(path: Path, what: str, expected: str | None, got: str) -> None:
    if expected != got:
        raise InputError(f"{printable(path)}: {printable(what)} must have SHA-256 {expected}, got {got}")


def _files(folder: Path) -> Iterable[str]:
    """Every file under ``folder``, our records apart."""
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.path != os.fspath(folder / STATE):
                        folders.append(entry.path)
                else:
                    yield entry.path
