"""One image file: what it holds, its pixels, and writing such a file again. PNG, JPEG and TIFF, through Pillow.

Pixels come through exactly as stored, grey or RGB, 8 or 16 bits a channel or float32 in [0, 1]; alpha travels beside
them, and so does whatever else the file carries (see `formats.image_metadata`). What is stored in another way but has
one meaning (palettes, 1 to 4 bits, CMYK, YCbCr) is read as the colours that it stands for, and written as these.
Anything else (further bands, signed samples, premultiplied or single transparent colours, animations) is refused by
name. EXIF orientation is ignored, so that a label's (row, column) still points at the same pixel, unless ``upright``
asks for it.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_metadata import (
    PNG_SIGNATURE,
    Carried,
    Scan,
    exif_orientation,
    insert,
    scan_jpeg,
    scan_png,
    scan_tiff,
)
from fastsimgan.data.formats.numpy_file import UNIT, Span, check_images, check_range, out_of_range, read_as
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


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
#: Files of arrays that hold one picture each. They are read as images in a folder that has no other ones.
ARRAY_FORMATS = {".h5": "HDF5", ".hdf5": "HDF5", ".npy": "NPY"}

JPEG_QUALITY = 95
PNG_LEVEL = 1  # of zlib: half as slow as the usual 6, and files a tenth larger
MAX_FILE_BYTES = 1 << 29  # of one encoded image; nothing that has few enough pixels needs more
_READ = ("PNG", "JPEG", "TIFF")
_LOSSLESS_TIFF = {"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"}
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

_CONVERTED = ("P", "PA", "CMYK", "YCbCr")


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


def read_header(path: Path, upright: bool = False, key: str | None = None) -> Header:
    """Read the header alone; the pixels may still turn out to be damaged.

    Args:
        path: the file.
        upright: turn the picture as its EXIF orientation has it.
        key: which array in a file of several is the picture.

    Raises InputError if the file cannot be opened or is not one of the kinds this module reads.
    """
    if path.suffix.lower() in ARRAY_FORMATS:
        return _decode_arrays(read_bytes(path), path, key, None).header
    with _refusing(path), Image.open(path, formats=_READ) as image:
        header = _check(image, path, upright)
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
    with _refusing(path), Image.open(io.BytesIO(data), formats=_READ) as image:
        stored = _check(image, path, True).stored
    return list((carried.without_colours() if stored else carried).lost)


def codecs() -> str:
    """The programs that decide about the bytes written, with versions."""
    found = [f"pillow {PIL.__version__}"]
    if simplejpeg is not None:
        found.append(f"simplejpeg {simplejpeg.__version__}")
    if cv2 is not None:
        found.append(f"opencv {cv2.__version__}")
    return ", ".join(found)


def read_image(path: Path, upright: bool = False, key: str | None = None, span: Span | None = UNIT) -> StoredImage:
    """Decode one file. Raises InputError as `decode_image` does."""
    return decode_image(read_bytes(path), path, upright, key, span)


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


def decode_image(
    data: bytes, path: Path, upright: bool = False, key: str | None = None, span: Span | None = UNIT
) -> StoredImage:
    """Decode a file's bytes; ``path`` gives the suffix and the name for errors, and is not opened.

    Floats must lie in ``span``; None: anywhere. Raises InputError as `read_header` does, and if the pixels are
    truncated or damaged.
    """
    if path.suffix.lower() in ARRAY_FORMATS:
        return _decode_arrays(data, path, key, span)
    scan = _scan(data, path.suffix)
    if (image := _decode_plain(data, path.suffix, scan)) is None:
        image = _decode(data, path, upright, scan, span)
    if upright and image.header.orientation != 1 and image.header.format != "TIFF":
        pixels = _turn(image.pixels, image.header.orientation)
        image = StoredImage(np.ascontiguousarray(pixels), _turned(image.header))
    return image


def _decode(data: bytes, path: Path, upright: bool, scan: Scan | None, span: Span | None) -> StoredImage:
    with _refusing(path), Image.open(io.BytesIO(data), formats=_READ) as image:
        header = _check(image, path, upright)
        tiles = list(image.tile)
        fast = None
        if header.format == "JPEG" and not header.stored:
            fast = _decode_jpeg(data, header)
        elif (header.format == "TIFF" and header.dtype == "uint16" and header.shape[2:]) or _is_la16(header, image):
            fast = _decode_cv2(data)
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
        pixels, alpha = _split(planes, header)
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
        return _stored(pixels, header, carried, alpha)


def _decode_arrays(data: bytes, path: Path, key: str | None, span: Span | None) -> StoredImage:
    """The one picture in a file of arrays."""
    kind = ARRAY_FORMATS[path.suffix.lower()]
    if kind == "HDF5":
        held = HDF5Images(path, key, data, span or (-np.inf, np.inf))
        stored, pixels, key = held.stored_dtype, held.load(), held.key
    else:
        with _refusing(path):
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


def _encode_arrays(image: StoredImage) -> bytes:
    if image.header.format == "HDF5":
        return HDF5Images(Path("picture.h5"), image.carried.key, image.carried.whole).with_picture(image.pixels)
    old = np.load(io.BytesIO(image.carried.whole), allow_pickle=False)
    buffer = io.BytesIO()
    np.save(buffer, image.pixels.astype(old.dtype).reshape(old.shape), allow_pickle=False)
    return buffer.getvalue()


def _scan_of_damaged() -> Scan:
    """For a file that Pillow reads although its structure is odd: nothing of it is carried but the pixels."""
    return Scan(0, 0, 0, 0, Carried(lost=("all but the pixels: the file's structure is damaged",)), False)


def _stored(pixels: np.ndarray, header: Header, carried: Carried, alpha: np.ndarray | None) -> StoredImage:
    hidden = None
    if alpha is not None:
        alpha = np.ascontiguousarray(alpha)
        hidden = pixels[alpha == 0]
    return StoredImage(np.ascontiguousarray(pixels), header, carried, alpha, hidden)


def _split(planes: np.ndarray, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and alpha."""
    if not header.alpha:
        return planes, None
    if planes.ndim != 3 or planes.shape[2] not in (2, 4):
        raise InputError(f"decoded to shape {planes.shape}, its header says {header.shape} with alpha")
    return (planes[..., :3] if len(header.shape) == 3 else planes[..., 0]), planes[..., -1]


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
        if cv2 is None or scan.bits not in (8, 16) or scan.colour not in (0, 2, 4, 6):
            return None
        colour, alpha = scan.colour & 2, bool(scan.colour & 4)
    else:
        if simplejpeg is None or scan.colour not in (1, 3):
            return None
        colour, alpha = scan.colour == 3, False
    shape = (scan.height, scan.width, 3) if colour else (scan.height, scan.width)
    header = Header(shape, f"uint{scan.bits}", expected, alpha, orientation=scan.carried.orientation)
    planes = _decode_jpeg(data, header) if expected == "JPEG" else _decode_cv2(data)
    if planes is None or planes.dtype.name != header.dtype or (alpha and planes.shape != (*shape[:2], 4)):
        return None
    pixels, aside = _split(planes, header)
    return _stored(pixels, header, scan.carried, aside) if pixels.shape == shape else None


def _decode_cv2(data: bytes) -> np.ndarray | None:
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

    Alpha, the hidden pixels and what the file carried are written as they were read. The same image always gives the
    same bytes.
    """
    if image.carried.whole:
        return _encode_arrays(image)
    pixels, format = image.pixels, image.header.format
    if image.alpha is not None:
        assert image.hidden is not None
        if len(image.hidden):
            pixels = pixels.copy()
            pixels[image.alpha == 0] = image.hidden
        pixels = np.dstack([pixels, image.alpha])
    return insert(format, _encode(pixels, format, image.carried.compression), image.carried)


def _encode(pixels: np.ndarray, format: str, compression: str) -> bytes:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if cv2 is not None and format != "TIFF" and channels != 2:
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


def _check(image: Image.Image, path: Path, upright: bool) -> Header:
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


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Put a file's name before every reason not to read it: ours, the operating system's and the decoder's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{printable(path)}: cannot be recognised as PNG, JPEG or TIFF{_something_else(path)}"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{printable(path)}: must have fewer pixels: {error}") from None
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise almost anything (SyntaxError, IndexError, struct.error, ...).
        reason = getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__
        raise InputError(f"{printable(path)}: cannot be decoded: {reason}") from error


_OTHERS = {
    b"RIFF": "WebP", b"GIF8": "GIF", b"BM": "BMP", b"\0\0\0": "HEIC or AVIF", b"<": "an HTML, XML or SVG page",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull fetches it", b"\x89HDF": "HDF5", b"PK": "a zip",
    b"\0\5\x16\7": "a resource fork of macOS", b"8BPS": "Photoshop",
}  # fmt: skip


def _something_else(path: Path) -> str:
    """What the file seems to be instead, in brackets; "" where that cannot be told."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:  # a member of a shard
        return ""
    found = (
        "an empty file" if not start else next((kind for mark, kind in _OTHERS.items() if start.startswith(mark)), "")
    )
    return f" ({found})" if found else ""


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
