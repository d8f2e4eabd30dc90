"""SIGTERM, SIGHUP and Ctrl-C as a request that training answers between two steps, or before one ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 2.0
"""Seconds that a step may go on after SIGTERM, where `StopRequest.ending_within` has been told what to do then."""


class StopRequest:
    """While entered, SIGTERM, SIGHUP (unless it is ignored, as under nohup) and the first SIGINT only set ``signal``.

    A second SIGINT interrupts at once.

    Elsewhere than in the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int = 0  #: the one that came, or 0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._pipe_before = -1
        self._over = threading.Event()
        self._lock = threading.Lock()  # held while `_end` is changed or called
        self._end: Callable[[], str] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Python runs a handler only after the call into C++ that the main thread is in, which may be the backward
            # pass of a whole batch. What it writes to this pipe another thread reads at once.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._pipe_before = signal.set_wakeup_fd(self._pipe[1])
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
            wanted = {signal.SIGTERM, signal.SIGINT} | ({signal.SIGHUP} - _ignored())
            self._before = {number: signal.signal(number, self._take) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        if self._pipe:
            signal.set_wakeup_fd(self._pipe_before)
            os.close(self._pipe[1])

    @contextmanager
    def ending_within(self, end: Callable[[], str] | None) -> Iterator[None]:
        """Where SIGTERM ends the process if it has not been answered `PATIENCE` seconds later.

        Args:
            end: called then, in another thread: saves what is to be saved and says where the run stands. None: SIGTERM
                is waited for as long as it takes.
        """
        with self._lock:
            self._end = end
        try:
            yield
        finally:
            with self._lock:  # for good, if the other thread has begun
                self._end = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def _watch(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] in self._before and number[0] != signal.SIGINT:
                wait = PATIENCE
                while not self._over.wait(wait):
                    with self._lock:
                        if self._end:
                            ended = self._end()
                            with suppress(BrokenPipeError):  # nobody reads it
                                print(f"\nerror: stopped by signal {number[0]}, {ended}", file=sys.stderr, flush=True)
                                print(end="", flush=True)  # what was said before: nobody else will
                            os._exit(128 + number[0])
                    wait = 0.1  # between two steps
        os.close(pipe)


def _ignored() -> set[int]:
    """Signals that whoever started this process wants ignored."""
    return {number for number in (signal.SIGHUP,) if signal.getsignal(number) == signal.SIG_IGN}
