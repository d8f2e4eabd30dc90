"""A folder of images, read as a tree: PNG, JPEG and TIFF, 8 or 16 bits, grey or RGB, with other files beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from fastsimgan.data.files import natural_key, printable
from fastsimgan.data.images import FORMATS, Header, read_header, read_image
from fastsimgan.data.room import room_for
from fastsimgan.data.threads import in_threads
from fastsimgan.errors import InputError

SHOWN = 10  # bad files named in `describe`


class FolderImages:
    """Every image under a folder, in natural order of its path (``2.png`` before ``10.png``). Opening reads only names.

    ``images`` and ``others`` hold paths relative to the folder. ``others`` is every file that is not an image: sidecars
    (same folder, same stem as an image), metadata, anything. Links are followed only to files inside the folder.

    Raises InputError if there is no image, if two images in one folder share a stem (one is probably a mask), at a link
    that is broken, leads out of the folder or to a folder, and at anything that is neither file nor folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = sorted(_walk(path, path.resolve()), key=natural_key)
        except OSError as error:
            raise InputError(f"{printable(error.filename or path)}: cannot be listed: {error.strerror}") from error
        self.images = [file for file in files if file.suffix.lower() in FORMATS]
        self.others = [file for file in files if file.suffix.lower() not in FORMATS]
        if not self.images:
            raise InputError(
                f"{printable(path)}: must hold at least one image ({' '.join(FORMATS)}), got {len(files)} other files"
            )
        self._by_stem: dict[Path, Path] = {}
        for image in self.images:
            twin = self._by_stem.setdefault(image.with_suffix(""), image)
            if twin is not image:
                raise InputError(
                    f"{printable(path)}: images in one folder must differ in stem, "
                    f"got {printable(twin)} and {printable(image)}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def owner(self, other: Path) -> Path | None:
        """The image that ``other`` is a sidecar of: ``d/a.mask.npy`` is ``d/a.mask.png``'s, or else ``d/a.png``'s."""
        pieces = other.name.split(".")
        stems = (other.parent / ".".join(pieces[:end]) for end in range(len(pieces) - 1, 0, -1))
        return next((self._by_stem[stem] for stem in stems if stem in self._by_stem), None)

    @cached_property
    def headers(self) -> list[Header | InputError]:
        """Each image's header, or the reason why it has none. Opens every file once, in a few threads."""

        def look(image: Path) -> Header | InputError:
            try:
                return read_header(self.path / image)
            except InputError as error:
                return error

        return list(in_threads(look, self.images))

    @property
    def bad(self) -> list[str]:
        """``NAME: REASON`` of each image whose header breaks a rule. Damaged pixels show only when they are decoded."""
        return [str(header) for header in self.headers if isinstance(header, InputError)]

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width), or None if the images differ in size or colour."""
        shapes = {header.shape for header in self._good()}
        if len(shapes) != 1:
            return None
        shape = shapes.pop()
        return (shape[2] if len(shape) == 3 else 1), shape[0], shape[1]

    @property
    def dtype(self) -> np.dtype | None:
        """uint8 or uint16, or None if the images differ in bit depth."""
        dtypes = {header.dtype for header in self._good()}
        return np.dtype(dtypes.pop()) if len(dtypes) == 1 else None

    @property
    def bit_depth(self) -> int | None:
        """Bits a channel, 8 or 16, or None if the images differ."""
        return None if self.dtype is None else self.dtype.itemsize * 8

    def describe(self) -> str:
        """What was found, in one line: count, size, bit depth, other files, bad ones and why. Reads headers only."""
        kinds = Counter(f"{header} {header.format}" for header in self._good())
        listed = ", ".join(kind if len(kinds) == 1 else f"{count} {kind}" for kind, count in kinds.most_common(SHOWN))
        if len(kinds) > SHOWN:
            listed += f" and {len(kinds) - SHOWN} other kinds"
        text = (
            f"{printable(self.path)}: {len(self)} images, {listed or 'none readable'}, {len(self.others)} other files"
        )
        if bad := self.bad:
            text += f", {len(bad)} bad: {'; '.join(bad[:SHOWN])}"
            if len(bad) > SHOWN:
                text += f"; and {len(bad) - SHOWN} more"
        return text

    def load(self) -> np.ndarray:
        """All images, ``[N, H, W]`` or ``[N, H, W, 3]``, uint8 or uint16, in the order of ``images`` (see `room_for`).

        Raises InputError naming the file if an image is bad or damaged, or the first two that differ in size or kind.
        """
        first: Header | None = None
        for image, header in zip(self.images, self.headers, strict=True):
            if isinstance(header, InputError):
                raise header
            first = first or header
            if (header.shape, header.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{printable(self.path)}: images must be of one size and kind, "
                    f"{printable(self.images[0])} is {first} and {printable(image)} is {header}"
                )
        assert first is not None  # there is at least one image
        images = room_for((len(self), *first.shape), first.dtype, self.path)

        def decode(index: int) -> None:
            images[index] = read_image(self.path / self.images[index]).pixels

        for _ in in_threads(decode, range(len(self))):
            pass
        return images

    def labels(self) -> dict[str, np.ndarray]:
        """Empty: a folder's labels are its other files, which only travel along."""
        return {}

    def _good(self) -> list[Header]:
        return [header for header in self.headers if isinstance(header, Header)]


def _walk(root: Path, real_root: Path) -> Iterator[Path]:
    """Every file under ``root``, relative to it, in no order. Raises InputError at what must not be followed."""
    folders = [Path()]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = folder / entry.name
                if entry.is_symlink():
                    target = Path(os.path.realpath(entry.path))
                    if not target.is_relative_to(real_root):
                        raise InputError(
                            f"{printable(root / name)}: links must stay inside the folder, got {printable(target)}"
                        )
                    if not target.is_file():
                        raise InputError(
                            f"{printable(root / name)}: links must lead to a file, got {printable(target)}"
                        )
                    yield name
                elif entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    yield name
                else:
                    raise InputError(
                        f"{printable(root / name)}: must be a file or a folder, got a device, pipe or socket"
                    )
