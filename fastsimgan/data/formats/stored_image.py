"""An image as a file stores it: its header, its pixels, and what travels with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastsimgan.data.formats.image_metadata import Carried
from fastsimgan.errors import InputError

#: The file suffixes that are read as images, in lower case, and Pillow's name of the format that each must hold.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
#: Files of arrays that hold one picture each. They are read as images in a folder that has no other ones.
ARRAY_FORMATS = {".h5": "HDF5", ".hdf5": "HDF5", ".npy": "NPY"}


@dataclass(frozen=True)
class Header:
    """What an image file's header says. ``shape`` is (height, width), or (height, width, 3) for RGB."""

    shape: tuple[int, ...]
    dtype: str  # "uint8", "uint16" or "float32"
    format: str  # "PNG", "JPEG" or "TIFF"
    alpha: bool = False  # the file holds it beside the pixels
    stored: str = ""  # how the file stores its colours, where it is not as they are read: "palette", "1-bit", "CMYK"
    orientation: int = 1  # EXIF's; ``shape`` is as stored, or as asked for by ``upright``

    def __str__(self) -> str:
        colour = "grey" if len(self.shape) == 2 else "RGB"
        stored = f" (from {self.stored})" if self.stored else ""
        alpha = " with alpha" if self.alpha else ""
        return f"{self.shape[0]}x{self.shape[1]} {np.dtype(self.dtype).itemsize * 8}-bit {colour}{alpha}{stored}"


@dataclass(frozen=True)
class StoredImage:
    """A file's pixels ``[H, W]`` or ``[H, W, 3]``, uint8, uint16 or float32, and what it takes to write it again.

    ``hidden`` are the pixels that ``alpha`` ``[H, W]`` makes invisible, ``[n]`` or ``[n, 3]``: nobody sees them, and
    they are written as they were read, whatever has become of the others.
    """

    pixels: np.ndarray
    header: Header
    carried: Carried = field(default_factory=Carried)
    alpha: np.ndarray | None = None
    hidden: np.ndarray | None = None

    @classmethod
    def of(cls, pixels: np.ndarray, header: Header, carried: Carried, alpha: np.ndarray | None) -> StoredImage:
        """Of decoded pixels and alpha, in any order of memory."""
        hidden = None
        if alpha is not None:
            alpha = np.ascontiguousarray(alpha)
            hidden = pixels[alpha == 0]
        return cls(np.ascontiguousarray(pixels), header, carried, alpha, hidden)


def split_alpha(planes: np.ndarray, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and alpha."""
    if not header.alpha:
        return planes, None
    if planes.ndim != 3 or planes.shape[2] not in (2, 4):
        raise InputError(f"decoded to shape {planes.shape}, its header says {header.shape} with alpha")
    return (planes[..., :3] if len(header.shape) == 3 else planes[..., 0]), planes[..., -1]
