"""Our own records, JSON objects on the disk, as frozen dataclasses. This module alone says how one becomes the other.

A field is called on the disk as ``named`` has it, or as in Python. One that is ``optional`` is left out where it has
its default. A ``flat`` one is a dataclass whose fields stand among its owner's.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

FORMAT = "fastsimgan.run/1"

Record = TypeVar("Record")


def named(key: str, *, optional: bool = False) -> dict[str, Any]:
    """Metadata of a field that is called ``key`` on the disk."""
    return {"key": key, "optional": optional}


OPTIONAL = {"optional": True}
"""Metadata of a field that is left out where it has its default."""


def flat(kind: type) -> dict[str, Any]:
    """Metadata of a field that is a dataclass of ``kind``, whose fields stand among its owner's."""
    return {"flat": kind}


_Plan = list[tuple[str, str, bool, Any, type[Any] | None]]
_PLANS: dict[type[Any], _Plan] = {}  # a manifest has a line an image


def _plan(kind: type[Any]) -> _Plan:
    """Of each field of a dataclass: attribute, key, whether it is optional, its default, and what it is flat of."""
    if kind in _PLANS:
        return _PLANS[kind]

    def default(each: Field[Any]) -> Any:
        return each.default_factory() if each.default_factory is not MISSING else each.default

    _PLANS[kind] = [
        (
            each.name,
            each.metadata.get("key", each.name),
            each.metadata.get("optional", False),
            default(each),
            each.metadata.get("flat"),
        )
        for each in fields(kind)
    ]
    return _PLANS[kind]


def to_json(record: Any) -> dict[str, Any]:
    """A record as the object that it is on the disk, keys in the fields' order."""
    found: dict[str, Any] = {}
    for name, key, optional, default, inner in _plan(type(record)):
        value = getattr(record, name)
        if inner is not None:
            found |= to_json(value)
        elif not (optional and value == default):
            found[key] = value
    return found


def from_json(kind: type[Record], found: Any) -> Record:
    """The reverse of `to_json`. What else ``found`` holds is not looked at.

    Raises:
        ValueError: if ``found`` is no object or lacks what must be there.
    """
    if not isinstance(found, dict):
        raise ValueError(f"must be an object, got {type(found).__name__}")
    values: dict[str, Any] = {}
    missing = []
    for name, key, optional, _, inner in _plan(kind):
        if inner is not None:
            values[name] = from_json(inner, found)
        elif key in found:
            values[name] = found[key]
        elif not optional:
            missing.append(key)
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")
    return kind(**values)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: if it cannot be read or is something else.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"must be an object, got {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)}: cannot be read: {printable(str(error))}") from error


def read_record(kind: type[Record], path: Path) -> Record:
    """A record from a file of its own.

    Raises:
        InputError: if it cannot be read or is something else.
    """
    found = read_json(path)
    try:
        return from_json(kind, found)
    except ValueError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error}") from error
