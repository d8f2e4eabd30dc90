"""Names of files: printed on one line, put in a natural order, and written so that a half-written one is never seen."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsimgan.errors import InputError


def printable(name: str | os.PathLike[str]) -> str:
    """``name`` on one line: newlines, control characters and bytes that are not UTF-8 are shown as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in os.fspath(name)
    )


def natural_key(path: Path) -> tuple[tuple[tuple[bytes | int, ...], ...], bytes]:
    """A sorting key, the same on every machine, under which ``2.png`` comes before ``10.png``. Works on any bytes."""
    raw = os.fsencode(path)
    parts = tuple(
        tuple(int(piece) if piece.isdigit() else piece for piece in re.split(rb"(\d+)", part))
        for part in raw.split(b"/")
    )
    return parts, raw  # the raw name tells "1.png" from "01.png"


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a path beside ``output`` for the caller to create, file or folder; rename it to ``output`` at the end.

    Whatever goes wrong in between, nothing is left at ``output`` nor beside it (only an outright kill leaves a hidden
    ``.fastsimgan-*`` folder). Missing parent folders are made, and removed again on failure.
    Raises InputError if ``output`` exists, before or after, and if the system refuses to write (disk full, permission).
    """
    refuse_existing(output)
    made = [parent for parent in output.absolute().parents if not parent.exists()]  # innermost first
    work: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fastsimgan-", dir=output.parent))
        yield work / output.name
        refuse_existing(output)
        (work / output.name).rename(output)
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


def hash_file(path: Path, complaint: str = "cannot be read") -> str:
    """SHA-256 of a file. Raises InputError with ``complaint`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{printable(path)}: {complaint}: {error.strerror}") from error
