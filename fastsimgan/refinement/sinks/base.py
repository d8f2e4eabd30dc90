"""What every kind of sink offers: work unit by work unit, and the whole at the end."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from fastsimgan.data.formats.listing import STATE
from fastsimgan.data.formats.stored_image import Header
from fastsimgan.data.formats.webdataset import shard_stem
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.manifest import ManifestLine, Written, sha256
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sources.unit_parts import Decoded, Part, Sample
from fastsimgan.storage.names import printable

COPIED = 1 << 20  # bytes (or values) at a time


class UnitWriter(Protocol):
    """Writes one work unit, sample by sample or batch by batch. Its files have their names when it is closed."""

    def put(self, decoded: Decoded) -> list[ManifestLine]:
        """Write a sample with its refined image, if it has one; returns its lines. Any thread, in any order."""
        raise TypeError(f"{type(self).__name__} takes batches of images, got the sample {decoded.sample.where}")

    def leave_out(self, sample: Sample) -> list[str]:
        """Names of a bad sample's files, none of which the output will hold."""
        raise TypeError(f"{type(self).__name__} takes batches of images, got the sample {sample.where}")

    def put_images(self, number: int, images: np.ndarray) -> None:
        """Write batch ``number`` of the unit, ``[n, H, W]`` or ``[n, H, W, C]``; one that comes too early waits."""
        raise TypeError(f"{type(self).__name__} takes samples, got a batch of {len(images)} images")

    def close(self) -> Written:
        """Finish the unit's files; returns what they are together."""


class Sink(Protocol):
    """What a run writes."""

    in_order: bool = False  # batches of one unit are written by one thread

    def open_unit(self, work_unit: int) -> UnitWriter:
        """What writes a unit, from its beginning."""

    def check(self, header: Header, where: Path) -> None:
        """Raise InputError if the image at ``where`` has no place in this output."""
        return None

    def finish(self) -> dict[str, str] | None:
        """Put the whole together once all units are committed; can be repeated after a kill.

        Returns:
            SHA-256 of its label arrays by name, equal before and after; None where its kind has none.
        """
        return None


def name_in_tree(shard: Path, part: Part) -> str:
    """What a member of a shard is called outside it.

    Raises:
        InputError: if that would lead out of the output.
    """
    name = PurePosixPath(part.name)
    if name.is_absolute() or ".." in name.parts or STATE in name.parts[:1] or "\0" in part.name:
        raise InputError(f"{printable(shard)}: names must stay inside the output, got {printable(part.name)}")
    return f"{shard_stem(shard)}/{name}"  # two shards may hold members of one name


def carry(run: RunDirectory, part: Part, target: Path, link: bool) -> str:
    """Copy or link a file that is not refined; returns its SHA-256.

    Raises:
        InputError: if it cannot be read or written.
    """
    if part.data is not None:
        with run.writing():
            run.write_file(target, part.data)
        return sha256(part.data)
    assert part.path is not None
    temporary = run.temporary()
    digest = hashlib.sha256()
    try:
        source = part.path.open("rb")
    except OSError as error:
        raise InputError(f"{printable(part.path)}: cannot be read: {error.strerror}") from error
    with source, run.writing():
        if link:
            os.link(os.path.realpath(part.path), temporary)
            while chunk := source.read(COPIED):
                digest.update(chunk)
        else:
            with temporary.open("xb") as copy:
                while chunk := source.read(COPIED):
                    digest.update(chunk)
                    copy.write(chunk)
        if link and target.exists() and os.path.samefile(target, temporary):
            temporary.unlink()  # rename does nothing between two links to one file
        else:
            run_paths.rename(temporary, target)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have a file on the disk before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
