"""`refine --to npz|hdf5`: any input whose images have one size as one packed file, with nothing lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import add, content, load_invert, make_npy, make_npz, png
from labelled_sets import COUNT, MAKERS, SIZE, SUFFIX, gaze, make_folder, make_shards, number, pixels, sidecars
from PIL import Image

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.label_table import LabelTable
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.verification import verify

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
pytestmark = pytest.mark.usefixtures("small_work_units")


def packed(model: Path, source: Path, output: Path, **settings: Any) -> ArrayImages | HDF5Images:
    to = {".npz": "npz", ".h5": "hdf5"}[output.suffix]
    refine(Job(model, source, output, to=to, batch_size=4, **settings), loader=load_invert)  # type: ignore[arg-type]
    verify(output)
    opened = open_images(output)
    assert isinstance(opened, HDF5Images if to == "hdf5" else ArrayImages)
    return opened


@pytest.mark.parametrize("to", SUFFIX)
@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_lost(kind: str, to: str, model: Path, tmp_path: Path) -> None:
    found = packed(model, MAKERS[kind](tmp_path / "in"), tmp_path / f"out{SUFFIX[to]}")
    images, labels, files = found.load(), found.labels(), dict(found.files())
    numbers = [number(name) for name in labels["name"]]
    assert sorted(numbers) == list(range(COUNT)) == (numbers if kind == "shards" else sorted(numbers))
    for image, i in zip(images, numbers, strict=True):
        assert np.array_equal(image, 255 - pixels(i))
    assert labels["pitch_yaw"].dtype == np.float64 and labels["pitch_yaw"].tolist() == [gaze(i) for i in numbers]
    assert labels["label"].dtype == np.int64 and labels["label"].tolist() == [i % 3 for i in numbers]
    assert labels["left"].dtype == bool and labels["left"].tolist() == [i % 2 == 0 for i in numbers]
    assert labels["who"].tolist() == [f"é{i}" for i in numbers]
    assert labels.keys() == {"name", "pitch_yaw", "label", "left", "who"}
    for name, i in zip(labels["name"], numbers, strict=True):
        for suffix, data in sidecars(i).items():
            assert files.pop(name.removesuffix("png") + suffix) == data
    assert files == ({"classes.txt": b"of nobody", "empty": b""} if kind == "folder" else {})


def test_others_read_it(model: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in")
    packed(model, source, tmp_path / "out.npz")
    packed(model, source, tmp_path / "out.h5")
    name = "d 0/new\nline 0"
    with np.load(tmp_path / "out.npz") as npz, h5py.File(tmp_path / "out.h5") as file:
        assert npz["images"].shape == file["images"].shape == (COUNT, *SIZE)
        assert npz[f"files/{name}.json"] == file[f"files/{name}.json"][()].tobytes() == sidecars(0)["json"]
        assert file["name"].asstr()[()].tolist() == npz["name"].tolist()


def test_the_images_are_mapped_not_decoded(model: Path, tmp_path: Path) -> None:
    found = packed(model, make_folder(tmp_path / "in"), tmp_path / "out.npz")
    assert isinstance(found, ArrayImages) and isinstance(found.stored_images(mapped=True), np.memmap)


@pytest.mark.parametrize("to", SUFFIX)
def test_a_packed_file_is_an_input_with_all_that_it_carries(to: str, model: Path, tmp_path: Path) -> None:
    first = packed(model, make_folder(tmp_path / "in"), tmp_path / f"a{SUFFIX[to]}")
    other = {"npz": "hdf5", "hdf5": "npz"}[to]
    for output in (tmp_path / f"b{SUFFIX[to]}", tmp_path / f"c{SUFFIX[other]}"):
        second = packed(model, first.path, output)
        assert np.array_equal(second.load(), 255 - first.load())
        assert dict(second.files()) == dict(first.files()) and len(second.file_sha256()) > COUNT
        old, new = first.labels(), second.labels()
        assert old.keys() == new.keys() and all(np.array_equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("to", SUFFIX)
@pytest.mark.parametrize("kind", MAKERS)
def test_struck_again_and_again_it_ends_with_the_same_bytes(
    kind: str, to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MAKERS[kind](tmp_path / "in")
    packed(model, source, tmp_path / f"whole{SUFFIX[to]}")
    output = tmp_path / f"out{SUFFIX[to]}"
    calls = 0

    class Struck(BaseException):
        pass

    def strikes(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 7 == 0:
                raise Struck
            return real(*arguments, **options)

        return call

    for name in ("rename", "unlink"):  # before every seventh thing that the disk is told, the last ones included
        monkeypatch.setattr(os, name, strikes(getattr(os, name)))
    struck = 0
    while True:
        try:
            refine(Job(model, source, output, to=to, batch_size=4), loader=load_invert)  # type: ignore[arg-type]
            break
        except Struck:
            struck += 1
            assert struck < 100
    monkeypatch.undo()
    assert struck >= 2
    assert content(output) == content(tmp_path / f"whole{SUFFIX[to]}")
    verify(output)
    assert not list(tmp_path.glob("*.partial/pieces"))


@pytest.mark.parametrize("to", SUFFIX)
def test_killed_at_the_end_between_any_two_steps(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is committed and the file put together and published; each step may be the last one."""
    from fastsimgan.refinement import run_paths

    source = make_folder(tmp_path / "in", 8)
    packed(model, source, tmp_path / f"whole{SUFFIX[to]}")

    class Killed(BaseException):
        pass

    real = run_paths.rename
    for steps in range(20):
        output = tmp_path / f"{steps}{SUFFIX[to]}"
        left = steps

        def rename(old: Path, new: Path) -> None:
            nonlocal left
            if left == 0:
                left = -1
                raise Killed
            left -= 1
            real(old, new)

        monkeypatch.setattr(run_paths, "rename", rename)
        job = Job(model, source, output, to=to, batch_size=4)  # type: ignore[arg-type]
        killed = False
        try:
            refine(job, loader=load_invert)
        except Killed:
            killed = True
            refine(job, loader=load_invert)
        assert content(output) == content(tmp_path / f"whole{SUFFIX[to]}")
        if not killed:
            break
    assert not killed and steps > 5


def test_the_number_of_workers_never_matters(model: Path, tmp_path: Path) -> None:
    source = make_shards(tmp_path / "in")  # three blocks, also in other processes, which no fixture reaches
    outputs = []
    for workers in (1, 3):
        job = Job(model, source, tmp_path / f"out{len(outputs)}.npz", to="npz", batch_size=4)
        refine(job, workers=workers, loader=load_invert)
        outputs.append(hashlib.sha256(job.output.read_bytes()).hexdigest())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("to", SUFFIX)
def test_verify_finds_a_changed_label_and_a_changed_file(to: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / f"out{SUFFIX[to]}"
    packed(model, make_folder(tmp_path / "in", 3), output)
    whole = output.read_bytes()
    for old, new, name in ((b"of nobody", b"of noboby", "file classes.txt must have"), ("é1", "é7", "array who must")):
        if isinstance(old, str):
            coding = "utf-32-le" if to == "npz" else "utf-8"
            old, new = old.encode(coding), new.encode(coding)
        assert old in whole
        at = whole.rindex(old) if to == "npz" else whole.index(old)
        changed = whole[:at] + new + whole[at + len(new) :]
        if to == "npz":  # a zip has checksums of its own
            archive = io.BytesIO(whole)
            with zipfile.ZipFile(archive) as source, zipfile.ZipFile(output, "w") as target:
                for member in source.infolist():
                    target.writestr(member, source.read(member).replace(old, new))
        else:
            output.write_bytes(changed)
        with pytest.raises(InputError, match=name):
            verify(output)
        output.write_bytes(whole)
    verify(output)


@pytest.mark.parametrize("make", [make_npz, make_npy])
def test_arrays_become_the_other_kind(make: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    source = make(tmp_path / f"in{'.npz' if make is make_npz else '.npy'}", 23)
    old = open_images(source)
    for suffix in (".h5", ".npz"):
        found = packed(model, source, tmp_path / f"out{suffix}")
        assert np.array_equal(found.load(), 255 - old.load())
        assert found.labels().keys() == old.labels().keys()
        for name, array in old.labels().items():
            assert np.array_equal(found.labels()[name], array) and found.labels()[name].dtype == array.dtype


def test_16_bit_and_colour(model: Path, tmp_path: Path) -> None:
    class Upside:
        channels = 3

        def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
            return np.iinfo(images.dtype).max - images

    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        image = rng.integers(0, np.iinfo(dtype).max, (*SIZE, 3), dtype=dtype)
        from fastsimgan.data.formats.image_file import encode_image
        from fastsimgan.data.formats.stored_image import Header, StoredImage

        (folder / "a.png").write_bytes(
            encode_image(StoredImage(image, Header(image.shape, np.dtype(dtype).name, "PNG")))
        )
        refine(Job(model, folder, folder / "../out.npz", to="npz"), loader=lambda *_: Upside())
        found = open_images(tmp_path / "out.npz").load()
        assert found.dtype == dtype and np.array_equal(found[0], np.iinfo(dtype).max - image)
        for name in ("out.npz", "out.npz.fastsimgan"):
            os.rename(tmp_path / name, tmp_path / f"{np.dtype(dtype).name}-{name}")


def odd(folder: Path) -> None:
    (folder / "d 1" / "odd.png").write_bytes(png(np.zeros((5, 8), np.uint8)))
    (folder / "d 1" / "odd.json").write_text("{}")


def test_another_size_is_refused_by_name_or_left_out(model: Path, tmp_path: Path) -> None:
    odd(make_folder(tmp_path / "in"))
    with pytest.raises(InputError) as caught:
        packed(model, tmp_path / "in", tmp_path / "out.npz")
    assert str(caught.value) == (
        f"{tmp_path}/in/d 1/odd.png: images must be of one size and kind for npz, got 5x8 8-bit grey, "
        f"and {tmp_path}/in/d 0/new\\nline 0.png is 5x7 8-bit grey "
        "(--on-error skip leaves bad images out, if they are at most 1 %)"
    )
    found = packed(model, tmp_path / "in", tmp_path / "skipped.npz", on_error="skip")
    assert len(found) == COUNT and "pitch_yaw" in found.labels()
    assert not any("odd" in name for name in (*found.labels()["name"], *found.file_sha256()))


def test_the_first_good_image_decides(model: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 9)
    (tmp_path / "in" / "0.png").write_bytes(b"no image")
    colour = np.zeros((9, 9, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "in" / "1.png")
    assert len(packed(model, tmp_path / "in", tmp_path / "out.npz", on_error="skip", images="*")) == 9


def test_names_that_are_not_utf_8_are_refused(model: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 2)
    (tmp_path / "in" / os.fsdecode(b"\xff.txt")).touch()
    with pytest.raises(InputError, match=r"in: names must be UTF-8 for npz, got \\udcff\.txt"):
        packed(model, tmp_path / "in", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("name", ["../x.png", "/x.png", ".fastsimgan/../../x.png"])
def test_members_whose_names_lead_out_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, name, png(pixels(0)))
        add(tar, "0.png", png(pixels(0)))
    with pytest.raises(InputError, match="names must stay inside the output"):
        packed(model, tmp_path / "a.tar", tmp_path / "out.npz")


def test_twins_in_a_shard_are_refused(model: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in (0, 1, 0):
            add(tar, f"{i}.png", png(pixels(i)))
    with pytest.raises(InputError, match=r"a\.tar: members must differ in name, got a/0\.png twice"):
        packed(model, tmp_path / "a.tar", tmp_path / "out.npz")


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "attribute": (lambda file: file.attrs.__setitem__("version", 3), "the attribute version of the file"),
    "its attribute": (lambda file: file["images"].attrs.__setitem__("u", 3), "the attribute u of images"),
    "link": (lambda file: file.__setitem__("alias", h5py.SoftLink("/images")), "the link alias"),
    "record": (lambda file: file.create_dataset("r", data=np.zeros(3, [("a", "f4")])), "r of .*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_npz_cannot_hold_is_refused_before_any_work(case: str, model: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["images"] = np.stack([pixels(i) for i in range(3)])
        REFUSED[case][0](file)
    with pytest.raises(InputError, match=rf"in\.h5: must hold only .* to become an \.npz, got {REFUSED[case][1]}"):
        refine(Job(model, tmp_path / "in.h5", tmp_path / "out.npz", to="npz"), loader=load_invert)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "refiner.safetensors"]


def test_datasets_of_other_lengths_go_along_into_an_npz(model: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["images"] = np.stack([pixels(i) for i in range(3)])
        file["m/mean"], file["n"] = np.full((5, 7), 2.5), 3
    found = packed(model, tmp_path / "in.h5", tmp_path / "out.npz")
    assert np.array_equal(found.others()["m/mean"], np.full((5, 7), 2.5)) and found.others()["n"] == 3
    with pytest.raises(InputError, match=r"must hold only .* to become files, got m/mean of float64\[5, 7\]"):
        open_session(Job(model, tmp_path / "in.h5", tmp_path / "out", to="folder"))


@pytest.mark.parametrize("array", [np.array(["2020", "2021"], "M8[Y]"), np.array(["a\0b", "c"])])
def test_what_hdf5_cannot_hold_is_refused(array: np.ndarray, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", images=np.stack([pixels(0), pixels(1)]), when=array)
    with pytest.raises(InputError, match=r"out\.h5: array when of .* cannot be held in HDF5: "):
        packed(model, tmp_path / "in.npz", tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_metadata_jsonl_becomes_arrays(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    rows = []
    for i in range(12):
        name = f"b/{i}.png" if i % 2 else f"{i}.png"
        (tmp_path / "in" / name).write_bytes(png(pixels(i)))
        rows.append({"file_name": name, "pitch_yaw": gaze(i), "sometimes": 1} | ({} if i else {"only": 1}))
    text = "".join(json.dumps(row) + "\n" for row in reversed(rows))
    (tmp_path / "in" / "metadata.jsonl").write_text(text)
    found = packed(model, tmp_path / "in", tmp_path / "out.npz")
    labels = found.labels()
    assert labels.keys() == {"name", "pitch_yaw", "sometimes"}
    by_name = {row["file_name"]: row["pitch_yaw"] for row in rows}
    assert labels["pitch_yaw"].tolist() == [by_name[name] for name in labels["name"]]
    assert dict(found.files()) == {"metadata.jsonl": text.encode()}


def test_wrong_suffixes_are_told_the_flag(model: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", 2)
    with pytest.raises(InputError, match=r"output must be a folder, got the suffix \.npz \(--to npz makes one\)"):
        refine(Job(model, source, tmp_path / "out.npz"), loader=load_invert)
    with pytest.raises(InputError, match=r"output must end in \.h5 or \.hdf5, by --to hdf5, got '\.npz'"):
        refine(Job(model, source, tmp_path / "out.npz", to="hdf5"), loader=load_invert)


# --- as sets to train on


def test_shards_and_hdf5_are_sets_to_train_on(model: Path, tmp_path: Path) -> None:
    shards = open_images(make_shards(tmp_path / "in"))
    expected = np.stack([pixels(i) for i in range(COUNT)])
    assert np.array_equal(shards.load(), expected)
    assert np.array_equal(shards.labels()["pitch_yaw"], [gaze(i) for i in range(COUNT)])
    assert shards.describe().startswith(f"{tmp_path}/in: WebDataset, 3 shards, ")
    assert len(open_images(tmp_path / "in" / "s0*.tar").load()) == len(open_images(tmp_path / "in").load())
    assert len(open_images(tmp_path / "in" / "s040.tar").load()) == 7
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = expected.astype(">u2")
        file["pitch_yaw"] = [gaze(i) for i in range(COUNT)]
        file["mean"] = np.zeros(SIZE)  # not a label of each image
    found = open_images(tmp_path / "x.h5")
    assert found.load().dtype == np.uint16 and np.array_equal(found.load(), expected)
    assert found.labels().keys() == {"pitch_yaw"}


def test_shards_of_two_sizes_are_no_set(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.png", png(pixels(0)))
        add(tar, "1.png", png(np.zeros((9, 9), np.uint8)))
    with pytest.raises(InputError, match=r"a\.tar/0\.png is 5x7 8-bit grey and .*a\.tar/1\.png is 9x9 8-bit grey"):
        open_images(tmp_path / "a.tar").load()
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add(tar, "0.txt", b"")
    with pytest.raises(InputError, match="must hold at least one image .* got none"):
        open_images(tmp_path / "b.tar").load()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.full((2, *SIZE), 2, np.float32)
    with pytest.raises(InputError, match=r"x\.h5: image \d: float images must be in \[0, 1\]"):
        open_images(tmp_path / "x.h5").load()


# --- labels from JSON


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2.5], np.array([1, 2.5])),
        ([1, 2], np.array([1, 2])),
        ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])),
        ([True, False], np.array([True, False])),
        (["a", "bc"], np.array(["a", "bc"])),
        ([["a"], ["b"]], np.array([["a"], ["b"]])),
        ([float("nan"), 1], np.array([np.nan, 1])),
        ([[1], [1, 2]], None),
        ([1, True], None),
        ([1, "1"], None),
        ([[1, True], [1, True]], None),
        ([1, None], None),
        ([{}, {}], None),
        ([[], []], None),
        ([1 << 60, 1], None),
        ([10**400, 1], None),
        (["x" * 300, ""], None),
        (["a\0", "b"], None),
        ([[[1], 2], [[1], 2]], None),
    ],
)  # fmt: skip
def test_only_what_an_array_holds_exactly_becomes_one(values: list[Any], expected: np.ndarray | None) -> None:
    table = LabelTable()
    for value in values:
        table.add({"key": value, "name": "taken", "not a name": 1})
    found = table.arrays()
    if expected is None:
        assert found == {}
    else:
        assert found.keys() == {"key"} and found["key"].dtype == expected.dtype
        assert np.array_equal(found["key"], expected, equal_nan=expected.dtype.kind == "f")
