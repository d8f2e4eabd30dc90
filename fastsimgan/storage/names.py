"""Names of files: printed on one line, and put in a natural order."""

from __future__ import annotations

import os
import re
from pathlib import Path


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
