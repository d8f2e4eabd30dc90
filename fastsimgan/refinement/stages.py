"""The threads of a worker's stages, what they wait for, and how long each stage is at work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from fastsimgan.errors import FastSimGANError

LOOK = 0.5  # seconds between two looks, of a thread that waits, at whether all is given up

Item = TypeVar("Item")


class StoppedError(FastSimGANError):
    """The run was given up while a thread waited."""


class StageTimes:
    """Seconds that the threads of each stage were at work. The stage with the largest share is the limit.

    Args:
        threads: how many each stage has, by its name.
    """

    def __init__(self, threads: dict[str, int]) -> None:
        self.busy: dict[str, float] = {}
        self.threads = threads
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


class StageThreads:
    """The threads of all stages, for one pass over work units. When one of them fails, the others end where they wait.

    Args:
        threads: how many each stage has, by its name, in the order in which they are to end.
        times: what counts their time.
    """

    def __init__(self, threads: dict[str, int], times: StageTimes) -> None:
        self.times = times
        self._threads = threads
        self._pools = {stage: ThreadPoolExecutor(number, stage) for stage, number in threads.items()}
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def number(self, stage: str) -> int:
        """How many threads a stage has."""
        return self._threads[stage]

    @property
    def stopped(self) -> bool:
        """Whether all is given up, or done."""
        return self._stop.is_set()

    def submit(self, stage: str, work: Callable[..., Item], *arguments: Any) -> Future[Item]:
        """Have a stage do something; whoever waits for it sees its failure."""
        return self._pools[stage].submit(work, *arguments)

    def start(self, stage: str, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have a stage do something for which nobody waits; if it fails, all is given up."""

        def look(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None and not self._stop.is_set():
                self._failure = error
                self._stop.set()

        future = self.submit(stage, work, *arguments)
        future.add_done_callback(look)
        return future

    def until(self, true: Callable[[], bool]) -> None:
        """Call ``true``, which waits `LOOK` at most, again and again until it is so.

        Raises:
            StoppedError: if all is given up meanwhile.
        """
        while not true():
            if self._stop.is_set():
                raise StoppedError

    def acquire(self, semaphore: threading.Semaphore) -> None:
        """Wait for a semaphore, as `until` does."""
        self.until(lambda: semaphore.acquire(timeout=LOOK))

    def put(self, into: queue.Queue[Item], item: Item) -> None:
        """Wait for a place in a queue, as `until` does."""

        def put() -> bool:
            try:
                into.put(item, timeout=LOOK)
                return True
            except queue.Full:
                return False

        self.until(put)

    def get(self, out_of: queue.Queue[Item]) -> Item:
        """Wait for the next in a queue.

        Raises:
            StoppedError: if all is given up meanwhile, whatever is in the queue.
        """
        while not self._stop.is_set():
            try:
                return out_of.get(timeout=LOOK)
            except queue.Empty:
                pass
        raise StoppedError

    def finish(self, stage: str) -> None:
        """Wait for all that a stage was given."""
        self._pools[stage].shutdown()

    def close(self) -> None:
        """End all threads. What was begun ends first."""
        self._stop.set()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def raise_failure(self) -> None:
        """Raise what a thread failed of, if one did."""
        if self._failure is not None:
            raise self._failure


class ByteBudget:
    """Bytes that may be under way at a time; one thing that is larger than all of them goes alone.

    Args:
        limit: how many.
        threads: whose end also ends waiting for them.
    """

    def __init__(self, limit: int, threads: StageThreads) -> None:
        self.limit = limit
        self._threads = threads
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes more fit.

        Raises:
            StoppedError: if all is given up meanwhile.
        """

        def fits() -> bool:
            return not self._taken or self._taken + size <= self.limit

        with self._changed:
            self._threads.until(lambda: self._changed.wait_for(fits, LOOK))
            self._taken += size

    def give(self, size: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._taken -= size
            self._changed.notify()
