"""Offline refinement as a pipeline: read and decode, refine, encode and write, commit. Imports no torch.

Each stage has its own threads and a bounded queue before it, so that the slowest sets the speed. In memory are a few
batches of images, however many the input holds.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from fastsimgan.data.formats.image_file import StoredImage, decode_image
from fastsimgan.data.formats.numpy_file import UNIT, Span, check_range
from fastsimgan.data.pixel_values import WHITE
from fastsimgan.errors import SKIP, FastSimGANError, InputError
from fastsimgan.refinement.run_directory import Claim, Run
from fastsimgan.refinement.sinks import ArraysBlock, ArraysOutput, FolderBlock, Output, PackedOutput, ShardBlock, sha256
from fastsimgan.refinement.sources import ArraysInput, Input, RawUnit
from fastsimgan.refinement.tuning import PIXELS_PER_BATCH, fitting
from fastsimgan.refinement.unpacked import UnpackedInput
from fastsimgan.storage.names import printable

BYTES_AHEAD = 1 << 27  # of decoded images that wait to be put into batches
BYTES_IN_BATCHES = 1 << 26  # of batches from the reader to the disk; one batch may be larger
MEASURED = 1 << 18  # values whose change is measured at a time, so that they stay in the cache
BATCHES_QUEUED = 2  # in a device: one in work and the next
BATCHES_AHEAD = 3  # that wait for the refiner, and again for the encoders
BLOCKS_OPEN = 4  # at most, from the reader to the commit
UNITS_PER_TASK = 16  # at most, and BYTES_PER_TASK: handing one small image to another thread costs as much as its codec
BYTES_PER_TASK = 1 << 17  # of pixels


_Wait = Callable[[], tuple[np.ndarray, float]]


class ImageRefiner(Protocol):
    """What the pipeline asks of a refiner: `fastsimgan.inference.Refiner`, or anything that looks like it."""

    channels: int  # of the images it takes
    # ``span``, where it has one: the range of the floats that it takes, if that is not [0, 1]

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16 or float32 in [0, 1] -> the same shape and type."""


@runtime_checkable
class ParallelRefiner(ImageRefiner, Protocol):
    """A refiner that several threads call at a time: `fastsimgan.inference.per_core`."""

    threads: int

    def shared(self) -> AbstractContextManager[None]:
        """Held by the thread that starts those threads, for as long as they call."""


@runtime_checkable
class QueuedRefiner(ImageRefiner, Protocol):
    """A refiner that takes a batch before it has given back the last: `fastsimgan.inference.cuda_stream`."""

    def begin(self, images: np.ndarray) -> _Wait:
        """Queue a batch. The function that comes back waits for it: the batch, and the device's seconds."""


@runtime_checkable
class DeviceRefiner(QueuedRefiner, Protocol):
    """One that can be made ready for batches of one size, and knows the device's memory."""

    def warm_up(self, batch_size: int, height: int, width: int) -> None:
        """Compile for that size, and allocate."""

    def peak_bytes(self) -> int:
        """The most memory that the device has given to this process at a time."""


class Stages:
    """Seconds that the threads of each stage were at work. The stage with the largest share is the limit."""

    def __init__(self) -> None:
        self.busy: dict[str, float] = {}
        self.threads: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time within, of one thread of ``stage``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        with self._lock:
            self.busy[stage] = self.busy.get(stage, 0.0) + seconds


@dataclass
class Progress:
    """Images through the refiner and blocks committed since a worker's last report; its stages' seconds so far."""

    images: int = 0
    blocks: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    backend: str = ""
    peak_bytes: int = 0  # of a device's memory


@dataclass
class _Tally:
    """A block in work."""

    claim: Claim
    sink: FolderBlock | ShardBlock | ArraysBlock
    source_sha256: str | None = None
    lines: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by unit
    changes: dict[int, float] = field(default_factory=dict)  # by batch: sum over its images of mean |R(x) - x|
    open: int = 1  # batches that have not been refined, and the reader if it is at the block
    images: int = 0
    failed: int = 0
    pending: list[Future[None]] = field(default_factory=list)


@dataclass
class _Batch:
    tally: _Tally
    number: int  # in its block
    pixels: np.ndarray  # [N, H, W] or [N, H, W, C]
    units: list[tuple[RawUnit, StoredImage, str]] | None = None  # with SHA-256 of the encoded input; None for arrays


def _task_size(nbytes: int) -> int:
    """Units in a task where each has ``nbytes`` of pixels."""
    return max(1, min(UNITS_PER_TASK, BYTES_PER_TASK // max(1, nbytes)))


_Decoded = tuple[RawUnit, StoredImage | InputError | None, str]  # and the SHA-256 of the encoded bytes
_Units = list[tuple[RawUnit, StoredImage | None, str]]


def _size(unit: RawUnit, image: StoredImage | InputError | None) -> int:
    """Bytes that a unit keeps in memory: what was read of it, and its pixels."""
    data = sum(len(part.data) for part in unit.parts if part.data is not None)
    return data + (image.pixels.nbytes if isinstance(image, StoredImage) else 0)


class Worker:
    """Does blocks of one run, one after another, until `run` finds none left to claim.

    Args:
        run, source, output: what `open_run`, `open_input` and an output's class made.
        refiner: any `ImageRefiner`. It sees batches of images of one size and type.
        batch_size: images refined at a time, at least 1; fewer where they have more than ``pixels`` together.
        on_error: at an image that cannot be read or has other channels than the refiner: "fail", or "skip" it with its
            sidecars and list it in the manifest.
        threads: threads for decoding, and as many again for encoding.
        pixels: in a batch, at most; an image that has more is a batch of its own.
        report: called after each batch and each commit.
    """

    def __init__(
        self,
        run: Run,
        source: Input,
        output: Output,
        refiner: ImageRefiner,
        *,
        batch_size: int,
        on_error: Literal["fail", "skip"] = "fail",
        threads: int = 1,
        pixels: int = PIXELS_PER_BATCH,
        report: Callable[[Progress], None] = lambda progress: None,
        record: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.output_run = run
        self.source = source
        self.output = output
        self.refiner = refiner
        self.span: Span = getattr(refiner, "span", UNIT)
        self.batch_size = batch_size
        self.on_error = on_error
        self.threads = threads
        self.pixels = pixels
        self.report = report
        self.record = record or {}
        self.stages = Stages()
        self._refining = refiner.threads if isinstance(refiner, ParallelRefiner) else 1
        reading, writing = ("read, decode", threads), ("encode, write", threads)
        if isinstance(source, ArraysInput):
            reading = "read", 1
            if not isinstance(source, UnpackedInput):
                writing = "write", 1
            if source.arrays.shape[0] != refiner.channels:
                raise InputError(
                    f"{printable(source.path)}: images must have {refiner.channels} channel(s), as the refiner has, "
                    f"got {source.arrays.shape[0]}"
                )
        self.stages.threads = dict([reading, ("refine", self._refining), writing, ("commit", 1)])
        self._read_stage, self._write_stage = reading[0], writing[0]
        if isinstance(refiner, QueuedRefiner):
            self.stages.threads["device"] = 1
        self._begin = time.perf_counter()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._held = 0
        self._task = 1  # units to decode at a time
        self._room = threading.Condition()
        self._in_batches = 0

    def run(self, blocks: Iterable[int]) -> None:
        """Do each of ``blocks`` that can be claimed. Raises InputError at a bad image ("fail") or a full disk."""
        self._stop.clear()
        self._failure = None
        self._held = self._in_batches = 0
        self._claims: list[Claim] = []
        ahead = BATCHES_AHEAD + self._refining - 1
        ready: queue.Queue[_Batch | None] = queue.Queue(ahead)
        self._slots = threading.Semaphore(ahead)
        self._blocks = threading.Semaphore(BLOCKS_OPEN)
        reader = ThreadPoolExecutor(1, "read")
        self._decoders = ThreadPoolExecutor(self.threads, "decode")
        refiners = ThreadPoolExecutor(self._refining, "refine")
        # arrays are written, and hashed, in order
        self._encoders = ThreadPoolExecutor(1 if isinstance(self.output, ArraysOutput) else self.threads, "encode")
        self._committer = ThreadPoolExecutor(1, "commit")
        try:
            with self.refiner.shared() if isinstance(self.refiner, ParallelRefiner) else nullcontext():
                self._start(reader, self._read, blocks, ready)
                if self._refining > 1:
                    wait([self._start(refiners, self._refine_all, ready) for _ in range(self._refining)])
                else:
                    self._refine_all(ready)
            if not self._stop.is_set():
                self._committer.shutdown()  # waits for the last
        except _Stopped:
            pass
        finally:
            self._stop.set()
            for pool in (self._decoders, self._encoders, self._committer, refiners, reader):
                pool.shutdown(cancel_futures=True)
            for claim in self._claims:
                claim.release()
        if self._failure is not None:
            raise self._failure

    def _start(self, pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have ``pool`` do something; if it fails, all is given up."""

        def look(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None and not self._stop.is_set():
                self._failure = error
                self._stop.set()

        future = pool.submit(work, *arguments)
        future.add_done_callback(look)
        return future

    # --- read, decode

    def _read(self, blocks: Iterable[int], ready: queue.Queue[_Batch | None]) -> None:
        """The reading thread: batches of one block after another into ``ready``, and None at the end."""
        for block in blocks:
            self._until(lambda: self._blocks.acquire(timeout=0.5))
            claim = self.output_run.claim(block)
            if claim is None:
                self._blocks.release()
                continue
            self._claims = [held for held in self._claims if held.held] + [claim]
            tally = _Tally(claim, self.output.open_block(block))
            for batch in self._array_batches(tally) if isinstance(self.source, ArraysInput) else self._batches(tally):
                self._take_room(batch.pixels.nbytes)
                with self._lock:
                    tally.open += 1
                self._put_ready(ready, batch)
                del batch
            self._close(tally)
        self._put_ready(ready, None)

    def _until(self, true: Callable[[], bool]) -> None:
        """Call ``true``, which waits a little, again and again until it is so or the run is given up."""
        while not true():
            if self._stop.is_set():
                raise _Stopped

    def _put_ready(self, ready: queue.Queue[_Batch | None], batch: _Batch | None) -> None:
        def put() -> bool:
            try:
                ready.put(batch, timeout=0.5)
                return True
            except queue.Full:
                return False

        self._until(put)

    def _take_room(self, size: int) -> None:
        with self._room:

            def fits() -> bool:
                return not self._in_batches or self._in_batches + size <= BYTES_IN_BATCHES

            self._until(lambda: self._room.wait_for(fits, 0.5))
            self._in_batches += size

    def _close(self, tally: _Tally) -> None:
        """One of those that have a block open is done with it; the last hands it to the committer."""
        with self._lock:
            tally.open -= 1
            if tally.open:
                return
        commit = self._start(self._committer, self._commit, tally)
        commit.add_done_callback(lambda _: self._blocks.release())

    def _array_batches(self, tally: _Tally) -> Iterator[_Batch]:
        assert isinstance(self.source, ArraysInput)
        arrays = self.source.arrays
        if isinstance(self.source, UnpackedInput) and tally.claim.block >= self.source.image_blocks:
            for unit in self.source.files_alone(tally.claim.block):
                self._submit(tally, self._put, tally, [(unit, None, "")])
            return
        first, end = self.source.range(tally.claim.block)
        with self.stages.time(self._read_stage):
            images = arrays.read_range(first, end)
        digest = hashlib.sha256()
        size = self._fitting(arrays._shape[1:])
        for number, start in enumerate(range(0, end - first, size)):
            with self.stages.time(self._read_stage):
                piece = np.ascontiguousarray(images[start : start + size])
                digest.update(piece.reshape(-1).view(np.uint8).data)
                piece = np.array(piece, dtype=arrays.dtype)  # torch wants memory that it may write to
                piece = check_range(piece, arrays.path, first + start, self.span)
                units = None
                if isinstance(self.source, UnpackedInput):
                    piece = piece.reshape(len(piece), *self.source.shape)
                    units = [self._unpacked(self.source, first, start + i, image) for i, image in enumerate(piece)]
            yield _Batch(tally, number, piece, units)
        tally.source_sha256 = digest.hexdigest()

    @staticmethod
    def _unpacked(
        source: UnpackedInput, first: int, position: int, image: np.ndarray
    ) -> tuple[RawUnit, StoredImage, str]:
        unit, header = source.unit(first + position, position)
        return unit, StoredImage(image[:0], header), sha256(image.tobytes())

    def _batches(self, tally: _Tally) -> Iterator[_Batch]:
        """Decode a block's images and put those of one shape and type together.

        What is put together depends on the block alone, never on timing: the units come in order, and a group goes on
        when it is full, when too many pixels wait, or when too many units have passed since its first.
        """
        assert not isinstance(self.source, ArraysInput)
        tally.source_sha256 = self.source.block_sha256(tally.claim.block)
        waiting: dict[Any, list[tuple[RawUnit, StoredImage, str]]] = {}
        pixels = 0
        number = 0

        def pop(kind: Any) -> _Batch:
            nonlocal number, pixels
            units = waiting.pop(kind)
            pixels -= sum(image.pixels.size for _, image, _ in units)
            number += 1
            stack = np.stack([image.pixels for _, image, _ in units])
            empty = stack[:0, ...]  # the images' own pixels are not needed twice
            return _Batch(tally, number - 1, stack, [(u, replace(image, pixels=empty), d) for u, image, d in units])

        for unit, image, digest in self._decoded(self.source.units(tally.claim.block)):
            if isinstance(image, InputError):
                if self.on_error == "fail":
                    raise image if isinstance(image, _Unfit) else InputError(f"{image} ({SKIP})")
                self._leave_out(tally, unit, image, digest)
                continue
            if image is None:
                self._submit(tally, self._put, tally, [(unit, None, "")])
                continue
            kind = image.header.shape, image.header.dtype
            group = waiting.setdefault(kind, [])
            group.append((unit, image, digest))
            pixels += image.pixels.size
            if len(group) >= self._fitting(image.header.shape):
                yield pop(kind)
            while pixels > 4 * self.pixels and waiting:
                yield pop(max(waiting, key=lambda each: sum(image.pixels.size for _, image, _ in waiting[each])))
            oldest = next(iter(waiting), None)  # dictionaries keep their order of insertion
            if oldest is not None and unit.position - waiting[oldest][0][0].position > 4 * self.batch_size:
                yield pop(oldest)
        while waiting:
            yield pop(next(iter(waiting)))

    def _fitting(self, shape: tuple[int, ...]) -> int:
        """Images of ``shape`` in a full batch."""
        return fitting(self.batch_size, self.pixels, *shape[:2])

    def _decoded(self, units: Iterable[RawUnit]) -> Iterator[_Decoded]:
        """Each unit with its decoded image (None without one) or what is wrong with it; in order, in threads."""
        waiting: deque[tuple[int, Future[list[_Decoded]]]] = deque()
        number = 0  # of units that wait
        task: list[RawUnit] = []

        def submit() -> None:
            nonlocal task
            if task:
                waiting.append((len(task), self._decoders.submit(self._decode_all, task)))
                task = []

        def first() -> Iterator[_Decoded]:
            nonlocal number
            units, future = waiting.popleft()
            number -= units
            for unit, image, digest in future.result():
                self._hold(-_size(unit, image))
                yield unit, image, digest

        for unit in units:
            self._hold(_size(unit, None))
            number += 1
            task.append(unit)
            if len(task) >= self._task:
                submit()
            while waiting and (
                number > 4 * self.batch_size or (number > self.threads * self._task and self._held > BYTES_AHEAD)
            ):
                yield from first()
        submit()
        while waiting:
            yield from first()

    def _hold(self, size: int) -> None:
        """Count bytes that wait for the refiner."""
        with self._lock:
            self._held += size

    def _decode_all(self, units: list[RawUnit]) -> list[_Decoded]:
        """Units' decoded images and the SHA-256 of their encoded bytes."""
        with self.stages.time(self._read_stage):
            return [self._decode(unit) for unit in units]

    def _decode(self, unit: RawUnit) -> _Decoded:
        if unit.image is None:
            return unit, None, ""
        digest = ""
        try:
            data = unit.parts[unit.image].read()
            digest = sha256(data)
            image = decode_image(data, unit.where, key=getattr(self.source, "key", None), span=self.span)
            channels = image.pixels.shape[2] if image.pixels.ndim == 3 else 1
            if channels != self.refiner.channels:
                raise _Unfit(
                    f"{printable(unit.where)}: must have {self.refiner.channels} channel(s), as the refiner has, "
                    f"got {channels}"
                )
            if isinstance(self.output, PackedOutput):
                self.output.check(image.header, unit.where)
            self._task = _task_size(image.pixels.nbytes)
            self._hold(image.pixels.nbytes)
            return unit, image, digest
        except InputError as error:
            return unit, error, digest

    def _leave_out(self, tally: _Tally, unit: RawUnit, error: InputError, digest: str) -> None:
        assert not isinstance(tally.sink, ArraysBlock)
        names = tally.sink.leave_out(unit)
        image = names.pop(unit.image or 0)
        tally.failed += 1
        tally.lines[unit.position] = [{"name": image, "from": digest, "error": str(error), "left_out": names}]

    # --- refine

    def _refine_all(self, ready: queue.Queue[_Batch | None]) -> None:
        """A refining thread: every batch of ``ready`` until the end, which it leaves there for the others."""
        queued: deque[tuple[_Batch, _Wait]] = deque()  # in the device, in order
        while True:
            # what is queued keeps the reader waiting for room: where nothing comes, it goes on
            if queued and (ready.empty() or len(queued) >= BATCHES_QUEUED):
                self._finish(*queued.popleft())
                continue
            batch = self._take_ready(ready)
            if batch is None:
                break
            if isinstance(self.refiner, QueuedRefiner):
                with self.stages.time("refine"):
                    queued.append((batch, self.refiner.begin(batch.pixels)))
            else:
                with self.stages.time("refine"):
                    refined = self.refiner(batch.pixels, len(batch.pixels))
                self._hand_on(batch, refined)
                del refined
            del batch
        ready.put(None)
        while queued:
            self._finish(*queued.popleft())

    def _take_ready(self, ready: queue.Queue[_Batch | None]) -> _Batch | None:
        while not self._stop.is_set():
            try:
                return ready.get(timeout=0.5)
            except queue.Empty:
                pass
        raise _Stopped

    def _finish(self, batch: _Batch, wait: _Wait) -> None:
        """Wait for a batch that a device has in work."""
        with self.stages.time("refine"):
            refined, seconds = wait()
        self.stages.add("device", seconds)
        self._hand_on(batch, refined)

    def _hand_on(self, batch: _Batch, refined: np.ndarray) -> None:
        images = batch.pixels
        if refined.shape != images.shape or refined.dtype != images.dtype:
            raise TypeError(
                f"refiner must return {images.dtype}{list(images.shape)}, got {refined.dtype}{list(refined.shape)}"
            )
        self._until(lambda: self._slots.acquire(timeout=0.5))
        tally = batch.tally
        with self._lock:
            tally.images += len(images)
        self._tell(len(images), 0)
        last = self._submit(tally, self._measure, batch, refined)
        if batch.units is None:
            last = self._submit(tally, self._put_array, batch, refined)
        else:
            size = _task_size(refined[0].nbytes)
            for first in range(0, len(refined), size):
                units: _Units = []
                for index in range(first, min(first + size, len(refined))):
                    unit, image, digest = batch.units[index]
                    units.append((unit, replace(image, pixels=refined[index]), digest))
                last = self._submit(tally, self._put, tally, units)
        room = images.nbytes

        def written(_: Future[None]) -> None:
            self._slots.release()
            with self._room:
                self._in_batches -= room
                self._room.notify()

        last.add_done_callback(written)
        self._close(tally)

    # --- encode, write

    def _submit(self, tally: _Tally, work: Callable[..., None], *arguments: Any) -> Future[None]:
        future = self._encoders.submit(work, *arguments)
        tally.pending.append(future)
        return future

    def _measure(self, batch: _Batch, refined: np.ndarray) -> None:
        with self.stages.time(self._write_stage):
            new, old = refined.reshape(-1), batch.pixels.reshape(-1)
            wide = {"uint8": np.int16, "uint16": np.int32, "float32": np.float32}[refined.dtype.name]
            total = 0.0
            for first in range(0, len(new), MEASURED):
                part = slice(first, first + MEASURED)
                total += float(np.abs(np.subtract(new[part], old[part], dtype=wide)).sum(dtype=np.float64))
            white = self.span[1] - self.span[0] if refined.dtype == np.float32 else WHITE[refined.dtype.name]
            batch.tally.changes[batch.number] = total / refined[0].size * 255 / white

    def _put(self, tally: _Tally, units: _Units) -> None:
        assert not isinstance(tally.sink, ArraysBlock)
        with self.stages.time(self._write_stage):
            for unit, image, digest in units:
                lines = tally.sink.put(unit, image)
                if unit.image is not None:
                    lines[unit.image]["from"] = digest
                tally.lines[unit.position] = lines

    def _put_array(self, batch: _Batch, refined: np.ndarray) -> None:
        assert isinstance(batch.tally.sink, ArraysBlock)
        with self.stages.time(self._write_stage):
            batch.tally.sink.put(batch.number, refined)

    # --- commit

    def _commit(self, tally: _Tally) -> None:
        """Wait for a block's files, then write its manifest."""
        for future in tally.pending:
            future.result()
        with self.stages.time("commit"):
            header: dict[str, Any] = {
                "images": tally.images,
                "failed": tally.failed,
                "others": sum("from" not in line for lines in tally.lines.values() for line in lines),
                "change": sum(tally.changes[number] for number in sorted(tally.changes)),
            }
            if tally.source_sha256 is not None:
                header["from"] = tally.source_sha256
            header |= tally.sink.close() | self.record
            lines = (json.dumps(line) for position in sorted(tally.lines) for line in tally.lines[position])
            self.output_run.commit(tally.claim.block, header, lines)
            tally.claim.release()
        self._tell(tally.failed, 1)

    def _tell(self, images: int, blocks: int) -> None:
        with self._telling:  # one at a time, whichever thread has something to tell
            seconds = time.perf_counter() - self._begin
            backend = self.record.get("backend", "")
            peak = self.refiner.peak_bytes() if isinstance(self.refiner, DeviceRefiner) else 0
            self.report(Progress(images, blocks, seconds, dict(self.stages.busy), self.stages.threads, backend, peak))


class _Unfit(InputError):
    """A good image that this refiner does not take: the others will be no better."""


class _Stopped(FastSimGANError):
    """The run was given up while a thread waited."""
