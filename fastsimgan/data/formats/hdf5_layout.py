"""What lies where in an open HDF5 file: its images, its other datasets, and what is neither. No link is followed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.formats.array_file import FILES, choose_key
from fastsimgan.errors import InputError
from fastsimgan.storage.names import natural_key, printable


def refuse_data_elsewhere(file: Any, path: Path) -> None:
    """Raise InputError if a dataset of an open ``file``, whatever it is for, takes its values from another file.

    A file that someone sends could have any file that the reader may read come out in the output.
    """
    import h5py

    def check(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            raise InputError(
                f"{printable(path)}: {printable(name)} must lie in the file itself, got external or virtual data"
            )

    file.visititems(check)  # follows no link to another file


def choose_images(file: Any, path: Path, key: str | None) -> str:
    """The name of the dataset or group of images in an open ``file``. Raises InputError as `choose_key` does."""
    if key is not None:
        if file.get(key) is None:
            choose_key(path, dict.fromkeys(file, ((), np.dtype("u1"))), key)
        parts = key.strip("/").split("/")
        steps = ["/".join(parts[: end + 1]) for end in range(len(parts))]  # any step may lead into another file
        if any(file.get(step, getlink=True).__class__.__name__ != "HardLink" for step in steps):
            raise InputError(f"{printable(path)}: {printable(key)} must lie in the file itself, got a link")
        return key.strip("/")
    held: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name in file:
        item = file.get(name) if file.get(name, getlink=True).__class__.__name__ == "HardLink" else None
        if item is None:
            held[name] = (), np.dtype("u1")  # a link, never followed
            continue
        members = () if hasattr(item, "shape") else tuple(item)
        if not members:
            held[name] = (item.shape or (), item.dtype) if hasattr(item, "shape") else ((), np.dtype("u1"))
        elif name != FILES.removesuffix("/") and (kind := kind_of(item, members[0], path)) is not None:
            held[name] = (len(members), *kind[0]), kind[1]
    if "images" in held and held["images"][0] == ():
        del held["images"]
    return choose_key(path, held, None)


def kind_of(group: Any, name: str, path: Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and type of a dataset in the file itself; None for anything else."""
    item = group.get(name) if group.get(name, getlink=True).__class__.__name__ == "HardLink" else None
    if item is None or getattr(item, "shape", None) is None:
        return None
    if item.external or item.is_virtual:
        raise InputError(f"{printable(path)}: images must lie in the file itself, got external or virtual data")
    return item.shape, item.dtype


def layout_of(file: Any, path: Path, key: str) -> tuple[list[str], tuple[int, ...], np.dtype]:
    """Of the images ``key`` in an open ``file``: the names of a group's datasets, one an image (none where one dataset
    holds all), and the shape and type of each of these (or of that).

    Raises InputError if a group holds anything else, or datasets that differ in size or kind.
    """
    item = file[key]
    members: list[str] = []
    if not hasattr(item, "shape"):
        members = sorted(item, key=lambda name: natural_key(Path(name)))
        if any(kind_of(item, name, path) is None for name in members) or not members:
            raise InputError(f"{printable(path)}: {printable(key)} must be a dataset, got a group")
    kinds = [kind_of(item, name, path) for name in members] or [kind_of(file, key, path)]
    for name, kind in zip(members, kinds, strict=False):
        if kind != kinds[0]:
            raise InputError(
                f"{printable(path)}: images must be of one size and kind, {printable(key)}/"
                f"{printable(members[0])} is {kinds[0]} and {printable(name)} is {kind}"
            )
    assert kinds[0] is not None
    return members, *kinds[0]


def datasets(file: Any, key: str, files: bool = False) -> list[tuple[str, Any]]:
    """Path and dataset of all but the images (``key``): those that are in ``files`` and are bytes, or all others."""
    import h5py

    found = []

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name != key and not name.startswith(f"{key}/"):
            is_file = name.startswith(FILES) and item.dtype == np.uint8 and item.shape is not None and item.ndim == 1
            if is_file == files:
                found.append((name, item))

    file.visititems(add)  # follows no link to another file
    return found


def refuse_all_but(group: Any, path: str, held: Collection[str], refuse: Callable[[str], None]) -> None:
    """Call ``refuse`` with each thing in an open ``group`` that is no dataset of ``held``, names as paths."""
    import h5py

    for name in group:
        full = path + name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            refuse(f"the link {full}")
        item = group[name]
        for attribute in item.attrs:
            refuse(f"the attribute {attribute} of {full}")
        if isinstance(item, h5py.Group):
            refuse_all_but(item, f"{full}/", held, refuse)
        elif full not in held:
            refuse(f"{full} of {item.dtype}{list(item.shape or ())}")


def plain(item: Any) -> np.ndarray | None:
    """A dataset's values as an array that an ``.npz`` can hold; None for references, records and ragged lists."""
    import h5py

    if h5py.check_string_dtype(item.dtype) is not None and item.dtype.hasobject:
        return np.array(item.asstr()[()], dtype=np.str_)
    return None if item.dtype.hasobject or item.dtype.kind not in "biufcS" else np.asarray(item[()])


def copy_but_images(old: Any, new: Any, key: str, whole: bool) -> Any:
    """Copy all of an open file ``old`` into ``new`` as it is stored, but for the images; returns where these go.

    ``whole``: the images are a group, or lie in one, and are copied too, to be overwritten; else ``new`` gets an
    empty dataset like them.
    """
    import h5py

    for name, value in old.attrs.items():
        new.attrs[name] = value
    for name in old:
        link = old.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            new[name] = link  # never followed
        elif name != key or whole:
            old.copy(name, new, name)
    if whole:
        return new[key]
    source = old[key]
    kept = {name: getattr(source, name) for name in ("chunks", "compression", "compression_opts", "shuffle")}
    target = new.create_dataset(key, source.shape, source.dtype, **kept)
    for name, value in source.attrs.items():
        target.attrs[name] = value
    return target
