"""Files and folders that are whole or not there, whenever the process dies.

What is written is made under another name on the same disk, flushed, and renamed. `writing` is the one way in which
this package does so; `write_atomically` and `staged` are `writing` for bytes, and for an output of the user's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

_WRITING, _REMOVING = ".writing-", ".removing-"


@contextmanager
def writing(final: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a path beside ``final`` for the caller to make, a file or a folder; at the end it is flushed and renamed.

    If the caller fails, or the disk does, what has been made is removed. A process that is killed leaves it, under a
    name that `remove_unfinished` knows and that the next call for the same ``final`` takes over.

    Args:
        final: what the caller makes is there afterwards. A file there is replaced; a folder must not be there.
        temporary: the path to yield. By itself it follows from ``final``'s name, so that one process at a time may
            write ``final``.
    """
    temporary = temporary or final.with_name(_WRITING + final.name)
    _delete(temporary)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
    except BaseException:
        with suppress(OSError):
            _delete(temporary)
        raise
    flush_directory(final.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Have ``data`` in the file ``path``, or what was there before."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """As `writing`, for an output that the user names: missing parent folders are made, and nothing is overwritten.

    The path that it yields has ``output``'s name, in a hidden folder of its own, so that any number of processes may
    try. Whatever goes wrong in between, nothing is left at ``output`` nor beside it, nor of the folders that were made.

    Raises:
        InputError: ``output`` exists, before or after, or the system refuses to write (disk full, permission).
    """
    refuse_existing(output)
    made = [parent for parent in output.absolute().parents if not parent.exists()]  # innermost first
    work: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_WRITING, dir=output.parent))
        with writing(output, work / output.name) as temporary:
            yield temporary
            refuse_existing(output)
        made = []
    except OSError as error:
        where = f" ({printable(error.filename)})" if isinstance(error.filename, str) else ""
        raise InputError(f"{printable(output)}: cannot be written: {error.strerror or error}{where}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # someone else may have put something there meanwhile
                parent.rmdir()


def refuse_existing(output: Path) -> None:
    """Raise InputError if anything, even a broken link, is at ``output``."""
    if os.path.lexists(output):
        raise InputError(f"{printable(output)}: output must not exist yet; nothing is ever overwritten")


def remove_atomically(folder: Path) -> None:
    """Remove a folder that is never seen in part: it is renamed first."""
    leaving = folder.with_name(_REMOVING + folder.name)
    _delete(leaving)
    folder.rename(leaving)
    _delete(leaving)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed in ``folder``."""
    for path in folder.glob(".*"):
        if path.name.startswith((_WRITING, _REMOVING)):
            _delete(path)


def flush(path: Path) -> None:
    """Have a file, or a folder with all that is in it, reach the disk."""
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            flush(each)
        flush_directory(path)
    elif path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Have the names in a directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
