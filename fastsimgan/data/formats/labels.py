"""What the files beside a set of images say of each of them, as one array for each key.

Labels of single images are looked for in JSON sidecars (``0001.json`` beside ``0001.png``), in tables that name the
images (``metadata.jsonl``, any other ``.jsonl`` or ``.csv`` with a column ``file_name``, ``image`` or the like), and,
for want of a ``label`` there, in the names of the folders: one a class.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fastsimgan.data.formats.label_table import LabelTable, parse
from fastsimgan.data.formats.listing import is_junk

NAMES = ("file_name", "filename", "file", "image", "image_name", "image_path", "path", "img")
"""Keys under which tables name their images, by preference."""


def is_label_file(name: str) -> bool:
    """Whether a file may say something of single images."""
    return name.lower().endswith((".json", ".jsonl", ".csv")) and not is_junk(name)


class Labels:
    """Takes the files beside images, then gives arrays.

    Sidecars must come in the images' order; what else there is, in any.

    Args:
        names: of the images, ``/`` between parts, in order.
        inside: the images were members of shards, and the first part of their names is their shard's. What lies beside
            the shards knows them without it.
    """

    def __init__(self, names: list[str], inside: bool = False) -> None:
        self._names = names
        self._inside = inside
        self._table = LabelTable()
        self._sidecars = 0  # of as many images, from the first on
        self._rows: dict[str, bytes] = {}

    def take(self, name: str, data: bytes) -> None:
        """Look at one file."""
        folder, slash, base = name.rpartition("/")
        if base.lower().endswith((".jsonl", ".csv")):
            rows = rows_by_name(data) if base.lower().endswith(".jsonl") else _csv_rows(data)
            self._rows |= {folder + slash + key: row for key, row in rows.items()}
        elif self._sidecars < len(self._names):
            image = self._names[self._sidecars]
            if name == f"{image[: image.rindex('.')]}.json":
                self._table.add(parse(data))
                self._sidecars += 1

    def of(self, name: str) -> Iterator[dict[str, Any]]:
        """What tables and folders say of one image, each voice on its own."""
        for key in (name, *([name.partition("/")[2]] if self._inside else [])):
            if (row := self._row(key)) is not None:
                yield parse(row)
        if (label := self._classes.get(name)) is not None:
            yield {"label": label}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays; none of sidecars, or none of tables, where one image has none."""
        found: dict[str, np.ndarray] = {}
        keys = self._names
        if self._inside and not all(self._row(name) is not None for name in keys):
            members = [name.partition("/")[2] for name in keys]
            keys = members if len(set(members)) == len(members) else keys
        if all(self._row(name) is not None for name in keys):
            table = LabelTable()
            for name in keys:
                row = parse(self._row(name) or b"")
                table.add({key: value for key, value in row.items() if not (key in NAMES and isinstance(value, str))})
            found |= table.arrays()
        if self._sidecars == len(self._names):
            found |= self._table.arrays()
        if "label" not in found and self._classes:
            found["label"] = np.array([self._classes[name] for name in self._names])
        return found

    def _row(self, name: str) -> bytes | None:
        return self._rows.get(name, self._rows.get(name.rpartition(".")[0]))

    @cached_property
    def _classes(self) -> dict[str, str]:
        """Each image's folder, by the image's name, where there are several and all images are in them; else nothing.

        Numbered folders (``scene1``, ``scene2``) are parts of a set, not classes; ``0`` to ``9`` may be digits.
        """
        names = [name.partition("/")[2] for name in self._names] if self._inside else self._names
        parts = [name.split("/") for name in names]
        depth = 0
        while all(len(each) > depth + 1 for each in parts) and len({each[depth] for each in parts}) == 1:
            depth += 1
        if not all(len(each) > depth + 1 for each in parts):
            return {}
        if len({re.sub(r"\d+", "#", each[depth]) for each in parts} - {"#"}) == 1:
            return {}
        return dict(zip(self._names, (each[depth] for each in parts), strict=True))


def rows_by_name(text: bytes) -> dict[str, bytes]:
    """The lines of a ``.jsonl`` by the image that each names; none if it is something else."""
    found = {}
    for line in text.splitlines():
        row = parse(line)
        key = next((row[key] for key in NAMES if isinstance(row.get(key), str)), None)
        if key is not None:
            found[_name(key)] = line
    return found


def _csv_rows(data: bytes) -> dict[str, bytes]:
    """The lines of a table as JSON, by the image that each names; numbers where a whole column holds numbers."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (ValueError, csv.Error):
        return {}
    columns = [key for key in (rows[0] if rows else {}) if key is not None]
    named = next((key for name in NAMES for key in columns if key.strip().lower() == name), None)
    if named is None:
        return {}
    kinds = {key: _kind([row.get(key) for row in rows]) for key in columns if key != named}
    found = {}
    for row in rows:
        if isinstance(row.get(named), str):
            values = {key.strip(): kind(row[key]) for key, kind in kinds.items() if row.get(key) is not None}
            found[_name(row[named])] = json.dumps({"file_name": row[named], **values}).encode()
    return found


def _kind(values: list[Any]) -> Any:
    for kind in (int, float):
        try:
            for value in values:
                kind(value)
        except (TypeError, ValueError):
            continue
        return kind
    return str


def _name(path: str) -> str:
    """``./a//b.png`` -> ``a/b.png``."""
    return str(PurePosixPath(path.replace("\\", "/")))
