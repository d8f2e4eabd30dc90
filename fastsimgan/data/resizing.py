"""Real photos brought to the renders' pixel scale, before training: it is not for R to learn what a zoom does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimgan.data.ragged import Images, RaggedImages, Size, pack, sizes_of

LARGER = 1.25
"""Times the wanted height from which on a photo is brought to it: a smaller change would blur more than it mends."""


@dataclass(frozen=True)
class Scale:
    """What becomes of an image's size: one factor for all, or one height for those much larger than it."""

    factor: float = 1.0
    height: int | None = None

    def of(self, height: int, width: int) -> Size:
        """The new (height, width), at least 1 each."""
        factor = self.factor
        if self.height is not None and height > LARGER * self.height:
            factor = self.height / height
        return max(1, round(height * factor)), max(1, round(width * factor))


def resize(pixels: NDArray[Any], size: Size) -> NDArray[Any]:
    """One image ``[H, W]`` or ``[H, W, C]`` at another size, of the same type.

    Pillow's Lanczos filter, as wide as the step between pixels asks for: no detail is folded into a coarser pattern.
    """
    if pixels.shape[:2] == size:
        return pixels
    shape = (size[1], size[0])
    if pixels.dtype == np.uint8 and pixels.shape[2:] in ((), (3,)):
        return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS))
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    # through float32, which holds every value exactly; the filter overshoots at edges
    found = np.stack(
        [
            np.asarray(Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(shape, Image.Resampling.LANCZOS))
            for plane in np.moveaxis(planes, 2, 0)
        ],
        axis=2,
    )
    if pixels.dtype != np.float32:
        found = np.rint(found)
    limits = (pixels.min(), pixels.max()) if pixels.dtype == np.float32 else (0, np.iinfo(pixels.dtype).max)
    found = found.clip(*limits).astype(pixels.dtype)  # floats may be metres: theirs are the picture's own
    return found.reshape(*size, *pixels.shape[2:])


def rescale(images: Images, scale: Scale) -> Images:
    """A whole set brought to another scale; the set itself where that changes nothing."""
    sizes = [scale.of(*size) for size in sizes_of(images).tolist()]
    if sizes == [tuple(size) for size in sizes_of(images).tolist()]:
        return images
    if not isinstance(images, RaggedImages):
        sizes *= len(images)
    return pack([resize(image, size) for image, size in zip(_each(images), sizes, strict=True)])


def median_height(images: Images) -> int:
    """Of the images of a set."""
    return int(np.median(sizes_of(images)[:, 0]))


def _each(images: Images) -> Any:
    return (images[i] for i in range(len(images)))
