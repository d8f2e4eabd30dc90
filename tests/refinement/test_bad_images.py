"""Bad images of every kind in every format, through folders and shards: each is named with its reason, none gets in."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from builders import Identity
from PIL import Image

from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.verification import verify

TESTS = str(Path(__file__).resolve().parents[1])
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (64, 64), dtype=np.uint8)  # so that cutting it loses pixels
FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}
GOOD = 12


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def resized(suffix: str, width: int, height: int) -> bytes:
    """A small file whose header promises ``width`` x ``height``."""
    data = bytearray(encode(np.zeros((8, 8), np.uint8), FORMATS[suffix]))
    if suffix == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif suffix == "jpg":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    else:
        for tag, value in ((256, width), (257, height)):
            at = next(i for i in range(len(data)) if data[i : i + 4] in (struct.pack("<HH", tag, t) for t in (3, 4)))
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


def several(suffix: str) -> bytes:
    first, second = Image.fromarray(NOISE), Image.fromarray(255 - NOISE)
    kind = {"png": "PNG", "jpg": "MPO", "tif": "TIFF"}[suffix]
    return encode(first, kind, save_all=True, append_images=[second])


def corpus() -> dict[str, tuple[bytes, str]]:
    """File name -> its bytes, and how the reason for refusing it begins."""
    unknown = "cannot be recognised as PNG, JPEG or TIFF"
    found = {}
    for suffix, kind in FORMATS.items():
        other = {"png": "JPEG", "jpg": "TIFF", "tif": "PNG"}[suffix]
        mode = {"png": "P", "jpg": "CMYK", "tif": "LAB"}[suffix]
        whole = encode(NOISE, kind)
        cut = "PNG must end with an IEND chunk" if suffix == "png" else "cannot be decoded: image file is truncated"
        found |= {
            f"empty.{suffix}": (b"", unknown),
            f"text.{suffix}": (b"this is no image", unknown),
            f"gif.{suffix}": (encode(NOISE, "GIF"), unknown),
            f"damaged start.{suffix}": (b"\0\0" + whole[2:], unknown),
            f"other format.{suffix}": (encode(NOISE, other), f"suffix .{suffix} must hold {kind}, got {other}"),
            f"half.{suffix}": (whole[: len(whole) // 2], cut),
            f"nearly whole.{suffix}": (whole[:-300], cut if suffix != "tif" else "cannot be "),
            f"bomb.{suffix}": (resized(suffix, 40_000, 40_000), "must have fewer pixels: "),
            f"{mode}.{suffix}": (
                encode(Image.new(mode, (7, 5)), kind),
                "must be grey, RGB or a palette, with alpha or without, got Pillow mode LAB"
                if mode == "LAB"
                else "must have 1 channel(s), as the refiner has, got 3",  # what a palette or inks stand for
            ),
            f"colour.{suffix}": (encode(Image.new("RGB", (7, 5)), kind), "must have 1 channel(s), as the refiner has"),
            f"several.{suffix}": (several(suffix), "must hold one picture, got 2 (animated or multi-page)")
            if suffix != "jpg"
            else (encode(NOISE, "WEBP"), "cannot be recognised as PNG, JPEG or TIFF"),  # of a JPEG the first is read
            os.fsdecode(b"name\n\xff.") + suffix: (b"\xff\xd8\xff", "can"),
        }
    return found


CORPUS = corpus()
OTHERS = {f"{name.rpartition('.')[0]}-{name.rpartition('.')[2]}.{name.rpartition('.')[2]}": name for name in CORPUS}


def files() -> dict[str, bytes]:
    """The corpus with a sidecar each, among good images."""
    found = {}
    for name, original in OTHERS.items():
        found[name] = CORPUS[original][0]
        found[name.rpartition(".")[0] + ".json"] = b"label"
    for i in range(GOOD):
        suffix = list(FORMATS)[i % 3]
        found[f"good{i}.{suffix}"] = encode(NOISE[: 20 + i], FORMATS[suffix])
        found[f"good{i}.json"] = b"label"
    return found


def make(kind: str, root: Path) -> Path:
    root.mkdir()
    if kind == "folder":
        for name, data in files().items():
            (root / name).write_bytes(data)
    else:
        with tarfile.open(root / "a.tar", "w", errors="surrogateescape") as tar:
            for name, data in files().items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_each_is_left_out_with_its_reason(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    source = make(kind, tmp_path / "in")
    job = Job(tmp_path / "model", source, tmp_path / "out", on_error="skip", to="folder")
    report = refine(job, loader=lambda *_: Identity())
    assert (report.images, report.failed) == (GOOD, len(CORPUS))
    assert len(CORPUS) >= 33
    found = {name.removeprefix("a/"): reason for name, reason in open_session(job).run.failures()}
    assert found.keys() == OTHERS.keys()
    for name, reason in found.items():
        expected = CORPUS[OTHERS[name]][1]
        assert f": {expected}" in reason, (name, reason)
        assert "\n" not in reason
    good = {path.name for path in (tmp_path / "out").rglob("good*")}
    assert good == {name for name in files() if name.startswith("good")}
    assert verify(job.output).others == GOOD  # the good ones' labels, and no bad one's


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_each_stops_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(CORPUS[OTHERS[name]][0])
    with pytest.raises(InputError) as caught:
        refine(Job(tmp_path / "model", tmp_path / "in", tmp_path / "out"), loader=lambda *_: Identity())
    assert CORPUS[OTHERS[name]][1] in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "model"]


def test_memory_stays_small(tmp_path: Path) -> None:
    """All of them, and as many large good ones as would fill the memory if they were held together."""
    (tmp_path / "model").write_bytes(b"weights")
    make("folder", tmp_path / "in")
    large = encode(np.zeros((8_000, 8_000), np.uint8), "PNG", compress_level=1)  # 64 MB each, once decoded
    for i in range(6):
        (tmp_path / "in" / f"large{i}.png").write_bytes(large)
    code = (
        f"import sys; sys.path.insert(0, {TESTS!r})\n"
        "from pathlib import Path\n"
        "from builders import Identity\n"
        "from fastsimgan.refinement.job import Job\n"
        "from fastsimgan.refinement.run import refine\n"
        "root = Path(sys.argv[1])\n"
        "job = Job(root / 'model', root / 'in', root / 'out', on_error='skip')\n"
        "report = refine(job, loader=lambda *_: Identity())\n"
        "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(report.images, peak)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    images, peak = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert images == GOOD + 6
    assert peak * 1024 < 1e9  # in KiB; ru_maxrss would begin with the peak of the process that starts this one
