"""Pixels to and from the bytes of PNG, JPEG and TIFF, by whichever program is the fastest that gives the same."""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL
from PIL import Image

from fastsimgan.data.formats.image_metadata import PNG_SIGNATURE
from fastsimgan.data.formats.stored_image import Header

JPEG_QUALITY = 95
PNG_LEVEL = 1  # of zlib: half as slow as the usual 6, and files a tenth larger
_TIFF_BITS = 258


def _optional(name: str) -> Any:
    """A module of [fast], or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# The same pixels as Pillow's, faster. PNG is encoded to other bytes.
simplejpeg = _optional("simplejpeg")
cv2 = _optional("cv2")


def codecs() -> str:
    """The programs that decide about the bytes written, with versions."""
    found = [f"pillow {PIL.__version__}"]
    if simplejpeg is not None:
        found.append(f"simplejpeg {simplejpeg.__version__}")
    if cv2 is not None:
        found.append(f"opencv {cv2.__version__}")
    return ", ".join(found)


def decode_cv2(data: bytes) -> np.ndarray | None:
    """``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]`` (grey with alpha too), or None: without OpenCV, or at any damage."""
    if cv2 is None:
        return None
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if found is None or found.ndim == 2:
        return found
    found = found[..., [2, 1, 0, 3]] if found.shape[2] == 4 else found[..., ::-1]  # OpenCV's colours are BGR
    return np.ascontiguousarray(found)


def decode_jpeg(data: bytes, header: Header) -> np.ndarray | None:
    """The pixels that Pillow would give, or None: without simplejpeg, or at any damage, which Pillow is to judge."""
    if simplejpeg is None:
        return None
    try:
        colour = "GRAY" if len(header.shape) == 2 else "RGB"
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colour, fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels[..., 0] if len(header.shape) == 2 else pixels


def encode_pixels(pixels: np.ndarray, format: str, compression: str) -> bytes:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if cv2 is not None and format in ("PNG", "JPEG") and channels != 2:
        if channels > 1:  # OpenCV's colours are BGR
            pixels = pixels[..., [2, 1, 0, 3]] if channels == 4 else pixels[..., ::-1]
        suffix, parameters = _cv2_parameters(format)
        return bytes(cv2.imencode(suffix, pixels, parameters)[1])
    if pixels.dtype == np.uint16 and channels > 1:
        return _encode_png16(pixels) if format == "PNG" else _encode_tiff16(pixels, compression)
    options: dict[str, Any] = {}
    if format == "PNG":
        options["compress_level"] = PNG_LEVEL
    if format == "JPEG":
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    if format == "TIFF" and compression:
        options["compression"] = compression
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def _cv2_parameters(format: str) -> tuple[str, list[int]]:
    if format == "PNG":
        return ".png", [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL]
    full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return ".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, *full]


def _encode_png16(pixels: np.ndarray) -> bytes:
    """16-bit ``[H, W, 2 to 4]`` as PNG, which Pillow cannot write: one unfiltered, zlib-compressed block of rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, width * channels).view(np.uint8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # each row begins with filter type 0
    colour = {2: 4, 3: 2, 4: 6}[channels]
    parts = [PNG_SIGNATURE, chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    parts += [chunk(b"IDAT", zlib.compress(filtered.tobytes())), chunk(b"IEND", b"")]
    return b"".join(parts)


def _encode_tiff16(pixels: np.ndarray, compression: str) -> bytes:
    """16-bit ``[H, W, 2 to 4]`` as TIFF, which Pillow cannot write: one strip, stored or deflated."""
    height, width, channels = pixels.shape
    raw = pixels.astype("<u2").tobytes()
    strip = raw if compression == "raw" else zlib.compress(raw)
    strip += bytes(len(strip) % 2)
    tags = [(256, 4, width), (257, 4, height), (258, 3, 0), (259, 3, 1 if compression == "raw" else 8)]
    tags += [(262, 3, 2 if channels > 2 else 1), (273, 4, 8), (277, 3, channels), (278, 4, height)]
    tags += [(279, 4, len(strip)), (284, 3, 1)]
    tags += [(338, 3, 2)] if channels in (2, 4) else []
    bits_at = 8 + len(strip)
    table = bits_at + 2 * channels
    body = b"II*\0" + struct.pack("<I", table) + strip + struct.pack(f"<{channels}H", *[16] * channels)
    body += struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        if tag == _TIFF_BITS:
            inline = struct.pack("<2H", 16, 16) if channels == 2 else struct.pack("<I", bits_at)
            body += struct.pack("<HHI", tag, 3, channels) + inline
        else:
            body += struct.pack("<HHII", tag, kind, 1, value)
    return body + bytes(4)
