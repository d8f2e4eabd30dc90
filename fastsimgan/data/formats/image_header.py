"""The header of an image file that Pillow has opened, and the rules that it must keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from PIL import Image

from fastsimgan.data.formats.image_metadata import PNG_SIGNATURE
from fastsimgan.data.formats.stored_image import FORMATS, Header
from fastsimgan.errors import InputError

READ = ("PNG", "JPEG", "TIFF")
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_ORIENTATION, _TIFF_SAMPLES, _TIFF_EXTRA, _TIFF_SIGN = 258, 262, 274, 277, 338, 339
_SIGNS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_PNG_BIT_DEPTH_AT = 24  # byte offset: signature 8, chunk length and name 8, width and height 8
_PNG_TAIL = 4096  # bytes in which the last chunk is looked for, since some programs append bytes of their own
#: How Pillow's modes are read: channels (1 or 3), whether alpha goes with them, and what they are called if converted.
_MODES = {
    "L": (1, False, ""), "RGB": (3, False, ""), "I;16": (1, False, ""), "I;16B": (1, False, ""), "F": (1, False, ""),
    "LA": (1, True, ""), "RGBA": (3, True, ""), "1": (1, False, "1-bit"), "P": (3, False, "palette"),
    "PA": (3, True, "palette"), "CMYK": (3, False, "CMYK"), "YCbCr": (3, False, "YCbCr"),
}  # fmt: skip


def check_header(image: Image.Image, path: Path, upright: bool) -> Header:
    """The header of an opened image. Raises InputError, without the file's name, if it breaks a rule."""
    expected = FORMATS[path.suffix.lower()]
    # A JPEG with more than one picture is called MPO by Pillow: a preview, a depth or a gain map behind the picture.
    if getattr(image, "n_frames", 1) != 1 and image.format != "MPO":
        raise InputError(f"must hold one picture, got {image.n_frames} (animated or multi-page)")  # type: ignore[attr-defined]
    if image.format != expected and (image.format, expected) != ("MPO", "JPEG"):
        raise InputError(f"suffix {path.suffix} must hold {expected}, got {image.format}")
    bits = 8
    if image.format == "TIFF":
        bits = _check_tiff(image.tag_v2, image.mode, upright)  # type: ignore[attr-defined]
    if image.format == "TIFF" and bits > 8 and bits != 16 and (bits, image.mode) != (32, "F"):
        raise InputError(f"must have 8 or 16 bits a channel, or float32, got {bits}")
    transparent = "transparency" in image.info
    if image.mode not in _MODES or (transparent and image.mode != "P"):
        if image.mode in _MODES:
            raise InputError(
                f"must hold transparency as alpha, got one transparent colour among {image.mode} ones, which refining "
                f"would change (magick mogrify -define png:color-type={4 if image.mode == 'L' else 6} makes it alpha)"
            )
        raise InputError(
            f"must be grey, RGB or a palette, with alpha or without, got Pillow mode {image.mode} (convert it: "
            "magick mogrify -colorspace sRGB -depth 8)"
        )
    channels, alpha, stored = _MODES[image.mode]
    if image.mode == "P":
        alpha = transparent
    if image.format == "PNG":
        file = image.fp  # type: ignore[attr-defined]
        position = file.tell()  # where Pillow will go on reading
        file.seek(_PNG_BIT_DEPTH_AT)
        bits = file.read(1)[0]
        file.seek(max(0, file.seek(0, os.SEEK_END) - _PNG_TAIL))
        if b"IEND" not in file.read() and not _has_end(file):
            raise InputError("PNG must end with an IEND chunk, got a truncated file")
        file.seek(position)
        if image.mode == "L" and bits < 8:
            stored = f"{bits}-bit"
    if bits < 8:
        bits = 8
    if bits not in (8, 16) and (bits, image.mode) != (32, "F"):
        raise InputError(f"must have 8 or 16 bits a channel, or float32, got {bits}")
    shape = (image.height, image.width, *((3,) if channels == 3 else ()))
    orientation = image.tag_v2.get(_TIFF_ORIENTATION, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
    return Header(shape, "float32" if image.mode == "F" else f"uint{bits}", expected, alpha, stored, orientation)


def _has_end(file: IO[bytes]) -> bool:
    """Whether a PNG's chunks come to their end, whatever lies behind it."""
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        if head[4:] == b"IEND":
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def _check_tiff(tags: Any, mode: str, upright: bool) -> int:
    """Bits a sample. Raises InputError at what Pillow would read as something else, or in part."""
    bits, signs = tags.get(_TIFF_BITS, (1,)), set(tags.get(_TIFF_SIGN, (1,)))
    samples, extra = tags.get(_TIFF_SAMPLES, 1), tags.get(_TIFF_EXTRA, ())
    photometric = tags.get(_TIFF_PHOTOMETRIC)
    colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
    if samples - colours not in (0, 1) or (samples > colours and tuple(extra) != (2,)):
        more = samples - colours
        what = "premultiplied alpha" if tuple(extra) == (1,) else f"{more} further band{'s' if more != 1 else ''}"
        raise InputError(
            f"must have 1 or 3 samples a pixel, or alpha beside them, got {samples} ({what}): keep such bands in files "
            "of their own (gdal_translate -b 1 -b 2 -b 3)"
        )
    if len(set(bits)) > 1:
        raise InputError(f"must have as many bits in every sample, got {bits}")
    if signs - {1, 3} or (3 in signs and (mode != "F" or bits[0] != 32)):
        kind = " and ".join(_SIGNS.get(sign, f"format {sign}") for sign in sorted(signs))
        raise InputError(f"must hold unsigned samples of 8 or 16 bits, or float32, got {kind} ones of {bits[0]} bits")
    if photometric == 0 and bits[0] > 1:
        raise InputError(
            "TIFF must store black as 0, got photometric interpretation WhiteIsZero "
            "(tiffcp does not change it; magick mogrify -define quantum:polarity=min-is-black does)"
        )
    if not upright and tags.get(_TIFF_ORIENTATION, 1) != 1:
        # Pillow turns a TIFF as it decodes it, and the labels would no longer fit.
        raise InputError(f"TIFF orientation must be 1 (as stored), got {tags[_TIFF_ORIENTATION]}")
    return int(bits[0])
