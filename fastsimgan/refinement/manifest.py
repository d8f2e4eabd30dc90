"""What a run writes down: ``run.json``, a manifest for each work unit, and ``done.json``.

A manifest's first line counts, so that resuming reads one line a work unit; the others list each file with its SHA-256
before and after, or the reason why it failed. Nothing in it varies from run to run (no times, no hosts).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastsimgan.errors import InputError
from fastsimgan.refinement.records import OPTIONAL, flat, from_json, named, to_json
from fastsimgan.storage.names import printable


@dataclass(frozen=True)
class RunRecord:
    """``run.json``: what makes two runs the same one, and how many work units there are."""

    format: str
    identity: dict[str, Any]  # of `session.Settings` and the source's own
    work_units: int = field(metadata=named("blocks"))


@dataclass(frozen=True)
class Counts:
    """What is in an output, or in a part of it."""

    work_units: int = field(default=0, metadata=named("blocks"))
    images: int = 0  # refined and written
    failed: int = 0  # left out
    others: int = 0  # files that travelled along


@dataclass(frozen=True)
class Totals:
    """``done.json``: sums over all work units."""

    counts: Counts = field(metadata=flat(Counts))
    change: float  # sum over images of the mean of |R(x) - x| over pixels, in grey levels of 255
    labels: dict[str, str] | None = field(default=None, metadata=OPTIONAL)  # SHA-256 of label arrays; None: of none


@dataclass(frozen=True)
class Written:
    """What a work unit's files are together, where there is something to say."""

    file: str | None = field(default=None, metadata=OPTIONAL)  # the shard's name
    bytes: int | None = field(default=None, metadata=OPTIONAL)
    sha256: str | None = field(default=None, metadata=OPTIONAL)  # of the shard, or of the images' pixels
    shape: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)  # of each image
    dtype: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Provenance:
    """By what a work unit was refined."""

    device: str | None = field(default=None, metadata=OPTIONAL)
    backend: str | None = field(default=None, metadata=OPTIONAL)
    versions: dict[str, str] | None = field(default=None, metadata=OPTIONAL)  # of what decides about the bytes written


@dataclass(frozen=True)
class ManifestHeader:
    """A manifest's first line."""

    work_unit: int = field(metadata=named("block"))
    images: int
    failed: int
    others: int
    change: float  # sum over images of the mean of |R(x) - x| over pixels, in grey levels of 255
    source_sha256: str | None = field(default=None, metadata=named("from", optional=True))  # where it was one file
    written: Written = field(default=Written(), metadata=flat(Written))
    provenance: Provenance = field(default=Provenance(), metadata=flat(Provenance))
    lines_sha256: str = ""


@dataclass(frozen=True)
class ManifestLine:
    """One file of a work unit; if ``error`` says why, an image that was left out with the files named."""

    name: str
    beside: bool = field(default=False, metadata=OPTIONAL)  # not in the shard, but a file of its own
    sha256: str | None = field(default=None, metadata=OPTIONAL)
    source_sha256: str | None = field(default=None, metadata=named("from", optional=True))  # of a refined image's file
    error: str | None = field(default=None, metadata=OPTIONAL)
    left_out: list[str] | None = field(default=None, metadata=OPTIONAL)  # names of its sidecars

    @property
    def is_image(self) -> bool:
        """Whether it is an image, refined or left out; else it travels along as it is."""
        return self.source_sha256 is not None


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode_manifest(header: ManifestHeader, lines: Iterable[ManifestLine]) -> bytes:
    """A manifest's bytes; its header's ``lines_sha256`` is filled in."""
    body = "".join(json.dumps(to_json(line)) + "\n" for line in lines).encode("ascii")
    first = to_json(replace(header, lines_sha256=sha256(body)))
    return json.dumps(first).encode("ascii") + b"\n" + body


def read_header(path: Path) -> ManifestHeader:
    """A manifest's first line.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return from_json(ManifestHeader, json.loads(file.readline()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{printable(path)}: not a whole manifest: {type(error).__name__}: {error}") from error


def read_lines(path: Path) -> Iterator[ManifestLine]:
    """A manifest's other lines.

    Raises:
        InputError: if their SHA-256 is not the one in the first line.
    """
    expected = read_header(path).lines_sha256
    with path.open("rb") as file:
        file.readline()
        body = file.read()
    if sha256(body) != expected:
        raise InputError(f"{printable(path)}: must have SHA-256 {expected} below its first line; it was changed")
    return (from_json(ManifestLine, json.loads(line)) for line in body.splitlines())
