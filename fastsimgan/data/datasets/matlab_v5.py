"""A MATLAB v5 file of plain values: numbers, text, cells and single structs. Anything else is refused.

Not SciPy's reader, which believes the file: on bytes that are damaged, or made for it, it crashes the process or
counts to 2^31. Here every size is held against the bytes that are there before anything is made of it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

MAX_BYTES = 1 << 30  # of a file, and of a variable when it is inflated; a day of MPIIGaze has some MB
_HEADER, _MAX_DEPTH, _MAX_SIZES = 128, 8, 4
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_CELL, _STRUCT, _CHAR = 1, 2, 4  # classes of arrays
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "u1", 2: "u1", 4: "u2", 16: "u1", 17: "u2", 18: "u4"}


def read_matlab(data: bytes) -> dict[str, Any]:
    """The variables of a file's bytes by name.

    Returns:
        A number array becomes an ndarray of its class (empty ones have shape [0]), ASCII text a str (a list of str
        where it has other than one row), a cell array a list in column order, a struct of one element a dict.

    Raises InputError, and nothing else, without a file's name, if the file is damaged or holds something else.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[_HEADER - 2 : _HEADER], "")
    if not order:
        raise InputError("must be a MATLAB v5 file, got something else")
    variables: dict[str, Any] = {}
    for kind, content in _elements(memoryview(data)[_HEADER:], order):
        inner = _elements(_inflated(content), order) if kind == _COMPRESSED else [(kind, content)]
        for inner_kind, array in inner:
            name, value = _array(inner_kind, array, order, 0)
            if name in variables:
                raise InputError(f"must have every variable once, got {printable(name)} twice")
            variables[name] = value
    return variables


def _array(kind: int, content: memoryview, order: str, depth: int) -> tuple[str, Any]:
    """Name and value. An array is its flags, sizes and name, then its values or the arrays inside it."""
    if kind != _MATRIX or depth > _MAX_DEPTH:
        raise InputError(f"must hold arrays, at most {_MAX_DEPTH} deep, got element type {kind} at depth {depth}")
    parts = list(_elements(content, order))
    if not parts:
        return "", np.empty(0)  # MATLAB's []
    if len(parts) < 3 or len(parts[0][1]) != 8 or len(parts[1][1]) not in range(8, 4 * _MAX_SIZES + 1, 4):
        raise InputError(f"an array must begin with its flags, 2 to {_MAX_SIZES} sizes and its name")
    class_ = struct.unpack_from(order + "I", parts[0][1])[0] & 0xFF
    sizes = struct.unpack(f"{order}{len(parts[1][1]) // 4}i", parts[1][1])
    name, values = bytes(parts[2][1]).decode("latin-1"), parts[3:]
    count = math.prod(sizes)
    if min(sizes) < 0:
        raise InputError(f"sizes must not be negative, got {sizes}")
    if class_ == _STRUCT:
        return name, _struct(count, values, order, depth)
    if class_ == _CELL:
        if count != len(values):
            raise InputError(f"a cell array of sizes {sizes} must hold {count} arrays, got {len(values)}")
        return name, [_array(*value, order, depth + 1)[1] for value in values]
    types = _TEXT if class_ == _CHAR else _STORED
    if class_ not in (_CHAR, *_CLASSES) or len(values) != 1 or values[0][0] not in types:
        raise InputError(f"must hold real numbers, text, cells and structs, got array class {class_}")
    stored = np.dtype(order + types[values[0][0]])
    if len(values[0][1]) != count * stored.itemsize:
        raise InputError(f"an array of sizes {sizes} must have {count * stored.itemsize} bytes of {stored}")
    flat = np.frombuffer(values[0][1], stored)
    if class_ == _CHAR:
        return name, _text(flat, sizes)
    if not np.can_cast(stored, _CLASSES[class_]):
        raise InputError(f"numbers of class {_CLASSES[class_]} must not be stored as {stored}")
    numbers = flat.astype(_CLASSES[class_])
    return name, numbers.reshape(sizes, order="F") if count else numbers


def _struct(count: int, values: list[tuple[int, memoryview]], order: str, depth: int) -> dict[str, Any]:
    """The longest length of a field's name, the names, then a value for each."""
    if count != 1 or len(values) < 2 or len(values[0][1]) != 4:
        raise InputError(f"a struct must have one element and the names of its fields, got {count} elements")
    length = struct.unpack(order + "i", values[0][1])[0]
    packed = bytes(values[1][1])
    if not 1 <= length <= 64 or len(packed) != length * (len(values) - 2):
        raise InputError(f"a struct of {len(values) - 2} fields must have their names, of 1 to 64 bytes each")
    names = [packed[at : at + length].split(b"\0")[0].decode("latin-1") for at in range(0, len(packed), length)]
    if len(set(names)) != len(names):
        raise InputError("a struct must have every field once, got one twice")
    return {key: _array(*value, order, depth + 1)[1] for key, value in zip(names, values[2:], strict=True)}


def _text(codes: np.ndarray, sizes: tuple[int, ...]) -> str | list[str]:
    if len(sizes) != 2 or (codes >= 128).any():
        raise InputError("text must be ASCII, in rows")
    letters = codes.astype(np.uint8).tobytes().decode("ascii")
    rows = [letters[row :: sizes[0]] for row in range(sizes[0])] if codes.size else [""]
    return rows[0] if len(rows) == 1 else rows


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that lie one after another in ``data``."""
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise InputError("must not end within an element")
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # the small form: its size in the upper half, up to 4 bytes in place of the size
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
            if size > 4:
                raise InputError(f"a small element must have at most 4 bytes, got {size}")
        else:
            at = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise InputError(f"an element must have {size} bytes, got {len(data) - start}")
        yield kind, data[start : start + size]


def _inflated(content: memoryview) -> memoryview:
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(content, MAX_BYTES)
    except zlib.error as error:
        raise InputError(f"a compressed element is damaged: {error}") from error
    if not unpacker.eof:
        raise InputError(f"a compressed element must be whole, and at most {MAX_BYTES} bytes")
    return memoryview(data)
