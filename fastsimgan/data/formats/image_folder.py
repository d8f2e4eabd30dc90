"""A folder of images, read as a tree: PNG, JPEG and TIFF, with other files beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from functools import cached_property
from pathlib import Path

import numpy as np

from fastsimgan.data.formats.image_file import read_header, read_image
from fastsimgan.data.formats.labels import Labels, is_label_file
from fastsimgan.data.formats.listing import list_units
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, FORMATS, Header
from fastsimgan.data.ragged import Images, RaggedImages, one_size
from fastsimgan.data.reading import Reading, in_colour
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import allocate
from fastsimgan.hardware.threads import in_threads
from fastsimgan.storage.names import printable
from fastsimgan.storage.regular_file import read_regular

SHOWN = 10  # bad files named in `describe`


class FolderImages:
    """Every image under a folder, in the order of `list_units`. Opening reads names, and looks at a few images.

    ``images`` and ``others`` hold paths relative to the folder. ``others`` is every file that is not an image: sidecars
    (same folder, same stem as an image), metadata, junk, anything.

    Args:
        path: the folder.
        reading: how its images are told from other files and read.

    Raises InputError as `list_units` does, if there is no image, and if some images seem to be labels (`Census`).
    """

    def __init__(self, path: Path, reading: Reading | None = None) -> None:
        self.path = path
        self.reading = reading or Reading()
        self._list(FORMATS)
        if not self.images and self.census.arrays:
            self._list(ARRAY_FORMATS)
        if not self.images:
            raise InputError(no_image(path, self.reading.images, len(self.others), self.census))
        if self.reading.images is None:
            self.census.check(
                printable(path),
                lambda name: read_image(path / name, key=self.reading.key, span=None),
                self.reading.flag,
            )
        self.left_out: list[str] = []
        """``NAME: REASON`` of what `load` has left out."""
        self.converted = 0
        """Images that `load` has made grey or RGB."""
        self.resized = 0
        """Images that `load` has brought to another size."""

    def _list(self, formats: Container[str]) -> None:
        self.images: list[Path] = []
        self.others: list[Path] = []
        self.census = Census()
        for unit in list_units(self.path, self.reading.images, links=self.reading.links, formats=formats):
            if unit.image is None:
                self.census.alone(unit.others[0])
            else:
                self.census.image(unit.image)
                self.images.append(Path(unit.image))
            self.others += map(Path, unit.others)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def headers(self) -> list[Header | InputError]:
        """Each image's header, or the reason why it has none. Opens every file once, in a few threads."""

        def look(image: Path) -> Header | InputError:
            try:
                return read_header(self.path / image, self.reading.upright, self.reading.key)
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
        """uint8, uint16 or float32, or None if the images differ in bit depth."""
        dtypes = {header.dtype for header in self._good()}
        return np.dtype(dtypes.pop()) if len(dtypes) == 1 else None

    @property
    def bit_depth(self) -> int | None:
        """Bits a channel, 8, 16 or 32, or None if the images differ."""
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
        turned = Counter(header.orientation for header in self._good() if header.orientation != 1)
        if turned:
            which = " and ".join(f"{orientation}" for orientation in sorted(turned))
            done = "turned upright" if self.reading.upright else "read as stored, so that labels stay aligned"
            text += f", {turned.total()} of {len(self)} carry EXIF orientation {which}: {done}"
        if unread := self.census.unread_text():
            text += f", {unread}"
        if bad := self.bad:
            text += f", {len(bad)} bad: {shortened(bad)}"
        return text

    def load(self) -> np.ndarray:
        """`load_set` of images that have one size. Raises InputError as that does, and if ``reading.any_size``."""
        return one_size(self.path, self.reading.any_size, self.load_set)

    def load_set(self) -> Images:
        """All images, ``[N, H, W]`` or ``[N, H, W, 3]``, in the order of ``images`` (see `allocate`).

        With ``reading.any_size`` several sizes come as `RaggedImages`. With ``reading.on_error`` "skip", images that
        cannot be read are left out, see ``left_out``.

        Raises InputError naming the files if images are bad or damaged, or the first two that differ in size or kind.
        """
        good = [i for i, header in enumerate(self.headers) if isinstance(header, Header)]
        bad = {i: str(header) for i, header in enumerate(self.headers) if isinstance(header, InputError)}
        if bad and (self.reading.on_error == "fail" or not good):
            first, *others = bad.values()
            more = f"; and so {len(others)} more: {shortened(others)}" if others else ""
            raise self.reading.way_out(first + more)
        shapes, dtype, colour = self._agreed(good)
        images = _allocate(shapes, dtype, self.path)

        def decode(index: int) -> str | None:
            try:
                path = self.path / self.images[good[index]]
                image = read_image(path, self.reading.upright, self.reading.key, self.reading.span)
                images[index][...] = self.reading.scaled(self.reading.coloured(image.pixels, colour))
            except InputError as error:
                if self.reading.on_error == "fail":
                    raise self.reading.way_out(error) from None
                return str(error)
            return None

        bad |= {good[i]: reason for i, reason in enumerate(in_threads(decode, range(len(good)))) if reason is not None}
        self.left_out = [bad[i] for i in sorted(bad)]
        kept = [i for i in range(len(good)) if good[i] not in bad]
        if not kept:
            raise InputError(
                f"{printable(self.path)}: must hold at least one image that can be read; {self.left_out[0]}"
            )
        self._names = [str(self.images[good[i]]) for i in kept]
        if isinstance(images, RaggedImages):
            return images.only(kept)
        if len(kept) < len(good):
            for to, of in enumerate(kept):
                images[to] = images[of]
        return images[: len(kept)]

    def _agreed(self, good: list[int]) -> tuple[list[tuple[int, ...]], str, str]:
        """The shapes and the type that the ``good`` images get in a set, and the colour that they are given.

        Raises InputError naming the first two that cannot be in one set.
        """
        colour = self.reading.colour_of(len(self.headers[i].shape) == 3 for i in good)  # type: ignore[union-attr]
        kinds = []
        for i in good:
            header = self.headers[i]
            assert isinstance(header, Header)
            kinds.append((in_colour(header.shape, colour), header))
            if self.reading.differ((kinds[-1][0], kinds[0][0])) or header.dtype != kinds[0][1].dtype:
                one = "kind" if self.reading.any_size else "size and kind"
                same_depth = header.dtype == kinds[0][1].dtype
                ways = [self.reading.colouring] if self.reading.colouring and same_depth else []
                if not same_depth or len(header.shape) != len(kinds[0][1].shape):
                    ways.append(self.reading.flag("GLOB") + " tells which are images")
                if not ways:
                    ways.append("bring them to one size first")
                raise InputError(
                    f"{printable(self.path)}: images must be of one {one}, "
                    f"{printable(self.images[good[0]])} is {kinds[0][1]} and {printable(self.images[i])} is {header}"
                    + "; " * bool(ways)
                    + ", ".join(ways)
                )
        self.converted = sum(shape != header.shape for shape, header in kinds)
        shapes = [self.reading.size_of(shape) for shape, _ in kinds]
        self.resized = sum(now != was for now, (was, _) in zip(shapes, kinds, strict=True))
        return shapes, kinds[0][1].dtype, colour

    def labels(self) -> dict[str, np.ndarray]:
        """What sidecars, ``metadata.jsonl``, ``metadata.csv`` or class folders say of every image (see `Labels`).

        After `load`, of the images that it gave.
        """
        names = getattr(self, "_names", [str(image) for image in self.images])
        found = Labels(names)
        for other in self.others:
            if is_label_file(str(other)):
                found.take(str(other), read_regular(self.path / other))
        return found.arrays()

    def _good(self) -> list[Header]:
        return [header for header in self.headers if isinstance(header, Header)]


def _allocate(shapes: list[tuple[int, ...]], dtype: str, path: Path) -> Images:
    """A set of images of these shapes, to be filled."""
    if len(set(shapes)) == 1:
        return allocate((len(shapes), *shapes[0]), dtype, path)
    sizes = [(shape[0], shape[1]) for shape in shapes]
    return RaggedImages.empty(sizes, 3 if shapes[0][2:] else 1, dtype, path)


def no_image(path: Path, images: str | None, others: int, census: Census) -> str:
    """Why a folder in which nothing is an image is refused."""
    of = " ".join(FORMATS) + (f", matching {images}" if images else "")
    unread = census.unread_text()
    return f"{printable(path)}: must hold at least one image ({of}), got {others} other files" + (
        f"; {unread}: magick mogrify -format png turns them into PNG" if unread else ""
    )


def shortened(reasons: list[str]) -> str:
    """The first reasons, and how many more there are."""
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more
