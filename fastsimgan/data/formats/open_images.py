"""One way in: find out what a path holds and open it as images, with whatever labels travel beside them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fastsimgan.data.formats.hdf5_file import HDF5Images, is_hdf5
from fastsimgan.data.formats.image_folder import FolderImages
from fastsimgan.data.formats.listing import is_image, list_units
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.webdataset import ShardImages, find_shards, is_shard, read_samples
from fastsimgan.data.pixel_values import UNIT, Span
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable
from fastsimgan.storage.regular_file import require_regular

#: All offer ``path``, ``describe()``, ``load()``, ``load_set()``, ``left_out`` and ``labels()``; all but shards, which
#: would have to be read first, ``len()``, ``shape`` (channels, height, width), ``dtype`` and ``bit_depth``. Where a
#: folder's images differ, ``shape`` or ``dtype`` is None and ``load`` raises InputError.
ImageSource = ArrayImages | HDF5Images | FolderImages | ShardImages


def open_images(path: str | Path, reading: Reading | None = None) -> ImageSource:
    """Open a folder of images, ``.tar`` shards, an ``.npz``, ``.npy`` or HDF5 file, told apart by looking.

    A folder followed by a glob (``renders/rgb/*.png``) is that folder, in which the glob tells which files are images.
    Only names and headers are read yet, and a few images.

    Raises InputError if there is nothing at ``path``, if it is none of these, or if it breaks their rules, and
    UnavailableError for HDF5 without h5py.
    """
    path, reading = Path(path), reading or Reading()
    if holds_shards(path):
        return ShardImages(path, reading)
    if not path.exists():
        folder, images = _glob(path)
        if images and folder.is_dir() and reading.images is None:
            return FolderImages(folder, replace(reading, images=images))
        raise InputError(f"{printable(path)}: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)")
    if path.is_dir():
        return FolderImages(path, reading)
    return open_arrays(path, reading.key, reading.span)


def open_arrays(path: Path, key: str | None = None, span: Span = UNIT) -> ArrayImages | HDF5Images:
    """A packed file, of whichever kind it is. Raises InputError if it breaks a rule."""
    require_regular(path)
    return HDF5Images(path, key, span=span) if is_hdf5(path) else ArrayImages(path, key, span)


def holds_shards(path: Path) -> bool:
    """Whether ``path`` means shards: a ``.tar``, a pattern over several, or a folder with some and no images."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        return any(map(is_shard, names)) and not any(is_image(name, None) for name in names)
    return is_shard(path.name) or path.name.endswith(("}", "*")) and ".tar" in path.name


def matches(path: Path, reading: Reading) -> bool:
    """Whether some name in a folder or a shard is that of an image by ``reading.images``."""
    if holds_shards(path):
        return any(sample.image is not None for at in find_shards(path) for sample in read_samples(at, reading.images))
    return path.is_dir() and any(unit.image for unit in list_units(path, reading.images, links=reading.links))


def refuse_inside(output: Path, flag: str, *inputs: Path | None) -> None:
    """Raise InputError if ``output`` lies inside one of ``inputs``, where it would be taken for a part of it."""
    new = Path(os.path.realpath(output))
    for path in inputs:
        if path is None:
            continue
        old = Path(os.path.realpath(path if path.exists() else _glob(path)[0]))
        if new.is_relative_to(old) and old.is_dir():
            raise InputError(
                f"{printable(output)}: {flag} must not be inside the input {printable(path)}: what is written there "
                "would be read as a part of it"
            )


def _glob(path: Path) -> tuple[Path, str]:
    """The folder before the first part with a wildcard, and the rest."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return Path(*parts[:first]), "/".join(parts[first:])
