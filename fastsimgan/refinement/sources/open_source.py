"""What a path holds, as a source."""

from __future__ import annotations

from pathlib import Path

from fastsimgan.data.formats.open_images import holds_shards, open_arrays
from fastsimgan.data.reading import Links
from fastsimgan.errors import InputError
from fastsimgan.refinement.sources.array_file import ArrayFile
from fastsimgan.refinement.sources.arrays import ArraysSource
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.folder import FolderSource
from fastsimgan.refinement.sources.shards import ShardsSource
from fastsimgan.storage.names import printable


def open_source(
    path: Path, *, batch_size: int, images: str | None = None, key: str | None = None, links: Links = "files"
) -> Source:
    """Find out what ``path`` holds. Reads names and headers only.

    Args:
        path: a folder, shards (`find_shards`) or a packed file.
        batch_size: images refined at a time, at least 1; a work unit of packed images is a multiple.
        images: a glob that tells which files are images; None: all that have an image's suffix.
        key: name of the array of images.
        links: which are followed (`list_units`).

    Raises:
        InputError: if there is nothing, if it is nothing that can be refined, or if its headers break a rule.
    """
    if holds_shards(path):
        return ShardsSource(path, images)
    if path.is_dir():
        return FolderSource(path, images, links, key)
    if not path.exists():
        raise InputError(f"{printable(path)}: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)")
    if images is not None:
        raise InputError(f"images must be given for folders and shards only, got {images!r} for {printable(path)}")
    return ArraysSource(ArrayFile(open_arrays(path, key), batch_size))
