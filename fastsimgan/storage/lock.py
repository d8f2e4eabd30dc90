"""A folder that one process works in: a lock (flock) on the folder itself, freed by the system when its owner dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


class FolderLock:
    """Held from `take` to `release`, or the end of the process. The folder may be renamed meanwhile."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path, log: Callable[[str], None]) -> None:
        """Lock ``folder``.

        Raises:
            InputError: another process has it; it is named where it is one of this machine.
        """
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(os.fstat(descriptor).st_ino)
            os.close(descriptor)
            raise InputError(f"{printable(folder)}: must be left to {owner}, which trains in it") from None
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            log(f"warning: {printable(folder)} cannot be locked ({error.strerror}): let no other process resume it")
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; harmless where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _owner(inode: int) -> str:
    """Who holds a lock on a file, as Linux lists it; it does not know processes of other machines."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode) and words[4] != "0":
            return f"process {words[4]}"
    return "another process"
