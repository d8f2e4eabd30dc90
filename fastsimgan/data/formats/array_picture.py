"""Files of arrays that hold one picture each, read and written as image files are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fastsimgan.data.formats.array_file import check_images, read_as
from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_errors import refusing
from fastsimgan.data.formats.image_metadata import Carried
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, Header, StoredImage
from fastsimgan.data.pixel_values import Span, check_range
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


def decode_arrays(data: bytes, path: Path, key: str | None, span: Span | None) -> StoredImage:
    """The one picture in a file of arrays."""
    kind = ARRAY_FORMATS[path.suffix.lower()]
    if kind == "HDF5":
        held = HDF5Images(path, key, data, span or (-np.inf, np.inf))
        stored, pixels, key = held.stored_dtype, held.load(), held.key
    else:
        with refusing(path):
            array = np.load(io.BytesIO(data), allow_pickle=False)
        stored = array.dtype
        shape = check_images(path, "the array", array.shape, stored)
        pixels = array.reshape(shape).astype(read_as(stored))
        pixels = check_range(pixels, path, 0, span) if span else pixels
    if len(pixels) != 1:
        raise InputError(f"{printable(path)}: must hold one picture, as other files lie beside it, got {len(pixels)}")
    pixels = pixels[0, ..., 0] if pixels.shape[3:] == (1,) else pixels[0]
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise InputError(f"{printable(path)}: must have 1 or 3 channels, got {pixels.shape[2]}")
    header = Header(pixels.shape, pixels.dtype.name, kind)
    return StoredImage(np.ascontiguousarray(pixels), header, Carried(whole=data, key=key))


def encode_arrays(image: StoredImage) -> bytes:
    if image.header.format == "HDF5":
        return HDF5Images(Path("picture.h5"), image.carried.key, image.carried.whole).with_picture(image.pixels)
    old = np.load(io.BytesIO(image.carried.whole), allow_pickle=False)
    buffer = io.BytesIO()
    np.save(buffer, image.pixels.astype(old.dtype).reshape(old.shape), allow_pickle=False)
    return buffer.getvalue()
