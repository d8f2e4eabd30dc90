"""Names of files: in a natural order, and on one line."""

from __future__ import annotations

import os
from pathlib import Path

from fastsimgan.storage.names import natural_key, printable


def test_natural_order() -> None:
    names = ["a/10.png", "a/9.png", "a/09.png", "a10/1.png", "a2/1.png", "10.png", "2.png", "b.png"]
    ordered = [str(path) for path in sorted(map(Path, names), key=natural_key)]
    assert ordered == ["2.png", "10.png", "a/09.png", "a/9.png", "a/10.png", "a2/1.png", "a10/1.png", "b.png"]


def test_printable_is_one_line() -> None:
    assert printable("é\n\x1b[31m" + os.fsdecode(b"\xff")) == "é\\n\\x1b[31m\\udcff"
