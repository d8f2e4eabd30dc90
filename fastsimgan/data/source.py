"""One way in: find out what a path holds and open it as images, with whatever labels travel beside them."""

from __future__ import annotations

from pathlib import Path

from fastsimgan.data.arrays import ArrayImages
from fastsimgan.data.files import printable
from fastsimgan.data.folder import FolderImages
from fastsimgan.errors import InputError

#: Both kinds offer ``len()``, ``shape`` (channels, height, width), ``dtype``, ``bit_depth``, ``describe()``, ``load()``
#: and ``labels()``. Where a folder's images differ, ``shape`` or ``dtype`` is None and ``load`` raises InputError.
ImageSource = ArrayImages | FolderImages


def open_images(path: str | Path) -> ImageSource:
    """Open a folder of images, an ``.npz`` or an ``.npy``, told apart by looking. No pixel is read yet.

    Raises InputError if there is nothing at ``path``, if it is none of these, or if it breaks their rules.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{printable(path)}: must exist (a folder of images, an .npz or an .npy)")
    return FolderImages(path) if path.is_dir() else ArrayImages(path)
