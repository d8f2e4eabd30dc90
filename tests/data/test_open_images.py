"""Readers of folders and array files: what is read is what is stored, and everything else is refused in one line."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from properties import given, st

from fastsimgan.data.formats.image_file import _decode_plain, decode_image, encode_image, read_image
from fastsimgan.data.formats.image_folder import FolderImages
from fastsimgan.data.formats.image_metadata import scan_png
from fastsimgan.data.formats.listing import list_units
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.formats.stored_image import Header, StoredImage
from fastsimgan.data.pixel_values import from_float, to_float
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.hardware.threads import in_threads
from fastsimgan.storage.names import natural_key

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
RGB8 = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
RGB16 = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"


def png_bytes(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, for the kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rgb16_png(pixels: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png_bytes(pixels.shape[1], pixels.shape[0], 16, 2, rows)


def tiff16(pixels: np.ndarray) -> bytes:
    """A big-endian TIFF of 16 bits, grey or RGB, by hand."""
    height, width = pixels.shape[:2]
    samples = pixels.size // (height * width)
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1 if samples == 1 else 2}  # size, bits, raw, photometric
    tags |= {273: 8, 277: samples, 278: height, 279: pixels.nbytes}  # one strip
    table = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    offset = struct.pack(">I", 8 + pixels.nbytes)
    return b"MM\0*" + offset + pixels.astype(">u2").tobytes() + struct.pack(">H", len(tags)) + table + bytes(4)


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


# --- values


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_integer_value_comes_back_and_the_range_is_minus_one_to_one(kind: str, as_tensor: bool) -> None:
    every = np.arange(np.iinfo(kind).max + 1).astype(kind).reshape(2, 1, -1)
    stored = torch.from_numpy(every) if as_tensor else every
    floats = to_float(stored)
    assert tuple(floats.shape) == (2, 1, 1, every.shape[2])
    assert str(floats.dtype).endswith("float32")
    assert (floats.min(), floats.max()) == (-1, 1)
    back = np.asarray(from_float(floats, stored.dtype))
    assert back.dtype == every.dtype
    assert np.array_equal(back.reshape(every.shape), every)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_white_never_wraps_to_black(make: Callable) -> None:
    beyond = make([[[[-7.0, -1.0001, -1.0, 0.999, 1.0, 1.0001, 300.0]]]])
    assert np.asarray(from_float(beyond, "uint8")).ravel().tolist() == [0, 0, 0, 255, 255, 255, 255]
    assert np.asarray(from_float(beyond, "uint16")).ravel().tolist() == [0, 0, 0, 65502, 65535, 65535, 65535]
    assert np.asarray(from_float(beyond, "float32")).ravel()[[0, 2, 4, 6]].tolist() == [0, 0, 1, 1]


def test_rounds_to_the_nearest_level() -> None:
    levels = np.array([99.4, 99.6, 100.4], np.float32).reshape(1, 1, 1, 3) / 127.5 - 1
    assert from_float(levels, np.uint8).ravel().tolist() == [99, 100, 100]


def test_height_and_width_keep_their_places() -> None:
    images = np.zeros((2, 35, 55, 3), np.uint8)
    images[1, 34, 50, 2] = 255
    floats = to_float(images)
    assert floats.shape == (2, 3, 35, 55)
    assert np.argwhere(floats == 1).tolist() == [[1, 2, 34, 50]]
    assert np.array_equal(from_float(floats, "uint8"), images)
    assert to_float(torch.zeros(2, 3, 35, 55, dtype=torch.uint8)).shape == (2, 3, 35, 55)


def test_arrays_and_tensors_agree() -> None:
    floats = RNG.uniform(-1.1, 1.1, (2, 1, 9, 11)).astype(np.float32)
    for kind in ("uint8", "uint16", "float32"):
        tensor = from_float(torch.from_numpy(floats), getattr(torch, kind))
        assert np.array_equal(from_float(floats, kind), tensor[:, 0].numpy())


def test_values_refuse_other_types_and_shapes() -> None:
    with pytest.raises(TypeError, match=r"uint8, uint16, float32, got float64"):
        to_float(np.zeros((1, 2, 2)))
    with pytest.raises(TypeError, match="got int64"):
        from_float(np.zeros((1, 1, 2, 2)), "int64")
    with pytest.raises(ValueError, match=r"3 or 4 dimensions, got shape \(2, 2\)"):
        to_float(np.zeros((2, 2), np.uint8))


# --- files


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)))
def test_natural_order_is_total_and_the_same_from_any_start(names: list[str]) -> None:
    paths = [Path(name) for name in set(names)]
    ordered = sorted(paths, key=natural_key)
    assert sorted(reversed(ordered), key=natural_key) == ordered


def test_threads_keep_the_order_and_the_bound() -> None:
    taken = []
    results = in_threads(lambda item: item * 2, (taken.append(item) or item for item in range(100)), ahead=5)
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == list(range(2, 200, 2))


# --- images

KINDS = {
    "g8.png": (GREY8, encode(GREY8, "PNG")),
    "g16.png": (GREY16, encode(GREY16, "PNG")),
    "c8.png": (RGB8, encode(RGB8, "PNG")),
    "c16.png": (RGB16, rgb16_png(RGB16)),
    "g8.tif": (GREY8, encode(GREY8, "TIFF")),
    "lzw.tiff": (RGB8, encode(RGB8, "TIFF", compression="tiff_lzw")),
    "g16.TIF": (GREY16, encode(GREY16, "TIFF")),
    "g8.jpg": (None, encode(GREY8, "JPEG")),
    "c8.JPEG": (None, encode(RGB8, "JPEG")),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_read_as_stored_and_written_as_the_same_kind(name: str, tmp_path: Path) -> None:
    pixels, content = KINDS[name]
    (tmp_path / name).write_bytes(content)
    image = read_image(tmp_path / name)
    if pixels is not None:
        assert image.pixels.dtype == pixels.dtype
        assert np.array_equal(image.pixels, pixels)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / name).write_bytes(encode_image(image))
    again = read_image(tmp_path / "again" / name)
    assert again.header == image.header
    assert again.carried.compression == image.carried.compression
    if image.header.format == "JPEG":
        assert np.abs(again.pixels.astype(int) - image.pixels).mean() < 5
    else:
        assert np.array_equal(again.pixels, image.pixels)


def test_big_endian_tiff(tmp_path: Path) -> None:
    (tmp_path / "big.tif").write_bytes(tiff16(GREY16))
    image = read_image(tmp_path / "big.tif")
    assert image.pixels.dtype == np.uint16
    assert np.array_equal(image.pixels, GREY16)


def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsimgan.data.formats.image_codecs.simplejpeg", None)
    monkeypatch.setattr("fastsimgan.data.formats.image_codecs.cv2", None)


PLAIN = [
    ("PNG", {}), ("PNG", {"compress_level": 9}), ("JPEG", {"quality": 75}), ("JPEG", {"comment": b"by hand"}),
    ("JPEG", {"quality": 95, "subsampling": 0}), ("JPEG", {"progressive": True}),
]  # fmt: skip
SPECIAL = [("PNG", {"dpi": (72, 72)}), ("JPEG", {"dpi": (90, 90)}), ("JPEG", {"exif": EXIF}), ("PNG", {"exif": EXIF})]


FAST = [(pixels, *case) for case in PLAIN + SPECIAL for pixels in (GREY8, RGB8)]
FAST += [(GREY16, "PNG", {}), (RGB16, "PNG", {})]


@pytest.mark.parametrize(("pixels", "kind", "options"), FAST)
def test_fast_codecs_change_no_pixel(
    pixels: np.ndarray, kind: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    pytest.importorskip("cv2", reason="opencv is not installed")
    path = tmp_path / f"a.{kind.lower()}"
    if pixels.dtype == np.uint16:
        path.write_bytes(encode_image(StoredImage(pixels, Header(pixels.shape, "uint16", "PNG"))))
    else:
        path.write_bytes(encode(pixels, kind, **options))
    data = path.read_bytes()
    plain = _decode_plain(data, path.suffix)
    assert plain is not None
    fast = read_image(path)
    again = encode_image(fast)
    pillow_alone(monkeypatch)
    slow = read_image(path)
    assert np.array_equal(slow.pixels, fast.pixels)
    assert (slow.header, slow.carried, slow.pixels.dtype) == (fast.header, fast.carried, fast.pixels.dtype)
    if kind == "PNG":
        assert np.array_equal(decode_image(again, path).pixels, slow.pixels)
    else:
        assert again == encode_image(slow)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_fast_codecs_judge_damage_as_pillow_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / f"a.{kind.lower()}"

    def found(data: bytes) -> object:
        try:
            image = decode_image(data, path)
        except InputError as error:
            return str(error)
        return image.header, image.carried, image.pixels.tobytes()

    for number in range(300):
        data = bytearray(encode(GREY8 if number % 2 else RGB8, kind))
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        if number % 3 == 0:
            del data[rng.integers(len(data)) :]
        if kind == "PNG" and number % 5:
            data = bytearray(mend_checksums(bytes(data)))
        fast = found(bytes(data))
        with monkeypatch.context() as patch:
            pillow_alone(patch)
            assert found(bytes(data)) == fast, number
    capfd.readouterr()  # libpng's own complaints


def mend_checksums(data: bytes) -> bytes:
    """A PNG's chunks with the checksums that their bytes have."""
    position, mended = 8, bytearray(data)
    while position + 12 <= len(data):
        end = position + 12 + struct.unpack_from(">I", data, position)[0]
        if end > len(data):
            break
        struct.pack_into(">I", mended, end - 4, zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return bytes(mended)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_ignored_and_kept(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a viewer would turn it by 90 degrees
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(encode(GREY8, kind, exif=exif))
    image = read_image(path)
    assert image.pixels.shape == GREY8.shape
    (tmp_path / f"again.{kind.lower()}").write_bytes(encode_image(image))
    with Image.open(tmp_path / f"again.{kind.lower()}") as again:
        assert again.size == (7, 5)
        assert again.getexif()[274] == 6


def test_colour_profile_resolution_and_exif_survive_in_16_bit_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    (tmp_path / "c.png").write_bytes(rgb16_png(RGB16))
    image = read_image(tmp_path / "c.png")
    dressed = encode(RGB8, "PNG", exif=exif.tobytes(), icc_profile=b"profile" * 9, dpi=(300.0, 300.0))
    (tmp_path / "d.png").write_bytes(encode_image(replace(image, carried=scan_png(dressed).carried)))
    with Image.open(tmp_path / "d.png") as again:
        again.load()
        assert again.info["icc_profile"] == b"profile" * 9
        assert again.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert again.getexif()[274] == 3


def animated() -> bytes:
    frames = [Image.fromarray(GREY8), Image.fromarray(255 - GREY8)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def pages() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY8).save(buffer, "TIFF", save_all=True, append_images=[Image.fromarray(GREY8)])
    return buffer.getvalue()


def mode(name: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(name, (7, 5)).save(buffer, kind, **options)
    return buffer.getvalue()


def bands(pixels: np.ndarray, extra: int) -> bytes:
    """An 8-bit TIFF of further samples by hand; ``extra`` says what they are (0: unknown, 1: premultiplied alpha)."""
    height, width, samples = pixels.shape
    colours = 3 if samples > 3 else 1
    bits_at = 8 + pixels.size + pixels.size % 2
    bits = struct.pack(f"<{samples}H", *[8] * samples)
    tags = [(256, width), (257, height), (258, 0), (259, 1), (262, 2 if colours == 3 else 1), (273, 8), (277, samples)]
    tags += [(278, height), (279, pixels.size), (338, extra)]
    table = struct.pack("<H", len(tags))
    for tag, value in tags:
        if tag == 258:
            table += struct.pack("<HHI", tag, 3, samples) + (bits if samples == 2 else struct.pack("<I", bits_at))
        else:
            table += struct.pack("<HHII", tag, 3, 1, value)
    body = pixels.tobytes() + bytes(pixels.size % 2) + bits
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + table + bytes(4)


def signed16() -> bytes:
    """A signed 16-bit TIFF: its tag says so, and Pillow's mode may not."""
    data = tiff16(GREY16)
    count = struct.unpack_from(">H", data, struct.unpack_from(">I", data, 4)[0])[0]
    at = struct.unpack_from(">I", data, 4)[0]
    more = struct.pack(">HHIHH", 339, 3, 1, 2, 0)
    return data[:at] + struct.pack(">H", count + 1) + data[at + 2 : -4] + more + bytes(4)


LARGE = RNG.integers(0, 256, (64, 64), dtype=np.uint8)  # noise, so that cutting it loses pixels
PLAIN = "must be grey, RGB or a palette, with alpha or without, got Pillow mode "
BAD_IMAGES = {
    "empty.png": (b"", "cannot be recognised as PNG, JPEG or TIFF"),
    "text.jpg": (b"this is no image", "cannot be recognised as PNG, JPEG or TIFF"),
    "gif.png": (mode("L", "GIF"), "cannot be recognised as PNG, JPEG or TIFF"),
    "wrong.png": (encode(GREY8, "JPEG"), "suffix .png must hold PNG, got JPEG"),
    "wrong.tif": (encode(GREY8, "PNG"), "suffix .tif must hold TIFF, got PNG"),
    "cut.png": (encode(LARGE, "PNG")[:2000], "PNG must end with an IEND chunk, got a truncated file"),
    "nearly.png": (encode(LARGE, "PNG")[:-9], "PNG must end with an IEND chunk, got a truncated file"),
    "hole.png": (encode(LARGE, "PNG")[:2000] + encode(LARGE, "PNG")[2100:], "cannot be decoded: "),
    "cut.jpg": (encode(LARGE, "JPEG")[:1500], "cannot be decoded: image file is truncated"),
    "cut.tif": (encode(LARGE, "TIFF")[:2000], "cannot be decoded: image file is truncated"),
    "flipped.png": (encode(LARGE, "PNG").replace(b"IDAT", b"IDAX"), "cannot be recognised as PNG, JPEG or TIFF"),
    "bomb.png": (png_bytes(40000, 40000, 8, 0, b"\0"), "must have fewer pixels: "),
    "large.png": (png_bytes(13400, 13400, 8, 0, b"\0"), "must have fewer pixels: "),
    "key.png": (
        mode("L", "PNG", transparency=0),
        "must hold transparency as alpha, got one transparent colour among L ones",
    ),
    "lab.tif": (mode("LAB", "TIFF"), f"{PLAIN}LAB"),
    "premultiplied.tif": (
        bands(np.dstack([RGB8, GREY8]), 1),
        "must have 1 or 3 samples a pixel, or alpha beside them, got 4 (premultiplied alpha)",
    ),
    "infrared.tif": (
        bands(np.dstack([RGB8, GREY8]), 0),
        "must have 1 or 3 samples a pixel, or alpha beside them, got 4",
    ),
    "two bands.tif": (
        bands(np.dstack([GREY8, GREY8]), 0),
        "must have 1 or 3 samples a pixel, or alpha beside them, got 2",
    ),
    "signed.tif": (encode(GREY8, "TIFF", tiffinfo={339: 2}), "must hold unsigned samples of 8 or 16 bits, or float32"),
    "signed16.tif": (signed16(), "must hold unsigned samples of 8 or 16 bits, or float32, got signed ones of 16 bits"),
    "floats beyond.tif": (
        encode(np.full((5, 7), 1.5, np.float32), "TIFF"),
        "float images must be in [0, 1], got 1.5",
    ),
    "inverted.tif": (
        encode(GREY8, "TIFF", tiffinfo={262: 0}),
        "TIFF must store black as 0, got photometric interpretation WhiteIsZero",
    ),
    "turned.tif": (encode(GREY8, "TIFF", tiffinfo={274: 6}), "TIFF orientation must be 1 (as stored), got 6"),
    "animated.png": (animated(), "must hold one picture, got 2 (animated or multi-page)"),
    "pages.tif": (pages(), "must hold one picture, got 2 (animated or multi-page)"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, reason = BAD_IMAGES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("seed", range(30))
def test_damaged_bytes_are_an_input_error_or_an_image(kind: str, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(encode(RGB8, kind))
    for _ in range(rng.integers(1, 8)):
        content[rng.integers(len(content))] = rng.integers(256)
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(content[: rng.integers(1, len(content) + 1)])
    try:
        image = read_image(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert image.pixels.dtype in (np.uint8, np.uint16, np.float32)


# --- folders


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def owners(folder: Path) -> dict[str, str | None]:
    """Which image each other file belongs to."""
    return {other: unit.image for unit in list_units(folder) for other in unit.others}


def test_folder_is_a_tree_in_natural_order(tmp_path: Path) -> None:
    numbered = {
        f"s{i}/{j}.png": encode(np.full((3, 4), 10 * i + j, np.uint8), "PNG") for i in (1, 10, 2) for j in (9, 11)
    }
    source = open_images(
        fill(tmp_path, {**numbered, "s1/9.json": b"{}", "s1/11.pose.txt": b"", "readme.txt": b"hello"})
    )
    assert isinstance(source, FolderImages)
    names = ["s1/9.png", "s1/11.png", "s2/9.png", "s2/11.png", "s10/9.png", "s10/11.png"]
    assert [str(name) for name in source.images] == names
    assert [str(name) for name in source.others] == ["readme.txt", "s1/9.json", "s1/11.pose.txt"]
    assert owners(tmp_path) == {"readme.txt": None, "s1/9.json": "s1/9.png", "s1/11.pose.txt": "s1/11.png"}
    assert (len(source), source.shape, source.dtype, source.bit_depth) == (6, (1, 3, 4), np.uint8, 8)
    assert source.load()[:, 0, 0].tolist() == [19, 21, 29, 31, 109, 111]
    assert source.labels() == {}
    assert source.describe() == f"{tmp_path}: 6 images, 3x4 8-bit grey PNG, 3 other files"


def test_the_image_whose_stem_begins_a_name_owns_it(tmp_path: Path) -> None:
    folder = fill(tmp_path, {"a.png": b"", "a.b.png": b"", "a.b.json": b"", "a.c.json": b"", ".x": b""})
    assert owners(folder) == {"a.b.png": "a.png", "a.b.json": "a.png", "a.c.json": "a.png", ".x": None}


@pytest.mark.parametrize("name", ["g16.png", "c8.png", "c16.png"])
def test_folder_loads_the_stored_type(name: str, tmp_path: Path) -> None:
    pixels, content = KINDS[name]
    images = open_images(fill(tmp_path, {name: content})).load()
    assert images.dtype == pixels.dtype
    assert np.array_equal(images, pixels[None])


@pytest.mark.parametrize("name", [b"with space.png", b"new\nline.png", b"not \xff utf-8.png"])
def test_any_file_name(name: bytes, tmp_path: Path) -> None:
    fill(tmp_path, {os.fsdecode(name): encode(GREY8, "PNG")})
    source = open_images(tmp_path)
    assert os.fsencode(source.images[0]) == name  # type: ignore[union-attr]
    assert np.array_equal(source.load()[0], GREY8)
    assert "\n" not in source.describe()


def test_mixed_folder_is_described_and_names_the_first_two_that_differ(tmp_path: Path) -> None:
    wide = encode(GREY8.T.copy(), "PNG")
    source = open_images(fill(tmp_path, {"1.png": KINDS["g8.png"][1], "2.png": KINDS["g8.png"][1], "3.png": wide}))
    assert source.shape is None
    assert source.describe() == f"{tmp_path}: 3 images, 2 5x7 8-bit grey PNG, 1 7x5 8-bit grey PNG, 0 other files"
    message = (
        f"{tmp_path}: images must be of one size and kind, 1.png is 5x7 8-bit grey and 3.png is 7x5 8-bit grey"
        + ("; bring them to one size first")
    )
    with pytest.raises(InputError) as caught:
        source.load()
    assert str(caught.value) == message


def test_mixed_depth(tmp_path: Path) -> None:
    source = open_images(fill(tmp_path, {"1.png": KINDS["g8.png"][1], "2.png": KINDS["g16.png"][1]}))
    assert (source.shape, source.dtype, source.bit_depth) == ((1, 5, 7), None, None)
    with pytest.raises(InputError, match="1.png is 5x7 8-bit grey and 2.png is 5x7 16-bit grey"):
        source.load()


def test_bad_files_are_described_by_name_and_reason(tmp_path: Path) -> None:
    source = open_images(fill(tmp_path, {"1.png": KINDS["g8.png"][1], "2.png": b"", "3.tif": BAD_IMAGES["lab.tif"][0]}))
    assert source.describe() == (
        f"{tmp_path}: 3 images, 5x7 8-bit grey PNG, 0 other files, 2 bad: "
        f"{tmp_path}/2.png: cannot be recognised as PNG, JPEG or TIFF (an empty file); {tmp_path}/3.tif: {PLAIN}LAB "
        "(convert it: magick mogrify -colorspace sRGB -depth 8)"
    )
    with pytest.raises(InputError, match=r"2\.png: cannot be recognised"):
        source.load()


def test_many_bad_files_are_cut_short(tmp_path: Path) -> None:
    source = open_images(fill(tmp_path, {f"{i}.png": b"" for i in range(13)}))
    assert source.describe().startswith(
        f"{tmp_path}: 13 images, none readable, 0 other files, 13 bad: {tmp_path}/0.png"
    )
    assert source.describe().endswith("; and 3 more")


def test_truncated_image_is_found_on_loading(tmp_path: Path) -> None:
    cut = encode(LARGE, "JPEG")[:1500]
    source = open_images(fill(tmp_path, {"a/1.png": encode(LARGE, "PNG"), "a/2.jpg": cut}))
    assert source.shape == (1, 64, 64)
    assert "1 bad" not in source.describe()
    with pytest.raises(InputError, match=r"a/2\.jpg: cannot be decoded: image file is truncated"):
        source.load()


def test_twins_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"a/x.jpg": KINDS["g8.jpg"][1], "a/x.png": KINDS["g8.png"][1], "b/x.png": KINDS["g8.png"][1]})
    with pytest.raises(InputError) as caught:
        open_images(tmp_path)
    assert str(caught.value) == f"{tmp_path}: images in one folder must differ in stem, got a/x.jpg and a/x.png" + (
        "; --images 'GLOB' tells which of them are images"
    )


def test_links(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", {"1.png": KINDS["g8.png"][1]})
    (root / "2.png").symlink_to("1.png")
    assert len(open_images(root)) == 2
    through = tmp_path / "through"
    through.symlink_to(root)
    assert len(open_images(through)) == 2

    outside = fill(tmp_path / "outside", {"label.json": b"{}"}) / "label.json"
    (root / "d").mkdir()
    for target, reason in [
        (outside, f"links must stay inside the folder, got {outside} (--follow-links: wherever they lead)"),
        (root / "gone", f"links must lead to a file, got a broken one to {root}/gone"),
        (root.parent / "gone", f"links must lead to a file, got a broken one to {root.parent}/gone"),
        (root, f"links must not lead back up, got {root}"),
        (root / "d", f"links must lead to a file, got the folder {root / 'd'} (--follow-links: to folders too)"),
    ]:
        (root / "link").symlink_to(target)
        with pytest.raises(InputError) as caught:
            open_images(root)
        assert str(caught.value) == f"{root}/link: {reason}"
        (root / "link").unlink()
    (root / "up").symlink_to(root)
    with pytest.raises(InputError, match="up: links must not lead back up, got "):
        open_images(root, Reading(links="all"))
    (root / "up").unlink()
    (root / "there").symlink_to(fill(tmp_path / "elsewhere", {"3.png": KINDS["g8.png"][1]}))
    assert len(open_images(root, Reading(links="all"))) == 3
    with pytest.raises(InputError, match="links must stay inside the folder"):
        open_images(root, Reading(links="inside"))


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: must be a file or a folder, got a device, pipe or socket"):
        open_images(tmp_path)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_images(tmp_path / "gone")
    assert (
        str(caught.value)
        == f"{tmp_path}/gone: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)"
    )
    (tmp_path / "readme.txt").write_text("no image")
    with pytest.raises(InputError) as caught:
        open_images(str(tmp_path))
    rule = "must hold at least one image (.png .jpg .jpeg .tif .tiff), got 1 other files"
    assert str(caught.value) == f"{tmp_path}: {rule}"


# --- arrays

STACK = RNG.integers(0, 256, (4, 5, 7), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: Callable, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    gaze = RNG.normal(size=(4, 2))
    save(path, images=STACK, gaze=gaze, name=np.array(["a", "b", "c", "d"]))
    source = open_images(path)
    assert isinstance(source, ArrayImages)
    assert (len(source), source.shape, source.dtype, source.bit_depth) == (4, (1, 5, 7), np.uint8, 8)
    assert source.describe() == f"{path}: 4 images, 5x7 8-bit grey, labels gaze, name"
    assert np.array_equal(source.load(), STACK)
    labels = source.labels()
    assert list(labels) == ["gaze", "name"]
    assert np.array_equal(labels["gaze"], gaze)


def test_npy_is_memory_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", STACK)
    source = open_images(tmp_path / "a.npy")
    assert isinstance(source.load(), np.memmap)
    assert np.array_equal(source.load(), STACK)
    assert source.labels() == {}
    assert source.describe() == f"{tmp_path}/a.npy: 4 images, 5x7 8-bit grey, no labels"


def test_kind_is_told_by_looking(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=STACK)
    (tmp_path / "a.npz").rename(tmp_path / "disguised.png")
    assert np.array_equal(open_images(tmp_path / "disguised.png").load(), STACK)


@pytest.mark.parametrize(
    "images",
    [
        RGB16[None],
        RGB8[None, :, :, :1],
        RNG.random((2, 3, 4), dtype=np.float32),
        GREY16[None].astype(">u2"),
        np.asfortranarray(STACK),
    ],
    ids=["rgb16", "one channel", "float", "big-endian", "fortran order"],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_array_kinds(images: np.ndarray, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    np.savez(path, images=images) if suffix == ".npz" else np.save(path, images)
    loaded = open_images(path).load()
    assert np.array_equal(loaded, images)
    assert loaded.dtype.isnative


def npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def npz_with_member(path: Path, name: str, content: bytes) -> None:
    npz(path, images=STACK)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


def lying_header(path: Path, shape: tuple[int, ...]) -> None:
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))


def corrupt(path: Path) -> None:
    npz(path, images=STACK)
    content = bytearray(path.read_bytes())
    content[content.index(STACK.tobytes()) + 3] ^= 1
    path.write_bytes(content)


def bad_range(path: Path) -> None:
    images = np.zeros((3, 2, 2), np.float32)
    images[1, 0, 0] = -1
    npz(path, images=images)


def not_a_number(path: Path) -> None:
    npz(path, images=np.full((1, 2, 2), np.nan, np.float32))


def cut(path: Path) -> None:
    npz(path, images=STACK)
    path.write_bytes(path.read_bytes()[:-30])


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda p: p.write_bytes(b""), "must be a folder of images, an .npz or an .npy, got something else"),
    "picture": (
        lambda p: p.write_bytes(encode(GREY8, "PNG")),
        "must be a folder of images, an .npz or an .npy, got something else",
    ),
    "cut": (cut, "cannot be read as NumPy arrays: File is not a zip file"),
    "flipped bit": (corrupt, "cannot be read as NumPy arrays: Bad CRC-32 for file 'images.npy'"),
    "no images": (lambda p: npz(p, pictures=STACK), "must hold an array named images, got pictures"),
    "pickled label": (
        lambda p: npz(p, images=STACK, who=np.array([{}] * 4, dtype=object)),
        "array who must hold plain values, got Python objects (pickled)",
    ),
    "pickled images": (
        lambda p: npz(p, images=np.array([{}], dtype=object)),
        "images must be uint8, uint16 or float32 in [0, 1], got Python objects (pickled)",
    ),
    "channels first": (
        lambda p: npz(p, images=np.zeros((2, 3, 35, 55), np.uint8)),
        "images must be [N, H, W] or [N, H, W, C] with C from 1 to 4, got shape (2, 3, 35, 55)",
    ),
    "no image": (
        lambda p: npz(p, images=STACK[:0]),
        "images must not be empty, got shape (0, 5, 7)",
    ),
    "stranger": (
        lambda p: npz_with_member(p, "run.sh", b"rm"),
        "must hold only .npy arrays, each once, got run.sh",
    ),
    "broken header": (
        lambda p: npz_with_member(p, "x.npy", b"\x93NUMPY\x01\x00\x02\x00{}"),
        "cannot be read as NumPy arrays: ",
    ),
    "promises": (
        lambda p: lying_header(p, (10**6, 10**6, 10**6)),
        f"array images must hold {10**18} bytes, as uint8[1000000, 1000000, 1000000] takes, got 100",
    ),
    "negative": (lambda p: lying_header(p, (10, -5, -2)), "cannot be read as NumPy arrays: negative dimensions"),
    "out of range": (bad_range, "image 1: float images must be in [0, 1], got -1 to 0"),
    "not a number": (not_a_number, "image 0: float images must be in [0, 1], got NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_array_file_is_refused(case: str, tmp_path: Path) -> None:
    make, reason = BAD_ARRAYS[case]
    path = tmp_path / "a.npz"
    make(path)
    with pytest.raises(InputError) as caught:
        open_images(path).load()
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_zip_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 100, 100), np.uint8))
    monkeypatch.setattr(os, "sysconf", lambda name: 300)  # a machine with 90,000 bytes
    with pytest.raises(InputError) as caught:
        open_images(tmp_path / "a.npz")
    assert str(caught.value) == f"{tmp_path}/a.npz: array images must fit the memory of 90000 bytes, got 1000128"


def test_reading_imports_no_torch() -> None:
    modules = "fastsimgan.data.formats.open_images, fastsimgan.data.pixel_values, fastsimgan.refinement.worker"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
