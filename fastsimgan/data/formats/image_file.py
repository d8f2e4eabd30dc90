"""One image file: what it holds, its pixels, and writing such a file again. PNG, JPEG and TIFF, through Pillow.

Pixels come through exactly as stored, grey or RGB, 8 or 16 bits a channel or float32 in [0, 1]; alpha travels beside
them, and so does whatever else the file carries (see `formats.image_metadata`). What is stored in another way but has
one meaning (palettes, 1 to 4 bits, CMYK, YCbCr) is read as the colours that it stands for, and written as these.
Anything else (further bands, signed samples, premultiplied or single transparent colours, animations) is refused by
name. EXIF orientation is ignored, so that a label's (row, column) still points at the same pixel, unless ``upright``
asks for it.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastsimgan.data.formats.array_picture import decode_arrays, encode_arrays
from fastsimgan.data.formats.image_codecs import decode_cv2, decode_jpeg, encode_pixels
from fastsimgan.data.formats.image_errors import refusing
from fastsimgan.data.formats.image_header import READ, check_header
from fastsimgan.data.formats.image_metadata import (
    Carried,
    Scan,
    exif_orientation,
    insert,
    scan_jpeg,
    scan_png,
    scan_tiff,
)
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, FORMATS, Header, StoredImage, split_alpha
from fastsimgan.data.pixel_values import UNIT, Span, out_of_range
from fastsimgan.errors import InputError

MAX_FILE_BYTES = 1 << 29  # of one encoded image; nothing that has few enough pixels needs more
_LOSSLESS_TIFF = {"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"}
_CONVERTED = ("P", "PA", "CMYK", "YCbCr")


def read_header(path: Path, upright: bool = False, key: str | None = None) -> Header:
    """Read the header alone; the pixels may still turn out to be damaged.

    Args:
        path: the file.
        upright: turn the picture as its EXIF orientation has it.
        key: which array in a file of several is the picture.

    Raises InputError if the file cannot be opened or is not one of the kinds this module reads.
    """
    if path.suffix.lower() in ARRAY_FORMATS:
        return decode_arrays(read_bytes(path), path, key, None).header
    with refusing(path), Image.open(path, formats=READ) as image:
        header = check_header(image, path, upright)
        if header.format != "TIFF":
            header = replace(header, orientation=exif_orientation(image.info.get("exif", b"")))
        return _turned(header) if upright else header


def lost_of(path: Path) -> list[str]:
    """What an image file carries that will not be in the refined one, in words. Raises InputError as `read_bytes`."""
    if path.suffix.lower() in ARRAY_FORMATS:
        return []
    data = read_bytes(path)
    scan = _scan(data, path.suffix)
    carried = scan_tiff(data) if path.suffix.lower() in (".tif", ".tiff") else scan.carried if scan else Carried()
    with refusing(path), Image.open(io.BytesIO(data), formats=READ) as image:
        stored = check_header(image, path, True).stored
    return list((carried.without_colours() if stored else carried).lost)


def read_image(path: Path, upright: bool = False, key: str | None = None, span: Span | None = UNIT) -> StoredImage:
    """Decode one file. Raises InputError as `decode_image` does."""
    return decode_image(read_bytes(path), path, upright, key, span)


def read_bytes(path: Path) -> bytes:
    """An image file's bytes. Raises InputError if it cannot be read or is longer than any image should be."""
    with refusing(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("must be a regular file, got a folder, pipe, socket or device")
            size = status.st_size
            if size > MAX_FILE_BYTES:
                raise InputError(f"must have at most {MAX_FILE_BYTES} bytes, got {size}")
            data = os.read(file, size + 1)
            while len(data) <= size and (more := os.read(file, size + 1 - len(data))):
                data += more
        finally:
            os.close(file)
        if len(data) > size:
            raise InputError(f"must not grow while it is read, from {size} bytes")
        return data


def decode_image(
    data: bytes, path: Path, upright: bool = False, key: str | None = None, span: Span | None = UNIT
) -> StoredImage:
    """Decode a file's bytes; ``path`` gives the suffix and the name for errors, and is not opened.

    Floats must lie in ``span``; None: anywhere. Raises InputError as `read_header` does, and if the pixels are
    truncated or damaged.
    """
    if path.suffix.lower() in ARRAY_FORMATS:
        return decode_arrays(data, path, key, span)
    scan = _scan(data, path.suffix)
    if (image := _decode_plain(data, path.suffix, scan)) is None:
        image = _decode(data, path, upright, scan, span)
    if upright and image.header.orientation != 1 and image.header.format != "TIFF":
        pixels = _turn(image.pixels, image.header.orientation)
        image = StoredImage(np.ascontiguousarray(pixels), _turned(image.header))
    return image


def _decode(data: bytes, path: Path, upright: bool, scan: Scan | None, span: Span | None) -> StoredImage:
    with refusing(path), Image.open(io.BytesIO(data), formats=READ) as image:
        header = check_header(image, path, upright)
        tiles = list(image.tile)
        fast = None
        if header.format == "JPEG" and not header.stored:
            fast = decode_jpeg(data, header)
        elif (header.format == "TIFF" and header.dtype == "uint16" and header.shape[2:]) or _is_la16(header, image):
            fast = decode_cv2(data)
            if fast is None:
                raise InputError("16-bit colour TIFF and grey PNG with alpha need opencv: pip install fastsimgan[fast]")
        if fast is not None:
            planes = fast
        else:
            as_read = image.convert("RGBA" if header.alpha else "RGB") if image.mode in _CONVERTED else image
            planes = np.array(as_read.convert("L") if as_read.mode == "1" else as_read)
            if image.mode in ("RGB", "RGBA") and header.dtype == "uint16":
                # Pillow keeps the upper byte of 16-bit colour alone. Told that bytes are swapped, it keeps the lower.
                with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
                    again.tile = [tile._replace(args=f"{image.mode};16L") for tile in tiles]
                    planes = planes.astype(np.uint16) << 8 | np.asarray(again)
        planes = planes.astype(header.dtype, copy=False)
        pixels, alpha = split_alpha(planes, header)
        if pixels.shape != header.shape:
            raise InputError(f"decoded to shape {pixels.shape}, its header says {header.shape}")
        if span and header.dtype == "float32" and not bool(((pixels >= span[0]) & (pixels <= span[1])).all()):
            raise InputError(out_of_range(pixels, span))
        if header.format == "TIFF":
            compression = str(image.info.get("compression"))
            kept = compression if compression in _LOSSLESS_TIFF else "tiff_adobe_deflate"
            carried = replace(scan_tiff(data), compression=kept)
        else:
            if scan is None:
                scan = _scan_of_damaged()
            carried = scan.carried
            header = replace(header, orientation=carried.orientation)
        if header.stored and carried != Carried():
            carried = carried.without_colours()
        return StoredImage.of(pixels, header, carried, alpha)


def _scan_of_damaged() -> Scan:
    """For a file that Pillow reads although its structure is odd: nothing of it is carried but the pixels."""
    return Scan(0, 0, 0, 0, Carried(lost=("all but the pixels: the file's structure is damaged",)), False)


def _is_la16(header: Header, image: Image.Image) -> bool:
    return header.format == "PNG" and header.dtype == "uint16" and header.alpha and len(header.shape) == 2


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The picture as a viewer shows it."""
    if orientation >= 5:  # rows are columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _turned(header: Header) -> Header:
    """The header of a picture that is turned upright; a TIFF is turned as it is decoded, and its size says so."""
    height, width, *channels = header.shape
    turned = header.orientation >= 5 and header.format != "TIFF"
    return replace(header, shape=(width, height, *channels)) if turned else header


def _scan(data: bytes, suffix: str) -> Scan | None:
    expected = FORMATS[suffix.lower()]
    return scan_png(data) if expected == "PNG" else scan_jpeg(data) if expected == "JPEG" else None


def _decode_plain(data: bytes, suffix: str, scan: Scan | None = None) -> StoredImage | None:
    """What `decode_image` gives for a file with nothing unusual in it, at a third of Pillow's cost.

    None for every other file, and for anything that looks damaged or too large: Pillow is to judge these.
    """
    expected = FORMATS[suffix.lower()]
    scan = scan or _scan(data, suffix)
    if scan is None or not scan.plain or scan.height * scan.width > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
        return None
    if expected == "PNG":
        if scan.bits not in (8, 16) or scan.colour not in (0, 2, 4, 6):
            return None
        colour, alpha = scan.colour & 2, bool(scan.colour & 4)
    else:
        if scan.colour not in (1, 3):
            return None
        colour, alpha = scan.colour == 3, False
    shape = (scan.height, scan.width, 3) if colour else (scan.height, scan.width)
    header = Header(shape, f"uint{scan.bits}", expected, alpha, orientation=scan.carried.orientation)
    planes = decode_jpeg(data, header) if expected == "JPEG" else decode_cv2(data)
    if planes is None or planes.dtype.name != header.dtype or (alpha and planes.shape != (*shape[:2], 4)):
        return None
    pixels, aside = split_alpha(planes, header)
    return StoredImage.of(pixels, header, scan.carried, aside) if pixels.shape == shape else None


def encode_image(image: StoredImage) -> bytes:
    """``image`` in its own format. PNG and TIFF keep every pixel; JPEG has quality 95 and full-resolution colour.

    Alpha, the hidden pixels and what the file carried are written as they were read. The same image always gives the
    same bytes.
    """
    if image.carried.whole:
        return encode_arrays(image)
    pixels, format = image.pixels, image.header.format
    if image.alpha is not None:
        assert image.hidden is not None
        if len(image.hidden):
            pixels = pixels.copy()
            pixels[image.alpha == 0] = image.hidden
        pixels = np.dstack([pixels, image.alpha])
    return insert(format, encode_pixels(pixels, format, image.carried.compression), image.carried)
