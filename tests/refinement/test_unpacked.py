"""`refine --to folder|shards` of an array file: images become files, labels JSON sidecars, carried files themselves."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import labelled_sets
import numpy as np
import pytest
from builders import Invert, load_invert
from PIL import Image

from fastsimgan.data.formats.image_file import read_image
from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job, check
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.verification import verify

pytestmark = pytest.mark.usefixtures("small_work_units")


COUNT = 23


def run(model: Path, source: Path, output: Path, channels: int = 1, **settings: Any) -> Path:
    refine(Job(model, source, output, batch_size=4, **settings), loader=lambda *_: Invert(channels))
    verify(output)
    return output


def arrays(dtype: str = "uint8", *channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, np.iinfo(dtype).max + 1, (COUNT, 5, 7, *channels), dtype=dtype),
        "pitch_yaw": rng.normal(size=(COUNT, 2)),
        "single": rng.normal(size=COUNT).astype(np.float32),
        "label": rng.integers(0, 9, COUNT).astype(">i2"),
        "left": np.arange(COUNT) % 2 == 0,
        "who": np.array([f"é{i}" for i in range(COUNT)]),
        "raw": np.array([b"ab", b"\xc3\xa9"] * (COUNT // 2) + [b""]),
        "missing": np.full((COUNT, 2), np.nan),
    }


def save(path: Path, found: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **found)
    elif path.suffix == ".npy":
        np.save(path, found["images"])
    else:
        h5py = pytest.importorskip("h5py", reason="h5py is not installed")
        with h5py.File(path, "w") as file:
            for name, array in found.items():
                file[f"deep/{name}" if name == "who" else name] = array.tolist() if name == "who" else array
    return path


def same(one: Any, other: np.ndarray) -> bool:
    if other.dtype.kind == "S":
        return one == [value.decode() for value in other.tolist()]
    return np.array_equal(np.array(one, dtype=other.dtype), other, equal_nan=other.dtype.kind == "f")


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", ()), ("uint16", ()), ("uint8", (3,)), ("uint8", (1,))])
def test_images_become_files_and_labels_sidecars(
    suffix: str, dtype: str, channels: tuple[int, ...], model: Path, tmp_path: Path
) -> None:
    found = arrays(dtype, *channels)
    output = run(model, save(tmp_path / f"in{suffix}", found), tmp_path / "out", *channels, to="folder")
    names = [f"{i:08d}" for i in range(COUNT)]
    files = sorted(path.name for path in output.iterdir() if path.is_file())
    assert files == sorted(name + end for name in names for end in (".png", ".json"))
    rows = [json.loads((output / f"{name}.json").read_text()) for name in names]
    who = "who" if suffix == ".npz" else "deep/who"
    assert rows[0].keys() == (found.keys() - {"images", "who"}) | {who}
    for name in found.keys() - {"images", "who"}:
        assert same([row[name] for row in rows], found[name]), name
    assert [row[who] for row in rows] == found["who"].tolist()
    images = found["images"].squeeze(3) if channels == (1,) else found["images"]
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(read_image(output / f"{name}.png").pixels, np.iinfo(dtype).max - image)


def test_shards_of_arrays_are_samples(model: Path, tmp_path: Path) -> None:
    found = arrays()
    output = run(model, save(tmp_path / "in.npz", found), tmp_path / "out", to="shards")
    members: list[str] = []
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            members += tar.getnames()
    assert members == [f"{i:08d}.{end}" for i in range(COUNT) for end in ("png", "json")]
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    samples = list(webdataset.WebDataset([str(path) for path in sorted(output.glob("*.tar"))], shardshuffle=False))
    assert [json.loads(sample["json"])["label"] for sample in samples] == found["label"].tolist()


def test_a_npy_has_no_labels(model: Path, tmp_path: Path) -> None:
    output = run(model, save(tmp_path / "in.npy", arrays()), tmp_path / "out", to="folder")
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == [f"{i:08d}.png" for i in range(COUNT)]


@pytest.mark.parametrize("packed", ["npz", "hdf5"])
@pytest.mark.parametrize("to", ["folder", "shards"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_packed_tree_comes_back_as_it_was(kind: str, to: str, packed: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    source = labelled_sets.MAKERS[kind](tmp_path / "in")
    middle = run(model, source, tmp_path / f"middle{labelled_sets.SUFFIX[packed]}", to=packed)
    back = run(model, middle, tmp_path / "back", to=to)
    plain = run(model, source, tmp_path / "plain", to="folder") if kind == "shards" else source
    expected = {
        path.relative_to(plain).as_posix(): path.read_bytes()
        for path in plain.rglob("*")
        if path.is_file() and ".fastsimgan" not in path.parts
    }
    got: dict[str, bytes] = {}
    for path in back.rglob("*"):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for info in tar:
                    file = tar.extractfile(info)
                    assert file is not None and info.name not in got
                    got[info.name] = file.read()
        elif path.is_file() and ".fastsimgan" not in path.parts:
            got[path.relative_to(back).as_posix()] = path.read_bytes()
    assert got.keys() == expected.keys()
    pictures = {name for name in got if name.endswith(".png") and not name.endswith(".mask.png")}
    assert len(pictures) == labelled_sets.COUNT
    for name in got.keys() - pictures:
        assert got[name] == expected[name], name
    for name in pictures:  # refined twice: inverted twice
        again = np.asarray(Image.open(io.BytesIO(got[name])))
        i = labelled_sets.number(name)
        assert np.array_equal(again, labelled_sets.pixels(i)), name


def test_labels_of_a_metadata_file_are_not_told_twice(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(COUNT):
        Image.fromarray(labelled_sets.pixels(i)).save(source / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "gaze": [i, i / 7], "flag": True} for i in range(COUNT)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    middle = run(model, source, tmp_path / "middle.npz", to="npz")
    assert np.load(middle)["gaze"].shape == (COUNT, 2)
    back = run(model, middle, tmp_path / "back", to="folder")
    names = sorted(path.name for path in back.iterdir() if path.is_file())
    assert names == sorted([f"{i}.png" for i in range(COUNT)] + ["metadata.jsonl"])
    with np.load(middle) as file:  # what the metadata does not say is not lost
        more = {name: file[name] for name in ("images", "name", "gaze")} | {"split": np.arange(COUNT)}
    again = run(model, save(tmp_path / "more.npz", more), tmp_path / "more", to="folder")
    assert json.loads((again / "3.json").read_text()) == {"gaze": [3, 3 / 7], "split": 3}


def with_files(path: Path, files: dict[str, bytes], **found: np.ndarray) -> Path:
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), **found)  # type: ignore[arg-type]
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in files.items():
            archive.writestr(f"files/{name}", data)
    return path


PAIR = np.array(["a.png", "b.png"])
BAD: dict[str, tuple[dict[str, bytes], dict[str, np.ndarray], str]] = {
    "label beside its sidecar": (
        {"a.json": b'{"x": 1}'}, {"name": PAIR, "x": np.array([2, 2])}, "arrays x must be in files/a.json"),
    "out": ({}, {"name": np.array(["../a.png", "b.png"])}, "names must stay inside the output, got '../a.png'"),
    "absolute": ({}, {"name": np.array(["/a.png", "b.png"])}, "names must stay inside"),
    "records": ({}, {"name": np.array([".fastsimgan/a.png", "b.png"])}, "names must stay inside"),
    "file out": ({"../../x": b""}, {}, "names must stay inside"),
    "twice": ({}, {"name": np.array(["a.png", "a.png"])}, "images must differ in name up to the suffix"),
    "stem twice": ({}, {"name": np.array(["a.png", "a.jpg"])}, "got a.png and a.jpg"),
    "file as image": ({"00000001.png": b""}, {}, "files must differ in name, got 00000001.png twice"),
    "surrogate": ({}, {"name": np.array(["\ud800.png", "b.png"])}, "names must be Unicode text"),
    "complex": ({}, {"x": np.zeros(2, complex)}, "array x must hold numbers, booleans or strings"),
    "date": ({}, {"x": np.zeros(2, "datetime64[s]")}, "array x must hold numbers"),
    "bytes": ({}, {"x": np.array([b"\xff", b""])}, "array x must be UTF-8 to become JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_become_files_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    files, found, message = BAD[case]
    source = with_files(tmp_path / "in.npz", files, **found)
    with pytest.raises(InputError, match=message):
        run(model, source, tmp_path / "out", to="folder")
    assert not list(tmp_path.glob("out*"))
    run(model, source, tmp_path / "again.npz")  # it is a good file


@pytest.mark.parametrize(
    ("images", "name", "message"),
    [
        (np.zeros((1, 4, 4), np.float32), "a.png", "images must be uint8 or uint16, grey or RGB, .* got float32"),
        (np.zeros((1, 4, 4, 2), np.uint8), "a.png", "got uint8 with 2 channel"),
        (np.zeros((1, 4, 4), np.uint16), "a.jpg", "JPEG must not hold 16-bit images, got a.jpg"),
        (np.zeros((1, 4, 4, 3), np.uint16), "a.tif", "TIFF must not hold 16-bit images, got a.tif"),
    ],
)
def test_images_that_no_file_can_hold(images: np.ndarray, name: str, message: str, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", images=images, name=np.array([name]))
    with pytest.raises(InputError, match=message):
        check(Job(model, tmp_path / "in.npz", tmp_path / "out", to="folder"))


def test_hdf5_that_holds_more_is_refused(model: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(save(tmp_path / "in.h5", arrays()), "a") as file:
        file.attrs["camera"] = "left"
    with pytest.raises(InputError, match="files to become files, got the attribute camera of the file"):
        check(Job(model, tmp_path / "in.h5", tmp_path / "out", to="folder"))


def test_names_without_suffix_are_a_label(model: Path, tmp_path: Path) -> None:
    source = with_files(tmp_path / "in.npz", {}, name=np.array(["ann", "ben"]))
    output = run(model, source, tmp_path / "out", to="folder")
    assert json.loads((output / "00000001.json").read_text()) == {"name": "ben"}
    assert check(Job(model, source, tmp_path / "x", to="folder")).describe().endswith("named 00000000.png and so on")


def test_names_choose_the_format(model: Path, tmp_path: Path) -> None:
    source = with_files(
        tmp_path / "in.npz", {"d/a.txt": b"1", "d/a.b.json": b"{}"}, name=np.array(["d/a.jpg", "c.tif"])
    )
    output = run(model, source, tmp_path / "out", to="folder")
    assert Image.open(output / "d" / "a.jpg").format == "JPEG" and Image.open(output / "c.tif").format == "TIFF"
    assert (output / "d" / "a.txt").read_bytes() == b"1" and (output / "d" / "a.b.json").read_bytes() == b"{}"
    assert check(Job(model, source, tmp_path / "x", to="folder")).describe().endswith("as the array name says")


@pytest.mark.parametrize("to", ["folder", "shards"])
def test_struck_again_and_again_it_ends_with_the_same_bytes(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = run(model, labelled_sets.make_folder(tmp_path / "tree"), tmp_path / "in.npz", to="npz")
    whole = run(model, source, tmp_path / "whole", to=to)
    rename, calls = os.rename, 0

    class Struck(BaseException):
        pass

    def strike(*arguments: Any, **settings: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % (37 if to == "folder" else 4) == 0:
            raise Struck
        rename(*arguments, **settings)

    monkeypatch.setattr(os, "rename", strike)
    for _ in range(200):
        try:
            refine(Job(model, source, tmp_path / "out", batch_size=4, to=to), loader=load_invert)  # type: ignore[arg-type]
            break
        except Struck:
            pass
    monkeypatch.setattr(os, "rename", rename)
    assert calls > 12
    verify(tmp_path / "out")

    def content(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and ".fastsimgan" not in path.parts)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    assert content(tmp_path / "out") == content(whole)
