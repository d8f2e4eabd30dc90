"""One image file: what it holds, its pixels, and writing such a file again. PNG, JPEG and TIFF, through Pillow.

Only files whose pixels come through exactly as stored are read: grey or RGB, 8 or 16 bits a channel. Anything else
(CMYK, palettes, transparency, animations, 16-bit colour TIFF) is refused by name, and EXIF orientation is ignored, so
that a label's (row, column) still points at the same pixel.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from fastsimgan.data.files import printable
from fastsimgan.errors import InputError


def _optional(name: str) -> Any:
    """A module of [fast], or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# The same pixels as Pillow's, faster. PNG is encoded to other bytes.
simplejpeg = _optional("simplejpeg")
cv2 = _optional("cv2")

#: The file suffixes that are read as images, in lower case, and Pillow's name of the format that each must hold.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}

JPEG_QUALITY = 95
PNG_LEVEL = 1  # of zlib: half as slow as the usual 6, and files a tenth larger
MAX_FILE_BYTES = 1 << 29  # of one encoded image; nothing that has few enough pixels needs more
_LOSSLESS_TIFF = {"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_ORIENTATION = 258, 262, 274
_PNG_BIT_DEPTH_AT = 24  # byte offset: signature 8, chunk length and name 8, width and height 8
_PNG_TAIL = 4096  # bytes in which the last chunk is looked for, since some programs append bytes of their own
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PLAIN = {
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"tEXt",
    b"tIME",
    b"gAMA",
    b"sRGB",
    b"cHRM",
}  # nothing of these is used or kept
_JPEG_PLAIN = {0xC4, 0xDB, 0xDD, 0xFE}  # tables and comments
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman-coded: baseline, extended, progressive


@dataclass(frozen=True)
class Header:
    """What an image file's header says. ``shape`` is (height, width), or (height, width, 3) for RGB."""

    shape: tuple[int, ...]
    dtype: str  # "uint8" or "uint16"
    format: str  # "PNG", "JPEG" or "TIFF"

    def __str__(self) -> str:
        colour = "grey" if len(self.shape) == 2 else "RGB"
        return f"{self.shape[0]}x{self.shape[1]} {np.dtype(self.dtype).itemsize * 8}-bit {colour}"


@dataclass(frozen=True)
class StoredImage:
    """A file's pixels, uint8 or uint16 ``[H, W]`` or ``[H, W, 3]``, and what it takes to write such a file again."""

    pixels: np.ndarray
    header: Header
    extras: dict[str, Any] = field(
        default_factory=dict
    )  # Pillow's save options: EXIF, colour profile, resolution, compression


def read_header(path: Path) -> Header:
    """Read the header alone; the pixels may still turn out to be damaged.

    Raises InputError if the file cannot be opened or is not one of the kinds this module reads.
    """
    with _refusing(path), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        return _check(image, path)


def codecs() -> str:
    """The programs that decide about the bytes written, with versions."""
    found = [f"pillow {PIL.__version__}"]
    if simplejpeg is not None:
        found.append(f"simplejpeg {simplejpeg.__version__}")
    if cv2 is not None:
        found.append(f"opencv {cv2.__version__}")
    return ", ".join(found)


def read_image(path: Path) -> StoredImage:
    """Decode one file. Raises InputError as `read_header` does, and if the pixels are truncated or damaged."""
    return decode_image(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """An image file's bytes. Raises InputError if it cannot be read or is longer than any image should be."""
    with _refusing(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
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


def decode_image(data: bytes, path: Path) -> StoredImage:
    """Decode a file's bytes; ``path`` gives the suffix and the name for errors, and is not opened.

    Raises InputError as `read_header` does, and if the pixels are truncated or damaged.
    """
    if (plain := _decode_plain(data, path.suffix)) is not None:
        return plain
    with _refusing(path), Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
        header = _check(image, path)
        tiles = list(image.tile)
        fast = _decode_jpeg(data, header) if header.format == "JPEG" else None
        pixels = np.array(image, dtype=header.dtype) if fast is None else fast
        if header.dtype == "uint16" and image.mode == "RGB":
            # Pillow keeps the upper byte of 16-bit colour alone. Told that bytes are swapped, it keeps the lower one.
            with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
                again.tile = [tile._replace(args="RGB;16L") for tile in tiles]
                pixels = pixels << 8 | np.asarray(again)
        if pixels.shape != header.shape:
            raise InputError(f"decoded to shape {pixels.shape}, its header says {header.shape}")
        extras = {key: image.info[key] for key in ("exif", "icc_profile", "dpi") if image.info.get(key)}
        if header.format == "TIFF":
            compression = image.info.get("compression")
            extras["compression"] = compression if compression in _LOSSLESS_TIFF else "tiff_adobe_deflate"
        return StoredImage(pixels, header, extras)


def _decode_plain(data: bytes, suffix: str) -> StoredImage | None:
    """What `decode_image` gives for a file with nothing in it but an ordinary picture, at a third of Pillow's cost.

    None for every other file, and for anything that looks damaged or too large: Pillow is to judge these.
    """
    expected = FORMATS[suffix.lower()]
    header = _plain_png(data) if expected == "PNG" else _plain_jpeg(data) if expected == "JPEG" else None
    if header is None or header.shape[0] * header.shape[1] > (Image.MAX_IMAGE_PIXELS or np.inf):
        return None
    pixels = _decode_jpeg(data, header) if expected == "JPEG" else _decode_png(data)
    if pixels is None or pixels.shape != header.shape or pixels.dtype.name != header.dtype:
        return None
    return StoredImage(pixels, header)


def _plain_png(data: bytes) -> Header | None:
    """The header of a PNG whose chunks are all plain and whole; checksums are looked at."""
    if cv2 is None or not data.startswith(_PNG_SIGNATURE):
        return None
    position, kind = len(_PNG_SIGNATURE), b""
    while position + 12 <= len(data) and kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if (position == 8) != (kind == b"IHDR") or kind not in _PNG_PLAIN or end > len(data):
            return None
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return None
        position = end
    if kind != b"IEND" or position != len(data):
        return None
    width, height, bits, colour, *rest = struct.unpack_from(">IIBBBBB", data, 16)
    if bits not in (8, 16) or colour not in (0, 2) or any(rest):
        return None
    return Header((height, width, 3) if colour == 2 else (height, width), f"uint{bits}", "PNG")


def _plain_jpeg(data: bytes) -> Header | None:
    """The header of a grey or YCbCr JPEG with no other metadata than a JFIF header that tells no resolution."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    position, header, jfif = 2, None, False
    while position + 4 <= len(data):
        mark, kind, size = struct.unpack_from(">BBH", data, position)
        if mark != 0xFF or size < 2:
            return None
        if kind == 0xDA:  # the picture follows
            return header if jfif else None
        if kind in _JPEG_FRAMES and header is None and size >= 8:
            if position + 10 > len(data):
                return None
            bits, height, width, colours = struct.unpack_from(">BHHB", data, position + 4)
            if bits != 8 or colours not in (1, 3) or not height or not width:
                return None
            header = Header((height, width, 3) if colours == 3 else (height, width), "uint8", "JPEG")
        elif kind == 0xE0 and not jfif:
            jfif = data[position + 4 : position + 9] == b"JFIF\0" and data[position + 11 : position + 12] == b"\0"
            if not jfif:
                return None
        elif kind not in _JPEG_PLAIN:
            return None
        position += 2 + size
    return None


def _decode_png(data: bytes) -> np.ndarray | None:
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if found is None or found.ndim == 2:
        return found
    return np.ascontiguousarray(found[..., ::-1])  # OpenCV's colours are BGR


def _decode_jpeg(data: bytes, header: Header) -> np.ndarray | None:
    """The pixels that Pillow would give, or None: without simplejpeg, or at any damage, which Pillow is to judge."""
    if simplejpeg is None:
        return None
    try:
        colour = "GRAY" if len(header.shape) == 2 else "RGB"
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colour, fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels[..., 0] if len(header.shape) == 2 else pixels


def write_image(path: Path, image: StoredImage) -> None:
    """Write ``image`` to ``path`` as `encode_image` has it. Raises OSError if it cannot write."""
    path.write_bytes(encode_image(image))


def encode_image(image: StoredImage) -> bytes:
    """``image`` in its own format. PNG and TIFF keep every pixel; JPEG has quality 95 and full-resolution colour.

    EXIF, colour profile and resolution are written too, other embedded text is not. The same image always gives the
    same bytes.
    """
    if cv2 is not None and image.header.format != "TIFF" and not image.extras:
        stored = image.pixels if image.pixels.ndim == 2 else image.pixels[..., ::-1]  # OpenCV's colours are BGR
        suffix, parameters = _cv2_parameters(image.header.format)
        return bytes(cv2.imencode(suffix, stored, parameters)[1])
    if image.header.format == "PNG" and image.header.dtype == "uint16" and image.pixels.ndim == 3:
        return _encode_rgb16_png(image)
    options = dict(image.extras)
    if image.header.format == "PNG":
        options["compress_level"] = PNG_LEVEL
    if image.header.format == "JPEG":
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, format=image.header.format, **options)
    return buffer.getvalue()


def _cv2_parameters(format: str) -> tuple[str, list[int]]:
    if format == "PNG":
        return ".png", [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL]
    full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return ".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, *full]


def _check(image: Image.Image, path: Path) -> Header:
    """The header of an opened image. Raises InputError, without the file's name, if it breaks a rule."""
    expected = FORMATS[path.suffix.lower()]
    # A JPEG with more than one picture is called MPO by Pillow.
    if getattr(image, "n_frames", 1) != 1:
        raise InputError(f"must hold one picture, got {image.n_frames} (animated or multi-page)")  # type: ignore[attr-defined]
    if image.format != expected:
        raise InputError(f"suffix {path.suffix} must hold {expected}, got {image.format}")
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise InputError(f"must have at most {Image.MAX_IMAGE_PIXELS} pixels, got {image.width}x{image.height}")
    if "transparency" in image.info or image.mode not in ("L", "RGB", "I;16", "I;16B"):
        mode = f"{image.mode} with transparency" if "transparency" in image.info else image.mode
        raise InputError(f"must be 8- or 16-bit grey or RGB, got Pillow mode {mode}")

    bits = 8
    if image.format == "PNG":
        file = image.fp  # type: ignore[attr-defined]
        position = file.tell()  # where Pillow will go on reading
        file.seek(_PNG_BIT_DEPTH_AT)
        bits = file.read(1)[0]
        file.seek(max(0, file.seek(0, os.SEEK_END) - _PNG_TAIL))
        if b"IEND" not in file.read():
            raise InputError("PNG must end with an IEND chunk, got a truncated file")
        file.seek(position)
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = tags.get(_TIFF_BITS, (1,))[0]
        if tags.get(_TIFF_PHOTOMETRIC) == 0:
            raise InputError("TIFF must store black as 0, got photometric interpretation WhiteIsZero")
        if tags.get(_TIFF_ORIENTATION, 1) != 1:
            # Pillow turns a TIFF as it decodes it, and the labels would no longer fit.
            raise InputError(f"TIFF orientation must be 1 (as stored), got {tags[_TIFF_ORIENTATION]}")
        if bits == 16 and image.mode == "RGB":
            raise InputError(
                "16-bit colour must be PNG or an array, got TIFF, of which Pillow reads only the upper 8 bits"
            )
    if bits not in (8, 16):
        raise InputError(f"must have 8 or 16 bits a channel, got {bits}")
    channels = (3,) if image.mode == "RGB" else ()
    return Header((image.height, image.width, *channels), f"uint{bits}", expected)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Put a file's name before every reason not to read it: ours, the operating system's and the decoder's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{printable(path)}: cannot be recognised as PNG, JPEG or TIFF") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{printable(path)}: must have fewer pixels: {error}") from None
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise almost anything (SyntaxError, IndexError, struct.error, ...).
        reason = getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__
        raise InputError(f"{printable(path)}: cannot be decoded: {reason}") from error


def _encode_rgb16_png(image: StoredImage) -> bytes:
    """16-bit RGB as PNG, which Pillow cannot write: one unfiltered, zlib-compressed block of big-endian rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = image.pixels.shape
    rows = image.pixels.astype(">u2").reshape(height, width * 3).view(np.uint8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # each row begins with filter type 0
    parts = [_PNG_SIGNATURE, chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    if profile := image.extras.get("icc_profile"):
        parts.append(chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    if dpi := image.extras.get("dpi"):
        parts.append(chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1)))
    if exif := image.extras.get("exif"):
        parts.append(chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    parts += [chunk(b"IDAT", zlib.compress(filtered.tobytes())), chunk(b"IEND", b"")]
    return b"".join(parts)
