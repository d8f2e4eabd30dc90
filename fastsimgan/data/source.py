"""One way in: find out what a path holds and open it as images, with whatever labels travel beside them."""

from __future__ import annotations

from pathlib import Path

from fastsimgan.data.arrays import ArrayImages
from fastsimgan.data.files import printable
from fastsimgan.data.folder import FolderImages
from fastsimgan.data.hdf5 import HDF5Images, is_hdf5
from fastsimgan.data.images import FORMATS
from fastsimgan.data.shards import ShardImages
from fastsimgan.errors import InputError

#: All offer ``path``, ``describe()``, ``load()`` and ``labels()``; all but shards, which would have to be read first,
#: ``len()``, ``shape`` (channels, height, width), ``dtype`` and ``bit_depth``. Where a folder's images differ,
#: ``shape`` or ``dtype`` is None and ``load`` raises InputError.
ImageSource = ArrayImages | HDF5Images | FolderImages | ShardImages


def open_images(path: str | Path) -> ImageSource:
    """Open a folder of images, ``.tar`` shards, an ``.npz``, ``.npy`` or HDF5 file, told apart by looking.

    No pixel is read yet. Raises InputError if there is nothing at ``path``, if it is none of these, or if it breaks
    their rules, and UnavailableError for HDF5 without h5py.
    """
    path = Path(path)
    if holds_shards(path):
        return ShardImages(path)
    if not path.exists():
        raise InputError(f"{printable(path)}: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)")
    if path.is_dir():
        return FolderImages(path)
    return HDF5Images(path) if is_hdf5(path) else ArrayImages(path)


def holds_shards(path: Path) -> bool:
    """Whether ``path`` means shards: a ``.tar``, a glob over several, or a folder with some and no images."""
    if path.is_dir():
        suffixes = {entry.suffix.lower() for entry in path.iterdir()}
        return ".tar" in suffixes and suffixes.isdisjoint(FORMATS)
    return path.suffix == ".tar"
