"""Where an output is while it is made and afterwards, and how its files get their names.

While it is made, an output ``OUT`` is the folder ``OUT.partial``, with its records in ``OUT.partial/.fastsimgan``. Then
the records lie in ``OUT/.fastsimgan``, or beside an output that is a file, as ``OUT.fastsimgan``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsimgan.data.formats.listing import STATE
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


def partial_of(output: Path) -> Path:
    """Where an output is while it is made."""
    return output.with_name(output.name + ".partial")


def state_of(output: Path, is_file: bool) -> Path:
    """Where the records of a finished output are."""
    return output.with_name(output.name + STATE) if is_file else output / STATE


def is_published(output: Path, is_file: bool) -> bool:
    """Whether a run's finished output, records and all, is there."""
    return (state_of(output, is_file) / "done.json").exists() and os.path.lexists(output)


def rename(old: Path, new: Path) -> None:
    """``os.rename``, after making the folders that ``new`` needs."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        new.parent.mkdir(parents=True, exist_ok=True)
        os.rename(old, new)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn what the system raises on writing (disk full, permission) into an InputError that names the output."""
    try:
        yield
    except OSError as error:
        where = f" ({printable(error.filename)})" if isinstance(error.filename, str) else ""
        hint = "; what is committed stays: start again to go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = error.strerror or printable(str(error))
        raise InputError(f"{printable(output)}: cannot be written: {reason}{where}{hint}") from error
