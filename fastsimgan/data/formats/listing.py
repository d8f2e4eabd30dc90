"""What in a folder or a shard is an image, a sidecar, an unread picture or junk: one answer for every command.

The files of a folder come as units of work, one directory at a time, so that ten million files need no great memory.

A unit is an image with its sidecars (``a.png``, ``a.json``, ``a.mask.png``), or one other file alone. Units come in one
order on every machine: a directory's files by natural name, then its directories.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastsimgan.data.formats.stored_image import FORMATS
from fastsimgan.data.reading import Links
from fastsimgan.errors import InputError
from fastsimgan.storage.names import natural_key, printable

ALL = "*"  # of globs, the one that only says that there are no labels among the images
STATE = ".fastsimgan"  # our own records in an output folder: no part of its content

#: Suffixes of pictures that are not read. A sidecar may have one (``0001.exr`` beside ``0001.png``).
UNREAD = frozenset(
    ".apng .arw .avif .bmp .bpg .cr2 .cr3 .cur .dcm .dds .dib .dng .dpx .emf .eps .exr .fits .fit .gif .hdr .heic "
    ".heif .hif .ico .j2c .j2k .jbig .jfi .jfif .jif .jp2 .jpc .jpe .jpf .jpm .jpx .jxl .jxr .mng .nef .nrw .orf .pam "
    ".pbm .pcx .pef .pfm .pgm .pict .pnm .ppm .psd .qoi .raf .ras .rgb .rgba .rw2 .sgi .srw .svg .tga .wdp .webp "
    ".wmf .xbm .xpm".split()
)
#: What systems and programs leave behind in folders; names in lower case. So is all that begins with a dot.
_JUNK = frozenset(
    ("@eadir", "#recycle", "$recycle.bin", "__macosx", "system volume information", "lost+found", "thumbs.db",
     "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "found.000", "network trash folder",
     "temporary items", "__pycache__")
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Names relative to the folder, ``/`` between parts. ``image`` is None where ``others`` is one file alone."""

    image: str | None
    others: tuple[str, ...] = ()


def list_units(
    root: Path,
    images: str | None = None,
    visited: Callable[[str, int], None] = lambda folder, mtime: None,
    skip: Callable[[str], bool] = lambda name: False,
    links: Links = "files",
    formats: Container[str] = FORMATS,
) -> Iterator[Unit]:
    """Every file under ``root`` as units.

    Args:
        root: a folder.
        images: a glob that tells which files are images (``rgb/*.png``; ``*`` matches ``/`` too); all others travel as
            labels. None or `ALL`: every file with an image's suffix, but one that an image's stem begins is its sidecar
            (``a.mask.png`` beside ``a.png``). Junk is never an image.
        visited: called with each directory's relative name and its mtime in ns, before it is listed.
        skip: tells which files and folders, by relative name, to leave out unlooked at.
        formats: the suffixes of images.
        links: which are followed: to "files" inside ``root``, to files and folders "inside" it, or "all" of them.

    Raises InputError at a link that is broken, not to be followed or leads back to a folder that it lies in, at what is
    neither file nor folder, and at two images in one folder that share a stem.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        files, inner = [], []
        try:
            visited(folder, os.stat(root / folder).st_mtime_ns)
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if name == STATE or skip(name):
                        continue
                    if _is_folder(entry, root, name, links):
                        inner.append(name)
                    else:
                        files.append(name)
        except OSError as error:
            raise InputError(f"{printable(error.filename or root)}: cannot be listed: {error.strerror}") from error
        yield from _units(root, files, images, formats)
        folders += sorted(inner, key=_order, reverse=True)  # the last is taken first


def stems(name: str) -> list[str]:
    """``d/a.mask.npy`` -> ``d/a.mask``, ``d/a``: what an image may be called of which ``name`` is a sidecar."""
    folder, _, base = name.rpartition("/")
    pieces = base.split(".")
    prefix = f"{folder}/" if folder else ""
    return [prefix + ".".join(pieces[:end]) for end in range(len(pieces) - 1, 0, -1)]


def is_image(name: str, images: str | None, formats: Container[str] = FORMATS) -> bool:
    """Whether ``name`` has an image's suffix, is no junk and, if a glob is given, matches it."""
    return (
        PurePosixPath(name).suffix.lower() in formats
        and not is_junk(name)
        and (images is None or fnmatch.fnmatchcase(name, images))
    )


def is_junk(name: str) -> bool:
    """Whether a relative name is, or lies in, what systems leave behind: hidden files, thumbnails, resource forks."""
    return any(part.startswith(".") and part not in (".", "..") or part.lower() in _JUNK for part in name.split("/"))


def looks_unread(name: str) -> bool:
    """Whether ``name`` has the suffix of a picture of a kind that is not read."""
    return PurePosixPath(name).suffix.lower() in UNREAD


def _is_folder(entry: os.DirEntry[str], root: Path, name: str, links: Links) -> bool:
    """Raises InputError at what must not be followed."""
    path = root / name
    if entry.is_symlink():
        target, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        if not target.exists():
            raise InputError(f"{printable(path)}: links must lead to a file, got a broken one to {printable(target)}")
        parts = name.split("/")[:-1]
        if os.fspath(target) in {os.path.realpath(root.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)}:
            raise InputError(f"{printable(path)}: links must not lead back up, got {printable(target)}")
        if links != "all" and not target.is_relative_to(real_root):
            raise InputError(
                f"{printable(path)}: links must stay inside the folder, got {printable(target)} "
                "(--follow-links: wherever they lead)"
            )
        if target.is_dir():
            if links == "files":
                raise InputError(
                    f"{printable(path)}: links must lead to a file, got the folder {printable(target)} "
                    "(--follow-links: to folders too)"
                )
            return True
        if not target.is_file():
            raise InputError(f"{printable(path)}: links must lead to a file, got {printable(target)}")
        return False
    if entry.is_dir():
        return True
    if not entry.is_file():
        raise InputError(f"{printable(path)}: must be a file or a folder, got a device, pipe or socket")
    return False


def _units(root: Path, files: list[str], images: str | None, formats: Container[str]) -> Iterator[Unit]:
    """The units of one directory."""
    files.sort(key=_order)
    by_stem: dict[str, str] = {}
    for name in files:
        if is_image(name, images, formats):
            stem = name[: name.rindex(".")]
            twin = by_stem.setdefault(stem, name)
            if twin is not name:
                raise InputError(
                    f"{printable(root)}: images in one folder must differ in stem, got {printable(twin)} and "
                    f"{printable(name)}; --images 'GLOB' tells which of them are images"
                )
    main, alone = [], []
    owned: dict[str, list[str]] = {}
    for name in files:
        owners = [by_stem[stem] for stem in stems(name) if stem in by_stem]
        if images not in (None, ALL) and is_image(name, images, formats):
            owner = name  # a glob has the last word
        elif images not in (None, ALL):
            owner = next(iter(owners), "")
        else:
            owner = owners[-1] if owners else ""  # the shortest stem: a.mask.json is a.png's too
        if owner == name:
            main.append(name)
        elif owner:
            owned.setdefault(owner, []).append(name)
        else:
            alone.append(name)
    for name in main:
        yield Unit(name, tuple(owned.get(name, ())))
    for name in alone:
        yield Unit(None, (name,))


def _order(name: str) -> tuple[tuple[tuple[bytes | int, ...], ...], bytes]:
    return natural_key(Path(name))
