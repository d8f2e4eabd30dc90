"""Encode and write refined batches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from fastsimgan.data.pixel_values import WHITE, Span
from fastsimgan.refinement.batching import task_size
from fastsimgan.refinement.open_unit import Batch, OpenUnit
from fastsimgan.refinement.sources.unit_parts import Decoded
from fastsimgan.refinement.stages import StageThreads

MEASURED = 1 << 18  # values whose change is measured at a time, so that they stay in the cache


class Writing:
    """The stage "encode" of a worker.

    Args:
        threads: the stages'.
        stage: as what the time is counted.
        span: the range of floats.
        through: called with each unit of which nothing is to be refined any more; what is left of it is `pending`.
    """

    def __init__(self, threads: StageThreads, stage: str, span: Span, through: Callable[[OpenUnit], None]) -> None:
        self.threads = threads
        self.stage = stage
        self.span = span
        self.through = through

    def write(self, batch: Batch, refined: np.ndarray, written: Callable[[], None]) -> None:
        """Have a batch's refined images written; ``written`` is called when they need no memory any more."""
        unit = batch.unit
        last = self._submit(unit, self._measure, batch, refined)
        if batch.samples is None:
            last = self._submit(unit, self._put_images, batch, refined)
        else:
            size = task_size(refined[0].nbytes)
            for first in range(0, len(refined), size):
                some = slice(first, first + size)
                pairs = zip(batch.samples[some], refined[some], strict=True)
                samples = [decoded.with_pixels(pixels) for decoded, pixels in pairs]
                last = self._submit(unit, self._put, unit, samples)
        last.add_done_callback(lambda _: written())
        self.end(unit)

    def aside(self, unit: OpenUnit, decoded: Decoded) -> None:
        """Write a sample that has no image, or list one that has a bad image."""
        if decoded.error is not None:
            unit.leave_out(decoded)
        else:
            self._submit(unit, self._put, unit, [decoded])

    def end(self, unit: OpenUnit) -> None:
        """One of those that have a unit open is done with it."""
        if unit.end():
            self.through(unit)

    def _submit(self, unit: OpenUnit, work: Callable[..., None], *arguments: object) -> Future[None]:
        future = self.threads.submit("encode", work, *arguments)
        unit.pending.append(future)
        return future

    def _measure(self, batch: Batch, refined: np.ndarray) -> None:
        with self.threads.times.time(self.stage):
            new, old = refined.reshape(-1), batch.pixels.reshape(-1)
            wide = {"uint8": np.int16, "uint16": np.int32, "float32": np.float32}[refined.dtype.name]
            total = 0.0
            for first in range(0, len(new), MEASURED):
                part = slice(first, first + MEASURED)
                total += float(np.abs(np.subtract(new[part], old[part], dtype=wide)).sum(dtype=np.float64))
            white = self.span[1] - self.span[0] if refined.dtype == np.float32 else WHITE[refined.dtype.name]
            batch.unit.changes[batch.number] = total / refined[0].size * 255 / white

    def _put(self, unit: OpenUnit, samples: list[Decoded]) -> None:
        with self.threads.times.time(self.stage):
            for decoded in samples:
                unit.lines[decoded.sample.position] = unit.writer.put(decoded)

    def _put_images(self, batch: Batch, refined: np.ndarray) -> None:
        with self.threads.times.time(self.stage):
            batch.unit.writer.put_images(batch.number, refined)
