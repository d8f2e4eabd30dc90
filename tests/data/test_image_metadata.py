"""What an image file carries beside its pixels comes through byte for byte, or is said to be lost; alpha too."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Invert
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from fastsimgan.data.formats.image_file import decode_image, encode_image, lost_of, read_image
from fastsimgan.data.formats.image_metadata import scan_jpeg, scan_png, scan_tiff
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 11), dtype=np.uint8)
RGB = RNG.integers(0, 256, (9, 11, 3), dtype=np.uint8)
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF/></x:xmpmeta>"
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int = 1) -> Image.Exif:
    found = Image.Exif()
    found[274] = orientation
    found[270] = "pose 1 2 3"
    found[0x8825] = {2: (47.0, 3.0, 11.5)}  # GPS latitude
    found[0x8769] = {33434: 0.004}  # exposure time, in the EXIF table
    return found


def encode(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 8
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        found.append((kind, data[position : position + 12 + size]))
        position += 12 + size
    return found


def segments(data: bytes) -> list[bytes]:
    found, position = [], 2
    while data[position + 1] != 0xDA:
        size = struct.unpack_from(">H", data, position + 2)[0]
        found.append(data[position : position + 2 + size])
        position += 2 + size
    return [segment for segment in found if segment[1] >= 0xE0]


def again(data: bytes, name: str, tmp_path: Path) -> bytes:
    """The file after every pixel has been changed."""
    image = decode_image(data, Path(name))
    white = 1 if image.pixels.dtype == np.float32 else np.iinfo(image.pixels.dtype).max
    image.pixels[...] = white - image.pixels
    (tmp_path / name).write_bytes(encode_image(image))
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "pixels", [GREY, RGB, GREY.astype(np.uint16) * 200, np.dstack([RGB, GREY]), np.dstack([GREY] * 2)]
)
@pytest.mark.parametrize("fast", [True, False])
def test_png_chunks(pixels: np.ndarray, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr("fastsimgan.data.formats.image_codecs.cv2", None)
    info = PngImagePlugin.PngInfo()
    info.add_text("pose", "1 2 3")
    info.add_text("zipped", "x" * 500, zip=True)
    info.add_itxt("XML:com.adobe.xmp", XMP.decode(), "en", "")
    for kind, body in (
        (b"gAMA", struct.pack(">I", 45455)),
        (b"tIME", bytes((7, 233, 1, 2, 3, 4, 5))),
        (b"prVt", b"mine"),
    ):
        info.add(kind, body)
    info.add(b"teXt", b"after", True)
    data = encode(pixels, "PNG", pnginfo=info, dpi=(300, 300), icc_profile=ICC, exif=exif())
    old, new = (
        [part for part in chunks(each) if part[0] not in (b"IHDR", b"IDAT", b"IEND")]
        for each in (data, again(data, "a.png", tmp_path))
    )
    assert old == new and len(old) >= 9
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.text["pose"] == "1 2 3"  # type: ignore[attr-defined]
        assert image.getexif().get_ifd(0x8825)[2] == (47.0, 3.0, 11.5)


@pytest.mark.parametrize("pixels", [GREY, RGB])
@pytest.mark.parametrize("fast", [True, False])
def test_jpeg_segments(pixels: np.ndarray, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr("fastsimgan.data.formats.image_codecs.cv2", None)
        monkeypatch.setattr("fastsimgan.data.formats.image_codecs.simplejpeg", None)
    options = {"comment": b"pose 1 2 3", "xmp": XMP, "icc_profile": ICC * 200, "dpi": (90, 90), "exif": exif(6)}
    data = encode(pixels, "JPEG", **options)
    old, new = segments(data), segments(again(data, "a.jpg", tmp_path))
    assert old == new and len(old) >= 6  # a profile of several segments among them
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.info["comment"] == b"pose 1 2 3" and image.info["xmp"] == XMP
        assert image.getexif()[274] == 6 and image.size == (11, 9)


TAGS = {
    33550: (12, (0.5, 0.5, 0.0)),  # GeoTIFF
    33922: (12, (0.0, 0, 0, 440720.0, 3751320.0, 0)),
    34735: (3, (1, 1, 0, 1, 3072, 0)),
    34737: (2, "WGS 84|"),
    42113: (2, "-9999"),
    50838: (4, (12, 28)),  # ImageJ
    50839: (7, b"IJIJ" + bytes(8)),
    65000: (7, b"own"),
    270: (2, "ImageJ=1.53\nspacing=0.25"),
    700: (1, XMP),
    305: (2, "renderer"),
}


@pytest.mark.parametrize("pixels", [GREY, RGB, GREY.astype(np.uint16) * 200, GREY.astype(np.float32) / 255,
                                    np.dstack([RGB, GREY])])  # fmt: skip
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_tags(pixels: np.ndarray, order: str, tmp_path: Path) -> None:
    ifd = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    for tag, (kind, value) in TAGS.items():
        ifd.tagtype[tag] = kind
        ifd[tag] = value
    data = encode(pixels, "TIFF", tiffinfo=ifd, dpi=(300, 300), icc_profile=ICC)
    if order == ">":  # Pillow writes its own order: turn one by hand
        data = big_endian(data)
    written = again(data, "a.tif", tmp_path)
    one, other = scan_tiff(data), scan_tiff(written)
    assert one.tags == other.tags and {tag[0] for tag in one.tags} >= set(TAGS) | {34675, 282, 283}
    with Image.open(tmp_path / "a.tif") as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
        assert tags[33550] == (0.5, 0.5, 0.0) and tags[34737] == "WGS 84|" and tags[270].startswith("ImageJ=1.53")
        assert image.info["icc_profile"] == ICC


def big_endian(data: bytes) -> bytes:
    """A TIFF of bytes, one strip, in the other order; 16-bit pixels are turned too."""
    at = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, at)[0]
    body = bytearray(data)
    body[:8] = b"MM\0*" + struct.pack(">I", at)
    body[at : at + 2] = struct.pack(">H", count)
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 11: 4, 12: 8}
    bits = strip = length = 0
    for i in range(count):
        position = at + 2 + 12 * i
        tag, kind, number, value = struct.unpack_from("<HHII", data, position)
        struct.pack_into(">HHI", body, position, tag, kind, number)
        unit = {5: 4}.get(kind, sizes[kind])
        size = sizes[kind] * number
        place = position + 8 if size <= 4 else value
        if size > 4:
            struct.pack_into(">I", body, position + 8, value)
        for j in range(place, place + size, unit):
            body[j : j + unit] = data[j : j + unit][::-1]
        if tag == 258:
            bits = struct.unpack_from("<H", data, place)[0]
        strip, length = (value if tag == 273 else strip), (value if tag == 279 else length)
    if bits > 8:
        for j in range(strip, strip + length, bits // 8):
            body[j : j + bits // 8] = data[j : j + bits // 8][::-1]
    return bytes(body)


def test_exif_tables_in_a_tiff(tmp_path: Path) -> None:
    data = encode(GREY, "TIFF", exif=exif().tobytes())
    again(data, "a.tif", tmp_path)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.getexif().get_ifd(0x8825)[2] == (47.0, 3.0, 11.5)
        assert image.getexif().get_ifd(0x8769)[33434] == pytest.approx(0.004)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
def test_alpha_is_kept_and_hidden_pixels_are_left_alone(
    suffix: str, depth: int, channels: int, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    dtype = np.uint8 if depth == 8 else np.uint16
    colours = RNG.integers(0, 2**depth, (9, 11, channels)).astype(dtype)
    alpha = RNG.integers(0, 2**depth, (9, 11)).astype(dtype)
    alpha[:4], alpha[4:6] = 0, 2**depth - 1
    if depth == 8:
        data = encode(np.dstack([colours, alpha]), suffix.replace("tif", "tiff"))
    elif channels == 3 and suffix == "png":
        data = cv2.imencode(f".{suffix}", np.dstack([colours[..., ::-1], alpha]))[1].tobytes()
    elif suffix == "png":
        data = grey_alpha_16(colours[..., 0], alpha)
    else:
        pytest.skip("nothing here writes 16-bit TIFF with alpha, and says so in it")
    if not fast:
        if depth == 16 and (suffix == "tif" or channels == 1):
            pytest.skip("needs opencv to be read")
        monkeypatch.setattr("fastsimgan.data.formats.image_codecs.cv2", None)
    (tmp_path / f"a.{suffix}").write_bytes(data)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.header.alpha and image.pixels.dtype == dtype
    assert np.array_equal(image.pixels.reshape(colours.shape), colours) and np.array_equal(image.alpha, alpha)
    image.pixels[...] = 2**depth - 1 - image.pixels
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"a.{suffix}").write_bytes(encode_image(image))
    new = read_image(tmp_path / "new" / f"a.{suffix}")
    assert new.header == image.header and np.array_equal(new.alpha, alpha)
    expected = np.where(alpha[..., None] == 0, colours, 2**depth - 1 - colours)
    assert np.array_equal(new.pixels.reshape(colours.shape), expected)


def grey_alpha_16(grey: np.ndarray, alpha: np.ndarray) -> bytes:
    both = np.dstack([grey, alpha]).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in both)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate"])
def test_16_bit_colour_tiff(compression: str, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    colours = RNG.integers(0, 65536, (9, 11, 3)).astype(np.uint16)
    codes = {"raw": 1, "tiff_adobe_deflate": 8}
    data = cv2.imencode(".tif", colours[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, codes[compression]])[1].tobytes()
    (tmp_path / "a.tif").write_bytes(data)
    image = read_image(tmp_path / "a.tif")
    assert np.array_equal(image.pixels, colours)
    image.pixels[...] = 65535 - image.pixels
    (tmp_path / "b.tif").write_bytes(encode_image(image))
    assert np.array_equal(read_image(tmp_path / "b.tif").pixels, 65535 - colours)
    with Image.open(tmp_path / "b.tif") as new:
        assert new.info["compression"] == compression


def test_float_tiff(tmp_path: Path) -> None:
    depth = RNG.random((9, 11)).astype(np.float32)
    (tmp_path / "a.tif").write_bytes(encode(depth, "TIFF"))
    image = read_image(tmp_path / "a.tif")
    assert image.pixels.dtype == np.float32 and np.array_equal(image.pixels, depth)
    (tmp_path / "b.tif").write_bytes(encode_image(image))
    assert np.array_equal(read_image(tmp_path / "b.tif").pixels, depth)


def test_other_ways_to_store_colours_are_read_as_the_colours(tmp_path: Path) -> None:
    kinds: dict[str, tuple[Image.Image, str]] = {
        "palette.png": (Image.fromarray(RGB).quantize(64), "RGB"),
        "clear palette.png": (Image.fromarray(np.dstack([RGB, GREY])).quantize(64), "RGBA"),
        "inks.jpg": (Image.fromarray(RGB).convert("CMYK"), "RGB"),
        "bilevel.png": (Image.fromarray(GREY > 128), "L"),
        "video.tif": (Image.fromarray(RGB).convert("YCbCr"), "RGB"),
    }
    for name, (image, mode) in kinds.items():
        (tmp_path / name).write_bytes(encode(image, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], "PNG")))
        found = read_image(tmp_path / name)
        with Image.open(tmp_path / name) as stored:
            expected = np.asarray(stored.convert(mode))
        got = found.pixels if found.alpha is None else np.dstack([found.pixels, found.alpha])
        assert np.array_equal(got, expected), name
        assert found.header.stored and "from" in str(found.header)
        (tmp_path / f"new {name}").write_bytes(encode_image(found))
        if name[-3:] != "jpg":
            new = read_image(tmp_path / f"new {name}")
            assert np.array_equal(new.pixels, found.pixels) and not new.header.stored


def mpo() -> bytes:
    return encode(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.new("RGB", (5, 4))], exif=exif())


def test_what_does_not_travel_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(mpo())
    png = encode(RGB, "PNG")
    (tmp_path / "in" / "2.png").write_bytes(png[:33] + chunk(b"vpAG", bytes(9)) + png[33:])  # unsafe to copy
    (tmp_path / "in" / "3.png").write_bytes(png + b"a film")
    (tmp_path / "in" / "4.jpg").write_bytes(encode(RGB, "JPEG") + b"motion photo" * 9)
    (tmp_path / "in" / "5.tif").write_bytes(encode(RGB, "TIFF", tiffinfo={280: 3}))
    profile = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", icc_profile=ICC)
    (tmp_path / "in" / "6.jpg").write_bytes(profile)
    (tmp_path / "model").write_bytes(b"weights")
    job = Job(tmp_path / "model", tmp_path / "in", tmp_path / "out")
    source = open_session(job).source
    told = source.describe().partition("; not kept in the output, ")[2]
    for what in ("pictures behind the first (1)", "PNG chunk vpAG (1)", "bytes behind the picture (2)",
                 "MinSampleValue (1)", "colour profile (1)"):  # fmt: skip
        assert what in told, what
    refine(job, loader=lambda *_: Invert(3))
    for name in ("1.jpg", "2.png", "3.png", "4.jpg", "5.tif", "6.jpg"):
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert getattr(image, "n_frames", 1) == 1
        assert lost_of(tmp_path / "out" / name) == []
    with Image.open(tmp_path / "out" / "6.jpg") as image:
        assert image.mode == "RGB" and "icc_profile" not in image.info


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_damaged_structure_is_never_a_crash(kind: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("pose", "1 2 3")
    options = {
        "PNG": {"pnginfo": info, "exif": exif()},
        "JPEG": {"exif": exif(), "comment": b"x"},
        "TIFF": {"exif": exif().tobytes()},
    }
    data = encode(RGB, kind, **options[kind])
    rng = np.random.default_rng(1)
    for _ in range(3000):
        hurt = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            hurt[rng.integers(min(len(hurt), 600))] = rng.integers(256)
        cut = bytes(hurt[: rng.integers(0, len(hurt) + 1)] if rng.random() < 0.3 else hurt)
        scan_png(cut), scan_jpeg(cut), scan_tiff(cut)
