"""Labels of single images, from JSON objects (a sidecar, a line of ``metadata.jsonl``), as one array for each key."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LONGEST = 256  # characters of a string; in an array every one takes as much room as the longest
EXACT = 1 << 53  # the largest whole number up to which float64 holds them all
TAKEN = ("images", "name", "file_name", "files")  # names that a packed file has its own use for


@dataclass
class _Column:
    kind: str  # "b", "f" (integers too) or "U"
    shape: tuple[int, ...]
    whole: bool = True
    values: bytearray = field(default_factory=bytearray)  # float64, or bool
    texts: list[Any] = field(default_factory=list)


class LabelTable:
    """Takes one row an image, in order; a key becomes an array if every row has it, always of one kind and shape.

    Kinds are numbers (float64, or int64 if all are whole), booleans, strings of at most 256 characters, and lists of
    these, also nested. A key must be an identifier. Keys that are not so are left out: they stay in their files.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self._rows = 0

    def add(self, row: dict[str, Any]) -> None:
        """The labels of the next image; an empty row leaves no key."""
        found = {key: plain for key in (row if self._rows == 0 else self._columns) if (plain := _plain(key, row))}
        if self._rows == 0:
            self._columns = {key: _Column(kind, array.shape) for key, (kind, array) in found.items()}
        for key in list(self._columns):
            column = self._columns[key]
            if key not in found or (found[key][0], found[key][1].shape) != (column.kind, column.shape):
                del self._columns[key]
                continue
            array = found[key][1]
            if column.kind == "U":
                column.texts.append(array.tolist())
            else:
                column.whole &= array.dtype.kind == "i"
                column.values += array.astype(bool if column.kind == "b" else np.float64).tobytes()
        self._rows += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Each remaining key's array, ``[rows, ...]``."""
        found = {}
        for key, column in self._columns.items():
            if column.kind == "U":
                found[key] = np.array(column.texts)
                continue
            flat = np.frombuffer(bytes(column.values), bool if column.kind == "b" else np.float64)
            array = flat.reshape(self._rows, *column.shape)
            found[key] = array.astype(np.int64) if column.kind == "f" and column.whole else array
        return found


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the text is something else."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError
        return {}
    return row if isinstance(row, dict) else {}


def _plain(key: str, row: dict[str, Any]) -> tuple[str, np.ndarray] | None:
    """Kind and values of a key that can be an array."""
    value = row.get(key)
    if not key.isidentifier() or key in TAKEN or value is None:
        return None
    kinds = {type(leaf) for leaf in _leaves(value)}
    if kinds not in ({bool}, {str}, {int}, {float}, {int, float}):
        return None
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # lists of different lengths; a number too large
        return None
    if array.dtype.kind not in "biufU" or 0 in array.shape:
        return None
    if array.dtype.kind in "iu" and not (np.abs(array.astype(np.float64)) <= EXACT).all():
        return None
    if array.dtype.kind == "U" and any(len(text) > LONGEST or "\0" in text for text in _leaves(value)):
        return None
    kind = {"i": "f", "u": "f"}.get(array.dtype.kind, array.dtype.kind)
    return kind, array


def _leaves(value: Any) -> Iterable[Any]:
    if not isinstance(value, list):
        return (value,)
    return (leaf for part in value for leaf in _leaves(part))
