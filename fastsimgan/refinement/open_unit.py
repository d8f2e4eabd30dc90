"""A work unit while a worker is at it, and its batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from fastsimgan.refinement.lease import Lease
from fastsimgan.refinement.manifest import ManifestHeader, ManifestLine, Provenance
from fastsimgan.refinement.sinks.base import UnitWriter
from fastsimgan.refinement.sources.unit_parts import Decoded


@dataclass
class OpenUnit:
    """A work unit in work. Several threads fill it; whoever ends the last of what it has `open` commits it."""

    lease: Lease
    writer: UnitWriter
    source_sha256: str | None = None
    lines: dict[int, list[ManifestLine]] = field(default_factory=dict)  # by sample
    changes: dict[int, float] = field(default_factory=dict)  # by batch: sum over its images of mean |R(x) - x|
    open: int = 1  # batches that have not been refined, and the reader if it is at the unit
    images: int = 0
    failed: int = 0
    pending: list[Future[None]] = field(default_factory=list)  # what is being written of it
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """One batch more is open."""
        with self.lock:
            self.open += 1

    def refined(self, images: int) -> None:
        """So many images more went through the refiner."""
        with self.lock:
            self.images += images

    def end(self) -> bool:
        """One of those that are open is done; whether it was the last."""
        with self.lock:
            self.open -= 1
            return not self.open

    def leave_out(self, decoded: Decoded) -> None:
        """List a bad image, with what is left out for it."""
        sample = decoded.sample
        names = self.writer.leave_out(sample)
        image = names.pop(sample.image or 0)
        self.failed += 1
        self.lines[sample.position] = [
            ManifestLine(image, source_sha256=decoded.sha256, error=str(decoded.error), left_out=names)
        ]

    def close(self, provenance: Provenance) -> ManifestHeader:
        """Finish the unit's files, all of which are written; returns its manifest's first line."""
        return ManifestHeader(
            work_unit=self.lease.work_unit,
            images=self.images,
            failed=self.failed,
            others=sum(not line.is_image for lines in self.lines.values() for line in lines),
            change=sum(self.changes[number] for number in sorted(self.changes)),
            source_sha256=self.source_sha256,
            written=self.writer.close(),
            provenance=provenance,
        )

    def manifest_lines(self) -> Iterator[ManifestLine]:
        """In the order of the samples."""
        for position in sorted(self.lines):
            yield from self.lines[position]


@dataclass
class Batch:
    """Images of one size and type out of one work unit."""

    unit: OpenUnit
    number: int  # in its unit
    pixels: np.ndarray  # [N, H, W] or [N, H, W, C]
    samples: list[Decoded] | None = None  # of which they are the images, without pixels; None where they stay arrays
