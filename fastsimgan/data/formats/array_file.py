"""What the files of arrays (``.npz``, ``.npy``, HDF5) have in common: which array holds the images, and its rules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fastsimgan.errors import InputError
from fastsimgan.storage.files import printable

IMAGES = "images"  # the array that holds the images
FILES = "files/"  # members of an .npz under this name are files that travel along, not arrays
MAX_CHANNELS = 4  # anything larger in last place is not channels: most likely the array is [N, C, H, W]
_SMALLEST = 8  # height and width from which on an unnamed array is taken for images


def combined_sha256(files: dict[str, str]) -> dict[str, str]:
    """One SHA-256 of many files' names and SHA-256, under the name ``files/``; nothing where there are none."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{files[name]} {name}\n".encode("utf-8", "surrogateescape"))
    return {FILES: digest.hexdigest()} if files else {}


def read_as(stored: np.dtype) -> np.dtype:
    """The type in which images are read: floats of any length are float32, integers stay what they are."""
    return np.dtype("float32") if stored.kind == "f" else stored.newbyteorder("=")


def choose_key(path: Path, held: Mapping[str, tuple[tuple[int, ...], np.dtype]], key: str | None) -> str:
    """The name of the array of images among those that a file holds, by name with shape and type.

    Raises InputError if the asked-for one is not there; if nothing was asked for, and there is neither ``images`` nor
    just one array that can be images.
    """
    if key is not None:
        if key not in held:
            raise InputError(
                f"{printable(path)}: must hold an array named {printable(key)} (--key), got {_names(held)}"
            )
        return key
    if IMAGES in held:
        return IMAGES
    found = [name for name, (shape, dtype) in held.items() if _may_be_images(shape, dtype)]
    if len(found) > 1 and len(usual := [name for name in found if name.lower() in _USUAL]) == 1:
        return usual[0]
    if len(found) != 1:
        raise InputError(
            f"{printable(path)}: must hold an array named images, got {_names(held)}"
            + (f"; --key NAME tells which: {_names(found)}" if found else "")
        )
    return found[0]


def _may_be_images(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    if dtype.hasobject or (dtype.kind, dtype.itemsize) not in _KINDS or len(shape) not in (3, 4):
        return False
    height, width = shape[:2] if len(shape) == 3 and shape[2] <= MAX_CHANNELS else shape[1:3]
    return min(height, width) >= _SMALLEST and (len(shape) == 3 or shape[3] <= MAX_CHANNELS)


_USUAL = ("image", "colors", "colours", "color", "colour", "rgb", "arr_0")
_KINDS = {("u", 1), ("u", 2), ("f", 2), ("f", 4), ("f", 8)}


def check_images(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape ``[N, H, W]`` or ``[N, H, W, C]`` of an array of images; of one picture, N is 1.

    Raises InputError if it cannot be images.
    """
    if dtype.hasobject or (dtype.kind, dtype.itemsize) not in _KINDS:
        got = "Python objects (pickled)" if dtype.hasobject else dtype.newbyteorder("=").name
        way = ": astype(np.uint8), where they are 0 to 255" if dtype.kind == "i" else ""
        raise InputError(
            f"{printable(path)}: {printable(name)} must be uint8, uint16 or float32 in [0, 1], got {got}{way}"
        )
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) >= _SMALLEST):
        shape = (1, *shape)
    if len(shape) not in (3, 4) or (len(shape) == 4 and not 1 <= shape[3] <= MAX_CHANNELS):
        way = ""
        if len(shape) == 4 and shape[1] in (1, 3, 4):
            way = "; it looks like [N, C, H, W], which np.moveaxis(images, 1, -1) turns round"
        raise InputError(
            f"{printable(path)}: {printable(name)} must be [N, H, W] or [N, H, W, C] with C from 1 to {MAX_CHANNELS}, "
            f"got shape {shape}{way}"
        )
    if 0 in shape:
        raise InputError(f"{printable(path)}: {printable(name)} must not be empty, got shape {shape}")
    return shape


def _names(headers: Iterable[str]) -> str:
    return ", ".join(printable(name.removesuffix(".npy")) for name in headers) or "nothing"
