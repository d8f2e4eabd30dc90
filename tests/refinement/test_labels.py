"""Labels travel untouched: SHA-256 of every label file, member, array and dataset, before and after, read without us.

`make labels` does so with 10,000 images of each kind of input, the ordinary tests with 120.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import Invert, add, png
from PIL import Image

from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.verification import verify

COUNT = int(os.environ.get("FASTSIMGAN_LABELS", "120"))  # `make labels` sets 10,000
SIZE = 9, 11


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, SIZE, dtype=np.uint8)


def sidecars(i: int) -> dict[str, bytes]:
    """Of six kinds, up to five of them beside one image."""
    rng = np.random.default_rng(i)
    found = {"json": json.dumps({"gaze": rng.random(), "é": "\u2028"}, ensure_ascii=i % 2 == 0).encode()}
    if i % 2:
        found["txt"] = f"{i}\r\n".encode("utf-16") + bytes([0, 255])
    if i % 3 == 0:
        found["xml"] = b"<a>\xff</a>"
    if i % 5 == 0:
        found["npy"] = rng.bytes(64)
    if i % 7 == 0:
        found["mask.png"] = png(pixels(i))
    return found | ({"empty": b""} if i % 11 == 0 else {})


def make_folder(path: Path) -> Path:
    for i in range(COUNT):
        folder = path / f"d {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        if i % 2:
            Image.fromarray(pixels(i)).save(folder / f"{i}.jpg", quality=95)
        else:
            (folder / f"{i}.png").write_bytes(png(pixels(i)))
        for kind, data in sidecars(i).items():
            (folder / f"{i}.{kind}").write_bytes(data)
    (path / "classes.txt").write_bytes(b"of nobody")
    return path


def make_shards(path: Path) -> Path:
    path.mkdir()
    for first in range(0, COUNT, 1000):
        with tarfile.open(path / f"s{first:05d}.tar", "w") as tar:
            for i in range(first, min(COUNT, first + 1000)):
                add(tar, f"d/{i}.png", png(pixels(i)), mtime=i)
                for kind, data in sidecars(i).items():
                    add(tar, f"d/{i}.{kind}", data, mtime=i)
    (path / "classes.txt").write_bytes(b"beside the shards")
    return path


def make_metadata(path: Path) -> Path:
    """A folder with its labels in files for all images: ``metadata.jsonl``, COCO."""
    path.mkdir()
    for i in range(COUNT):
        (path / f"{i}.png").write_bytes(png(pixels(i)))
    rows = [{"file_name": f"{i}.png", "gaze": np.random.default_rng(i).random()} for i in range(COUNT)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(COUNT)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 4]} for i in range(COUNT)]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "eye"}]}
    (path / "annotations").mkdir()
    (path / "annotations" / "instances.json").write_text(json.dumps(coco, indent=1))
    return path


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": np.stack([pixels(i) for i in range(COUNT)]),
        "pitch_yaw": rng.normal(size=(COUNT, 2)),
        "label": rng.integers(0, 9, COUNT).astype(">i2"),
        "name": np.array([f"é{i}" for i in range(COUNT)]),
        "nan": np.full((COUNT, 3), np.nan, np.float32),
    }


def make_npz(path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), **arrays())
    return path.with_suffix(".npz")


def make_compressed_npz(path: Path) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), **arrays())
    return path.with_suffix(".npz")


def make_npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), arrays()["images"])
    return path.with_suffix(".npy")


def make_hdf5(path: Path, **options: object) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, array in arrays().items():
            if name == "name":
                file["meta/name"] = array.tolist()  # strings of variable length
            else:
                file.create_dataset(name, data=array, **options)
    return path.with_suffix(".h5")


def make_compressed_hdf5(path: Path) -> Path:
    return make_hdf5(path, compression="gzip", chunks=True)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "folder": make_folder,
    "folder with metadata.jsonl and COCO": make_metadata,
    "shards": make_shards,
    "npz": make_npz,
    "compressed npz": make_compressed_npz,
    "npy": make_npy,
    "HDF5": make_hdf5,
    "compressed HDF5": make_compressed_hdf5,
}


def is_image(name: str) -> bool:
    return name.endswith((".png", ".jpg")) and not name.endswith(".mask.png")


def digests(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of every image and of every label of a data set, by name."""
    images: dict[str, str] = {}
    labels: dict[str, str] = {}

    def add(name: str, data: bytes, is_image: bool) -> None:
        side = images if is_image else labels
        assert name not in side
        side[name] = hashlib.sha256(data).hexdigest()

    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_dir() or name.startswith(".fastsimgan"):
                continue
            if file.suffix != ".tar":
                add(name, file.read_bytes(), is_image(name))
                continue
            with tarfile.open(file) as tar:
                for info in tar:
                    data = tar.extractfile(info)
                    assert data is not None
                    add(f"{file.stem}/{info.name}", data.read(), is_image(info.name))
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                add(name, archive.read(name), name == "images.npy")
    elif path.suffix == ".npy":
        add("images", path.read_bytes(), True)
    else:
        import h5py

        with h5py.File(path) as file:
            for name in ("images", "pitch_yaw", "label", "nan", "meta/name"):
                values = file[name][()]
                data = b"\0".join(values) if values.dtype.hasobject else values.tobytes()
                add(name, f"{values.dtype} {values.shape} ".encode() + data, name == "images")
    return images, labels


@pytest.mark.parametrize("kind", MAKERS)
def test_no_label_changes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    source = MAKERS[kind](tmp_path / "in")
    old_images, old_labels = digests(source)
    output = tmp_path / f"out{source.suffix}"
    assert refine(Job(tmp_path / "model", source, output), loader=lambda *_: Invert()).images == COUNT
    assert digests(source) == (old_images, old_labels)
    images, labels = digests(output)
    assert labels == old_labels
    assert images.keys() == old_images.keys()
    assert all(images[name] != old_images[name] for name in images)  # or the proof would hold of a copy
    assert verify(output).images == COUNT
    print(f"{kind}: {COUNT} images, {len(labels)} label files or arrays, none changed")


@pytest.mark.parametrize(("kind", "to"), [("folder", "shards"), ("shards", "folder")])
def test_no_label_changes_between_folders_and_shards(kind: str, to: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    source = MAKERS[kind](tmp_path / "in")
    refine(Job(tmp_path / "model", source, tmp_path / "out", to=to), loader=lambda *_: Invert())
    old, new = digests(source)[1], digests(tmp_path / "out")[1]
    if to == "shards":  # members lie under the name of their shard
        new = {name if name == "classes.txt" else name.partition("/")[2]: digest for name, digest in new.items()}
    assert new == old


@pytest.mark.parametrize("to", ["npz", "hdf5"])
@pytest.mark.parametrize("kind", ["folder", "folder with metadata.jsonl and COCO", "shards"])
def test_no_label_changes_in_a_packed_file(kind: str, to: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    (tmp_path / "model").write_bytes(b"weights")
    source = MAKERS[kind](tmp_path / "in")
    output = tmp_path / f"out.{'npz' if to == 'npz' else 'h5'}"
    report = refine(Job(tmp_path / "model", source, output, to=to), loader=lambda *_: Invert())  # type: ignore[arg-type]
    assert report.images == COUNT and verify(output).images == COUNT
    new: dict[str, str] = {}
    if to == "npz":
        with zipfile.ZipFile(output) as archive:
            for name in archive.namelist():
                if name.startswith("files/"):
                    new[name.removeprefix("files/")] = hashlib.sha256(archive.read(name)).hexdigest()
    else:
        with h5py.File(output) as file:
            file["files"].visititems(
                lambda name, item: (
                    new.update({name: hashlib.sha256(item[()].tobytes()).hexdigest()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    assert new == digests(source)[1]
    print(f"{kind} to {to}: {COUNT} images, {len(new)} label files, none changed")


def test_links_are_the_inputs_files(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    source = make_folder(tmp_path / "in")
    before = digests(source)
    refine(Job(tmp_path / "model", source, tmp_path / "out", link=True), loader=lambda *_: Invert())
    images, labels = digests(tmp_path / "out")
    assert labels == before[1] and digests(source) == before
    for name in labels:
        assert os.path.samefile(tmp_path / "out" / name, source / name)
    for name in images:  # never linked: they are written
        assert not os.path.samefile(tmp_path / "out" / name, source / name)
    verify(tmp_path / "out")
