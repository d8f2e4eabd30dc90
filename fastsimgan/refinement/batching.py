"""Read and decode a work unit's images and put those of one size and type together.

What is put together depends on the unit alone, never on timing, threads or workers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager

import numpy as np

from fastsimgan.errors import SKIP, InputError
from fastsimgan.refinement.image_refiner import RefinerDriver
from fastsimgan.refinement.manifest import sha256
from fastsimgan.refinement.open_unit import Batch, OpenUnit
from fastsimgan.refinement.session import Session
from fastsimgan.refinement.sources.array_file import ImageRange
from fastsimgan.refinement.sources.unit_parts import Decoded, Sample
from fastsimgan.refinement.stages import StageThreads
from fastsimgan.refinement.tuning import fitting
from fastsimgan.storage.names import printable

BYTES_AHEAD = 1 << 27  # of decoded images that wait to be put into batches
SAMPLES_PER_TASK = 16  # at most, and BYTES_PER_TASK: handing one small image to another thread costs as much as a codec
BYTES_PER_TASK = 1 << 17  # of pixels


def task_size(nbytes: int) -> int:
    """Samples in a thread's task where each has ``nbytes`` of pixels."""
    return max(1, min(SAMPLES_PER_TASK, BYTES_PER_TASK // max(1, nbytes)))


_Kind = tuple[tuple[int, ...], str]  # of images that go together: shape and type


class Batching:
    """Makes batches of work units.

    Args:
        session: whose they are. An image that has more pixels than its batches is a batch of its own. At one that
            cannot be read or has other channels than the refiner its job says "fail", or "skip" it.
        decoder: decodes samples.
        aside: called with each sample that has no image, or none that can be refined.
    """

    def __init__(self, session: Session, decoder: Decoder, aside: Callable[[OpenUnit, Decoded], None]) -> None:
        self.source = session.source
        self.choice = session.choice
        self.on_error = session.job.on_error
        self.decoder = decoder
        self.aside = aside

    def batches(self, unit: OpenUnit) -> Iterator[Batch]:
        """A unit's batches.

        Raises:
            InputError: at what cannot be read, and at a bad image ("fail").
        """
        with self.decoder.reading():
            images = self.source.images(unit.lease.work_unit, self.decoder.refiner.span)
        return self._of_samples(unit) if images is None else self._of_images(unit, images)

    def _fitting(self, size: tuple[int, ...]) -> int:
        """Images of ``size`` (height, width, ...) in a full batch."""
        return fitting(self.choice.batch_size, self.choice.pixels, *size[:2])

    def _of_images(self, unit: OpenUnit, images: ImageRange) -> Iterator[Batch]:
        """Batches of a range of an array."""
        size = self._fitting(images.size)
        for number, start in enumerate(range(0, len(images), size)):
            with self.decoder.reading():
                pixels, samples = images.take(start, start + size)
            yield Batch(unit, number, pixels, samples)
        unit.source_sha256 = images.sha256()

    def _of_samples(self, unit: OpenUnit) -> Iterator[Batch]:
        """Batches of files.

        The samples come in order, and a group goes on when it is full, when too many pixels wait, or when too many
        samples have passed since its first.
        """
        work_unit = unit.lease.work_unit
        unit.source_sha256 = self.source.unit_sha256(work_unit)
        groups = _Groups(unit)
        for decoded in self.decoder.decoded(self.source.samples(work_unit)):
            if decoded.error is not None and self.on_error == "fail":
                raise decoded.error if decoded.unfit else InputError(f"{decoded.error} ({SKIP})")
            if decoded.image is None:
                self.aside(unit, decoded)
                continue
            shape = decoded.image.header.shape
            kind = shape, decoded.image.header.dtype
            if groups.add(kind, decoded) >= self._fitting(shape):
                yield groups.pop(kind)
            while groups.pixels > 4 * self.choice.pixels:
                yield groups.pop(groups.largest())
            oldest = groups.oldest()
            if oldest is not None and decoded.sample.position - groups.first(oldest) > 4 * self.choice.batch_size:
                yield groups.pop(oldest)
        while (oldest := groups.oldest()) is not None:
            yield groups.pop(oldest)


class _Groups:
    """Decoded images of one unit that wait for others of their size and type."""

    def __init__(self, unit: OpenUnit) -> None:
        self.unit = unit
        self.pixels = 0  # values of all that wait
        self._waiting: dict[_Kind, list[Decoded]] = {}
        self._number = 0  # of the next batch

    def add(self, kind: _Kind, decoded: Decoded) -> int:
        """Have an image wait; returns how many of its kind do."""
        group = self._waiting.setdefault(kind, [])
        group.append(decoded)
        self.pixels += _values(decoded)
        return len(group)

    def oldest(self) -> _Kind | None:
        """The kind whose first image came first; None if none waits."""
        return next(iter(self._waiting), None)  # dictionaries keep their order of insertion

    def first(self, kind: _Kind) -> int:
        """Position of the first image of a kind."""
        return self._waiting[kind][0].sample.position

    def largest(self) -> _Kind:
        """The kind that has most pixels."""
        return max(self._waiting, key=lambda each: sum(map(_values, self._waiting[each])))

    def pop(self, kind: _Kind) -> Batch:
        """A batch of all that wait of a kind."""
        group = self._waiting.pop(kind)
        self.pixels -= sum(map(_values, group))
        stack = np.stack([decoded.image.pixels for decoded in group if decoded.image is not None])
        empty = stack[:0, ...]  # the images' own pixels are not needed twice
        self._number += 1
        return Batch(self.unit, self._number - 1, stack, [decoded.with_pixels(empty) for decoded in group])


def _values(decoded: Decoded) -> int:
    assert decoded.image is not None
    return decoded.image.pixels.size


class Decoder:
    """Decodes samples, a few ahead of those that are asked for, in the threads of the stage "decode".

    Args:
        session: whose samples they are.
        refiner: what must take them.
        threads: the stages'.
        stage: as what the time is counted.
    """

    def __init__(self, session: Session, refiner: RefinerDriver, threads: StageThreads, stage: str) -> None:
        self.source = session.source
        self.sink = session.sink
        self.batch_size = session.choice.batch_size
        self.refiner = refiner
        self.threads = threads
        self.stage = stage
        self._lock = threading.Lock()
        self._held = 0  # bytes that wait for the refiner
        self._task = 1  # samples to decode at a time

    def reading(self) -> AbstractContextManager[None]:
        """Count the time within as reading."""
        return self.threads.times.time(self.stage)

    def decoded(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        """Each sample, decoded, in order."""
        waiting: deque[tuple[int, Future[list[Decoded]]]] = deque()
        number = 0  # of samples that wait
        task: list[Sample] = []

        def submit() -> None:
            nonlocal task
            if task:
                waiting.append((len(task), self.threads.submit("decode", self._decode_all, task)))
                task = []

        def first() -> Iterator[Decoded]:
            nonlocal number
            samples, future = waiting.popleft()
            number -= samples
            for decoded in future.result():
                self._hold(-decoded.nbytes)
                yield decoded

        at_work = self.threads.number("decode")
        for sample in samples:
            self._hold(Decoded(sample).nbytes)
            number += 1
            task.append(sample)
            if len(task) >= self._task:
                submit()
            while waiting and (
                number > 4 * self.batch_size or (number > at_work * self._task and self._held > BYTES_AHEAD)
            ):
                yield from first()
        submit()
        while waiting:
            yield from first()

    def _hold(self, size: int) -> None:
        """Count bytes that wait for the refiner."""
        with self._lock:
            self._held += size

    def _decode_all(self, samples: list[Sample]) -> list[Decoded]:
        with self.reading():
            return [self._decode(sample) for sample in samples]

    def _decode(self, sample: Sample) -> Decoded:
        if sample.image is None:
            return Decoded(sample)
        digest = ""
        try:
            data = sample.parts[sample.image].read()
            digest = sha256(data)
            image = self.source.decode(sample, data, self.refiner.span)
            channels = image.pixels.shape[2] if image.pixels.ndim == 3 else 1
            if channels != self.refiner.channels:
                error = InputError(
                    f"{printable(sample.where)}: must have {self.refiner.channels} channel(s), as the refiner has, "
                    f"got {channels}"
                )
                return Decoded(sample, sha256=digest, error=error, unfit=True)
            self.sink.check(image.header, sample.where)
            self._task = task_size(image.pixels.nbytes)
            self._hold(image.pixels.nbytes)
            return Decoded(sample, image, digest)
        except InputError as error:
            return Decoded(sample, sha256=digest, error=error)
