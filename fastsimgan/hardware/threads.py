"""Work ahead in a few threads, in order and with a bound. Image codecs release Python's lock, so threads suffice."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 256  # items decoded but not yet taken: hides a slow disk, and bounds the memory


def thread_count() -> int:
    """Threads for decoding and encoding: one a core that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD) -> Iterator[Result]:
    """``map(work, items)`` in threads: results in order, at most ``ahead`` waiting. An error is raised in its place."""
    pool = ThreadPoolExecutor(thread_count())
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
