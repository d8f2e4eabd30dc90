"""How a set of images is to be read: what a command's flags say of it, for every kind of input alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np

from fastsimgan.data.pixel_values import UNIT, Span
from fastsimgan.data.ragged import Images, RaggedImages, channels_of
from fastsimgan.data.resizing import Scale, resize
from fastsimgan.errors import InputError

Links = Literal["files", "inside", "all"]
"""Which links of a folder are followed: to files inside it, to files and folders inside it, or all of them."""


def images_flag(glob: str) -> str:
    """The flag that tells which files are images, as most commands call it."""
    return f"--images '{glob}'"


def real_images_flag(glob: str) -> str:
    """The same for `train`'s real side."""
    return f"--real-images '{glob}'"


@dataclass(frozen=True)
class Reading:
    """What a command asks of `open_images`. The defaults keep every image as it is stored."""

    images: str | None = None
    """A glob that tells which files are images; None: all that have an image's suffix, and are no sidecars."""
    key: str | None = None
    """Which array of a file holds the images; None: ``images``, or the only one that can."""
    links: Links = "files"
    """Which links of a folder are followed."""
    on_error: Literal["fail", "skip"] = "fail"
    """At an image that cannot be read: stop, or leave it out."""
    upright: bool = False
    """Turn pictures as their EXIF orientation has it: for images without labels."""
    colour: Literal["as stored", "auto", "grey", "rgb"] = "as stored"
    """Make all images grey or RGB; "auto": RGB where grey ones are among them."""
    scale: Scale | None = None
    """Bring images to another size; None: as they are."""
    span: Span = UNIT
    """In which floats must lie. They are given as they are stored."""
    any_size: bool = False
    """Whether images may be of several sizes: ``load`` gives `RaggedImages` then."""
    flag: Callable[[str], str] = images_flag
    """The command's way to say ``images``, for messages."""
    skipping: str = ""
    """The command's way to leave bad images out, for messages; "" where it has none."""
    colouring: str = ""
    """The command's way to make grey and RGB images alike, for messages; "" where it has none."""

    def colour_of(self, rgb: Iterable[bool]) -> str:
        """What images become, of which some are RGB: "grey", "rgb", or "" where they stay as they are."""
        if self.colour != "auto":
            return "" if self.colour == "as stored" else self.colour
        return "rgb" if len(set(rgb)) > 1 else ""

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """One image at the size that ``scale`` gives it."""
        return pixels if self.scale is None else resize(pixels, self.scale.of(*pixels.shape[:2]))

    def size_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What `scaled` makes of an image's shape."""
        return shape if self.scale is None else (*self.scale.of(*shape[:2]), *shape[2:])

    def differ(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        """Whether two images' shapes cannot be in one set."""
        one, other = shapes
        return one[2:] != other[2:] if self.any_size else one != other

    def way_out(self, reason: object) -> InputError:
        """The error about a bad image, with the way out where the command has one."""
        return InputError(f"{reason}{f' ({self.skipping})' if self.skipping else ''}")

    @staticmethod
    def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
        """One image ``[H, W]`` or ``[H, W, 3]``, grey or RGB as ``colour`` says."""
        if colour == "rgb" and pixels.ndim == 2:
            return np.repeat(pixels[..., None], 3, axis=2)
        if colour == "grey" and pixels.ndim == 3:
            return to_grey(pixels)
        return pixels


def in_colour(shape: tuple[int, ...], colour: str) -> tuple[int, ...]:
    """An image's shape, grey or RGB as ``colour`` says."""
    return (*shape[:2], 3) if colour == "rgb" else shape[:2] if colour == "grey" else shape


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """``[..., 3]`` -> ``[...]`` of the same type: the luma of ITU-R 601, as Pillow's and OpenCV's."""
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return grey if pixels.dtype == np.float32 else np.rint(grey).astype(pixels.dtype)


@overload
def in_the_colour(images: np.ndarray, colour: str) -> np.ndarray: ...
@overload
def in_the_colour(images: Images, colour: str) -> Images: ...
def in_the_colour(images: Images, colour: str) -> Images:
    """A set made "grey" or "rgb"; the set itself where it is that, or has 2 or 4 channels."""
    if isinstance(images, RaggedImages):
        if (images.channels, colour) not in ((1, "rgb"), (3, "grey")):
            return images
        sizes = [(height, width) for height, width in images.sizes.tolist()]
        found = RaggedImages.empty(sizes, 3 if colour == "rgb" else 1, images.dtype, Path("images made " + colour))
        for i in range(len(images)):
            found[i][...] = Reading.coloured(images[i], colour)
        return found
    if colour == "rgb" and (images.ndim == 3 or images.shape[3] == 1):
        return np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
    if colour == "grey" and images.ndim == 4 and images.shape[3] == 3:
        grey = np.empty(images.shape[:3], images.dtype)
        for i, image in enumerate(images):
            grey[i] = to_grey(image)
        return grey
    return images


def grey_in_colour(images: Images) -> bool:
    """Whether RGB images are grey: of those looked at, 64 spread over the set, all have R = G = B."""
    if channels_of(images) != 3:
        return False
    some = (images[i] for i in range(0, len(images), max(1, len(images) // 64)))
    return all(bool((image == image[..., :1]).all()) for image in some)
