"""Inputs are regular files: opening a pipe waits for a writer, for ever."""

from __future__ import annotations

import stat
from pathlib import Path

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


def require_regular(path: Path) -> None:
    """Raise InputError unless ``path`` is a regular file, or a link to one. Opens nothing, so never waits."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{printable(path)}: must be a regular file, got a folder, pipe, socket or device")


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file. Raises InputError as `require_regular` does, and if it cannot be read."""
    require_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from None
