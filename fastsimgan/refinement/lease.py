"""Who is at which work unit: locks (flock), which the system frees when their owner dies, so that none goes stale."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.storage.names import printable


class Lease:
    """The right to do one work unit, until `release` or the process's end.

    Leases only save work; correctness does not lean on them.
    """

    def __init__(self, work_unit: int, descriptor: int) -> None:
        self.work_unit = work_unit
        self._descriptor: int | None = descriptor

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the work unit back; harmless a second time."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def take_lease(path: Path, work_unit: int, output: Path) -> Lease | None:
    """Lock ``path``, made if it is not there; None if another worker has it.

    Raises:
        UnavailableError: naming ``output``, on a file system without locks.
        OSError: if ``path`` cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise UnavailableError(
            f"{printable(output)}: the file system must offer locks (flock), got {error.strerror}"
        ) from error
    return Lease(work_unit, descriptor)


@contextmanager
def run_lock(state: Path) -> Iterator[Callable[[], bool]]:
    """Hold the run's own lock, in ``state``, for what one process alone may do.

    Yields:
        A function that says whether this lock is still the one of that name: who publishes takes the folder away.

    Raises:
        InputError: if the lock cannot be made.
    """
    path = state / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"{printable(state)}: cannot be written: {error.strerror}") from error

    def is_still_there() -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(path))
        except OSError:
            return False

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield is_still_there
    finally:
        os.close(descriptor)
