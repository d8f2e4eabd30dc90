"""A worker's pipeline: read and decode, refine, encode and write, commit. Imports no torch.

Each stage has its own threads and a bounded queue before it, so that the slowest sets the speed. In memory are a few
batches of images, however many the source holds.
"""

from __future__ import annotations

import importlib.metadata
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import wait

import numpy as np

from fastsimgan.refinement.batching import Batching, Decoder
from fastsimgan.refinement.image_refiner import RefinerDriver, Wait
from fastsimgan.refinement.lease import Lease
from fastsimgan.refinement.manifest import Provenance
from fastsimgan.refinement.open_unit import Batch, OpenUnit
from fastsimgan.refinement.report import Progress
from fastsimgan.refinement.session import Session
from fastsimgan.refinement.stages import ByteBudget, StageThreads, StageTimes, StoppedError
from fastsimgan.refinement.writing import Writing

BYTES_IN_BATCHES = 1 << 26  # of batches from the reader to the disk; one batch may be larger
BATCHES_AHEAD = 3  # that wait for the refiner, and again for the encoders
UNITS_OPEN = 4  # at most, from the reader to the commit


class Worker:
    """Does work units of one run, one after another, until `run` finds none left to lease.

    Args:
        session: whose units it does.
        refiner: sees batches of images of one size and type.
        threads: for decoding, and as many again for encoding.

    Raises:
        InputError: if all images are known to have other channels than the refiner.
    """

    def __init__(self, session: Session, refiner: RefinerDriver, threads: int) -> None:
        self.session = session
        self.refiner = refiner
        self.threads = threads
        session.source.check_channels(self.refiner.channels)
        self.provenance = Provenance(self.refiner.device_name, self.refiner.backend_name, versions())
        reading = ("read, decode", threads) if session.source.encoded else ("read", 1)
        writing = ("write", 1) if session.sink.in_order else ("encode, write", threads)
        stages = dict([reading, ("refine", self.refiner.threads), writing, ("commit", 1)])
        self.times = StageTimes(stages | ({"device": 1} if self.refiner.is_queued else {}))
        self.read_stage, self.write_stage = reading[0], writing[0]
        self._begin = time.perf_counter()

    def run(self, work_units: Iterable[int], report: Callable[[Progress], None]) -> None:
        """Do each of ``work_units`` that can be leased; ``report`` is called after each batch and each commit.

        Raises:
            InputError: at a bad image ("fail") or a full disk.
        """
        _Pass(self, report).run(work_units)

    def progress(self, images: int, work_units: int) -> Progress:
        """So many more, and what the stages have done so far."""
        seconds = time.perf_counter() - self._begin
        busy, threads = dict(self.times.busy), self.times.threads
        return Progress(
            images, work_units, seconds, busy, threads, self.refiner.backend_name, self.refiner.peak_bytes()
        )


class _Pass:
    """One pass of a worker over work units."""

    def __init__(self, worker: Worker, report: Callable[[Progress], None]) -> None:
        self.worker = worker
        self.report = report
        self._telling = threading.Lock()
        self.session = worker.session
        self.refiner = worker.refiner
        refining = worker.refiner.threads
        self.threads = StageThreads(
            {
                "decode": worker.threads,
                "encode": 1 if worker.session.sink.in_order else worker.threads,
                "commit": 1,
                "refine": refining,
                "read": 1,
            },
            worker.times,
        )
        self.writing = Writing(self.threads, worker.write_stage, worker.refiner.span, self._through)
        decoder = Decoder(self.session, worker.refiner, self.threads, worker.read_stage)
        self.batching = Batching(self.session, decoder, self.writing.aside)
        ahead = BATCHES_AHEAD + refining - 1
        self._ready: queue.Queue[Batch | None] = queue.Queue(ahead)  # None: the end
        self._slots = threading.Semaphore(ahead)  # of batches that are being written
        self._units = threading.Semaphore(UNITS_OPEN)
        self._bytes = ByteBudget(BYTES_IN_BATCHES, self.threads)
        self._leases: list[Lease] = []

    def run(self, work_units: Iterable[int]) -> None:
        """Read in one thread, refine in this one or in several, and wait for what is written.

        Raises:
            InputError: as `Worker.run`.
        """
        threads, refining = self.threads, self.refiner.threads
        try:
            with self.refiner.shared():
                threads.start("read", self._read, work_units)
                if refining > 1:
                    wait([threads.start("refine", self._refine_all) for _ in range(refining)])
                else:
                    self._refine_all()
            if not threads.stopped:
                threads.finish("commit")
        except StoppedError:
            pass
        finally:
            threads.close()
            for lease in self._leases:
                lease.release()
        threads.raise_failure()

    # --- read

    def _read(self, work_units: Iterable[int]) -> None:
        """The reading thread: batches of one unit after another, and None at the end."""
        for work_unit in work_units:
            self.threads.acquire(self._units)
            lease = self.session.run.lease(work_unit)
            if lease is None:
                self._units.release()
                continue
            self._leases = [held for held in self._leases if held.held] + [lease]
            unit = OpenUnit(lease, self.session.sink.open_unit(work_unit))
            for batch in self.batching.batches(unit):
                self._bytes.take(batch.pixels.nbytes)
                unit.begin()
                self.threads.put(self._ready, batch)
                del batch
            self.writing.end(unit)
        self.threads.put(self._ready, None)

    # --- refine

    def _refine_all(self) -> None:
        """A refining thread: every batch that is ready until the end, which it leaves there for the others."""
        begun: deque[tuple[Batch, Wait]] = deque()  # in order
        while True:
            # what is queued keeps the reader waiting for room: where nothing comes, it goes on
            if begun and (self._ready.empty() or len(begun) >= self.refiner.depth):
                self._finish(*begun.popleft())
                continue
            batch = self.threads.get(self._ready)
            if batch is None:
                break
            with self.worker.times.time("refine"):
                begun.append((batch, self.refiner.begin(batch.pixels)))
            del batch
        self._ready.put(None)
        while begun:
            self._finish(*begun.popleft())

    def _finish(self, batch: Batch, refine: Wait) -> None:
        """Wait for a batch that was begun, and hand it on."""
        with self.worker.times.time("refine"):
            refined, seconds = refine()
        if seconds is not None:
            self.worker.times.add("device", seconds)
        self._hand_on(batch, refined)

    def _hand_on(self, batch: Batch, refined: np.ndarray) -> None:
        images = batch.pixels
        if refined.shape != images.shape or refined.dtype != images.dtype:
            raise TypeError(
                f"refiner must return {images.dtype}{list(images.shape)}, got {refined.dtype}{list(refined.shape)}"
            )
        self.threads.acquire(self._slots)
        batch.unit.refined(len(images))
        self._tell(len(images), 0)
        nbytes = images.nbytes

        def written() -> None:
            self._slots.release()
            self._bytes.give(nbytes)

        self.writing.write(batch, refined, written)

    # --- commit

    def _through(self, unit: OpenUnit) -> None:
        """Have a unit committed of which nothing is to be refined any more."""
        commit = self.threads.start("commit", self._commit, unit)
        commit.add_done_callback(lambda _: self._units.release())

    def _commit(self, unit: OpenUnit) -> None:
        """Wait for a unit's files, then write its manifest."""
        for future in unit.pending:
            future.result()
        with self.worker.times.time("commit"):
            self.session.run.commit(unit.close(self.worker.provenance), unit.manifest_lines())
            unit.lease.release()
        self._tell(unit.failed, 1)

    def _tell(self, images: int, work_units: int) -> None:
        with self._telling:  # one at a time, whichever thread has something to tell
            self.report(self.worker.progress(images, work_units))


def versions() -> dict[str, str]:
    """Of what decides about the bytes written."""
    return {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "torch")}
