"""Sets of images as people have them: turned, grey beside colour, damaged, saved in other ways; and their labels."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import Invert
from PIL import Image

import fastsimgan
from fastsimgan import evaluate, train
from fastsimgan.config import TrainConfig
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.pixel_values import as_images, mismatch, value_range
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.evaluation.task_network import Labelled, number_classes, unseen_classes
from fastsimgan.inference import Refiner, load_refiner, save_refiner
from fastsimgan.models.refiner import RefinerNetwork
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.verification import verify

RNG = np.random.default_rng(0)
QUICK = ["--preset", "quick", "--steps", "1", "--batch-size", "4", "--pretrain-discriminator", "0", "--history", "4"]


def photos(count: int, channels: int = 1, size: tuple[int, int] = (36, 40), seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return images[..., 0] if channels == 1 else images


def folder(path: Path, images: Any, suffix: str = "png", **options: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:04d}.{suffix}", **options)
    return path


def dry_run(capsys: pytest.CaptureFixture[str], synthetic: Path, real: Path, *flags: str) -> tuple[int, str]:
    arguments = [
        "--synthetic",
        str(synthetic),
        "--real",
        str(real),
        "--out",
        str(synthetic.parent / "run"),
        "--dry-run",
    ]
    code = train.main([*arguments, "--device", "cpu", *QUICK, *flags])
    printed = capsys.readouterr()
    assert not (synthetic.parent / "run").exists()
    return code, printed.out + printed.err


def run(tmp_path: Path, source: Path, output: Path, channels: int = 1, **settings: Any) -> Any:
    (tmp_path / "model").write_bytes(b"weights")
    return refine(Job(tmp_path / "model", source, output, **settings), loader=lambda *_: Invert(channels))


# --- the real side


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_real_photos_are_turned_upright_and_counted(
    orientation: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = 240, 160, 80  # each corner has its own grey
    exif = Image.Exif()
    exif[274] = orientation
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1)}[orientation]  # fmt: skip
    options = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": exif}
    real = folder(tmp_path / "r", [np.ascontiguousarray(stored)] * 3, suffix, **options)
    source = open_images(real, Reading(upright=True))
    assert source.shape == (1, 16, 24)
    loaded = source.load()
    assert np.abs(loaded.astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)
    told = f"3 of 3 carry EXIF orientation {orientation}: turned upright"
    assert (told in source.describe()) == (orientation != 1)
    if suffix != "tif":
        as_stored = open_images(real)
        assert as_stored.load().shape[1:] == stored.shape
        assert ("read as stored, so that labels stay aligned" in as_stored.describe()) == (orientation != 1)


def test_turned_photos_train_beside_upright_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    real = folder(tmp_path / "r", np.rot90(photos(6), axes=(1, 2)).copy(), "jpg", exif=exif)
    code, text = dry_run(capsys, folder(tmp_path / "s", photos(6)), real)
    assert code == 0 and "6 of 6 carry EXIF orientation 6: turned upright" in text


def test_the_real_side_takes_the_colour_of_the_synthetic_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb, grey = photos(6, 3), photos(6)
    mixed = folder(tmp_path / "m", [*rgb[:5], grey[0]])
    code, text = dry_run(capsys, folder(tmp_path / "s", rgb), mixed)
    assert code == 0 and "real: 1 of 6 images made RGB, as the synthetic ones are" in text
    assert np.array_equal(open_images(mixed, Reading(colour="rgb")).load()[5], np.repeat(grey[0][..., None], 3, 2))
    code, text = dry_run(capsys, folder(tmp_path / "g", grey), mixed)
    assert code == 0 and "real: 5 of 6 images made grey, as the synthetic ones are" in text
    with Image.open(tmp_path / "m" / "0000.png") as image:
        expected = np.asarray(image.convert("L")).astype(int)
    assert np.abs(open_images(mixed, Reading(colour="grey")).load()[0] - expected).max() <= 1
    equal = folder(tmp_path / "e", np.repeat(grey[..., None], 3, 3))
    code, text = dry_run(capsys, equal, tmp_path / "g")
    assert code == 0 and "synthetic: RGB with R = G = B" in text and "6 of 6 images made RGB" in text
    code, text = dry_run(capsys, equal, tmp_path / "g", "--colour", "grey")
    assert code == 0 and "made" not in text
    np.savez(tmp_path / "real.npz", images=grey)
    code, text = dry_run(capsys, tmp_path / "s", tmp_path / "real.npz")
    assert code == 0 and "real: 6 of 6 images made RGB" in text
    with pytest.raises(InputError, match="must be of one size and kind"):
        open_images(mixed).load()  # as refine reads it, nothing is converted


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_bad_photos_are_left_out_when_told(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic, real = folder(tmp_path / "s", photos(4)), folder(tmp_path / "r", photos(201))
    (real / "0017.png").write_bytes((real / "0017.png").read_bytes()[:700])
    (real / "0100.png").write_bytes(b"")
    good = np.delete(photos(201), (17, 100), 0)
    source = real
    if kind == "shard":
        source = tmp_path / "r.tar"
        with tarfile.open(source, "w") as tar:
            for path in sorted(real.iterdir()):
                tar.add(path, path.name)
    opened = open_images(source, Reading(on_error="skip"))
    assert np.array_equal(opened.load(), good)
    assert [re.search(r"\d{4}\.png", reason)[0] for reason in opened.left_out] == ["0017.png", "0100.png"]  # type: ignore
    code, text = dry_run(capsys, synthetic, source)
    assert code == 2 and "Traceback" not in text
    if kind == "folder":
        assert (
            "; and so 1 more: " in text and "(--on-error skip leaves" in text and text.count("0100.png") >= 1
        )  # all are named in one go
    code, text = dry_run(capsys, synthetic, source, "--on-error", "skip")
    assert code == 0 and text.count("left out: ") == 2
    (real / "0019.png").write_bytes(b"")
    code, text = dry_run(capsys, synthetic, real, "--on-error", "skip")
    assert code == 2 and "at most 1% of the images may be bad, got 3 of 201" in text


@pytest.mark.parametrize("channels", [1, 3])
def test_renders_of_several_sizes_decide_about_the_colour(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = photos(6, channels)
    synthetic = folder(tmp_path / "s", [small[0][:30], *small[1:]])
    real = folder(tmp_path / "r", [*photos(5, 4 - channels), small[0]])
    code, text = dry_run(capsys, synthetic, real)
    assert code == 0 and f"real: 5 of 6 images made {'grey' if channels == 1 else 'RGB'}" in text


def test_mixed_renders_are_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = folder(tmp_path / "s", [*photos(3, 3), *photos(3)])
    code, text = dry_run(capsys, mixed, mixed)
    assert code == 2 and "; --colour rgb or --colour grey makes them alike, --images 'GLOB' tells which" in text
    code, text = dry_run(capsys, mixed, mixed, "--colour", "rgb")
    assert code == 0


def test_an_image_that_cannot_be_read_names_the_way_out_and_an_unfit_one_does_not(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", photos(3))
    (source / "0001.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"0001\.png: .*\(an empty file\) \(--on-error skip leaves bad images out"):
        run(tmp_path, source, tmp_path / "out")
    with pytest.raises(InputError, match=r"must have 3 channel\(s\), as the refiner has, got 1$"):
        run(tmp_path, folder(tmp_path / "grey", photos(3)), tmp_path / "out2", channels=3)


def test_a_png_with_much_behind_its_end_is_whole(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", photos(2))
    (source / "0001.png").write_bytes((source / "0001.png").read_bytes() + b"JUNK" * 3000)
    assert np.array_equal(open_images(source).load(), photos(2))


def test_labels_of_what_is_left_out_go_with_it(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", photos(3))
    for i in range(3):
        (source / f"{i:04d}.json").write_text(json.dumps({"label": i}))
    (source / "0001.png").write_bytes(b"")
    opened = open_images(source, Reading(on_error="skip"))
    assert len(opened.load()) == 2 and opened.labels()["label"].tolist() == [0, 2]


# --- value ranges


@pytest.mark.parametrize(
    ("synthetic", "real", "told"),
    [
        (photos(4), photos(4, seed=1), ""),
        (photos(4) // 128, photos(4), "synthetic values are at most 1 of 255"),
        (photos(4).astype(np.uint16) * 16, photos(4), "synthetic values reach 0.062 of white and real ones 0.99"),
        ((photos(4) / 255).astype(np.float32), (photos(4) / 65025).astype(np.float32), "real ones 0.0039"),
        (photos(4).astype(np.uint16) * 257, (photos(4) / 255).astype(np.float32), ""),
    ],
)
def test_ranges_are_printed_and_a_mismatch_is_warned_of(
    synthetic: np.ndarray, real: np.ndarray, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = mismatch(value_range(synthetic), value_range(real))
    assert (warning or "").find(told) >= 0 and bool(warning) == bool(told)
    np.savez(tmp_path / "s.npz", images=synthetic)
    np.savez(tmp_path / "r.npz", images=real)
    code, text = dry_run(capsys, tmp_path / "s.npz", tmp_path / "r.npz")
    assert code == 0 and f"synthetic: values {value_range(synthetic)}" in text and "real: values " in text
    assert ("warning: " in text) == bool(told)


# --- arrays as people save them


def test_one_picture_is_a_set_of_one_and_stays_as_it_was_saved(tmp_path: Path) -> None:
    for name, picture, channels in (("g", photos(1)[0], 1), ("c", photos(1, 3)[0], 3)):
        np.save(tmp_path / f"{name}.npy", picture)
        assert len(open_images(tmp_path / f"{name}.npy")) == 1  # type: ignore[arg-type]
        run(tmp_path, tmp_path / f"{name}.npy", tmp_path / f"{name}2.npy", channels)
        assert np.array_equal(np.load(tmp_path / f"{name}2.npy"), 255 - picture)
        verify(tmp_path / f"{name}2.npy")
        np.savez(tmp_path / f"{name}.npz", images=np.asfortranarray(picture))
        run(tmp_path, tmp_path / f"{name}.npz", tmp_path / f"{name}2.npz", channels)
        assert np.array_equal(np.load(tmp_path / f"{name}2.npz")["images"], 255 - picture)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f8"])
def test_floats_of_any_length_come_back_as_they_were(dtype: str, tmp_path: Path) -> None:
    images = (photos(3) / 255).astype(dtype)
    images[0, 0, 0], images[0, 0, 1] = -1e-6, 1 + 4e-4  # rounding
    np.savez(tmp_path / "a.npz", images=images)
    loaded = open_images(tmp_path / "a.npz").load()
    assert loaded.dtype == np.float32 and loaded.min() == 0 and loaded.max() == 1
    run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
    refined = np.load(tmp_path / "b.npz")["images"]
    assert refined.dtype == np.dtype(dtype)
    assert np.allclose(refined.astype(float), 1 - images.astype(float).clip(0, 1), atol=1e-3)
    verify(tmp_path / "b.npz")
    images[1, 2, 3] = 1.01
    np.savez(tmp_path / "c.npz", images=images)
    with pytest.raises(InputError, match=r"image 1: float images must be in \[0, 1\], got"):
        run(tmp_path, tmp_path / "c.npz", tmp_path / "d.npz")


def test_the_array_of_images_may_have_another_name(tmp_path: Path) -> None:
    images, other = photos(4), photos(4, seed=3)
    np.savez(tmp_path / "a.npz", images, pitch_yaw=np.zeros((4, 2)))
    assert np.array_equal(open_images(tmp_path / "a.npz").load(), images)  # arr_0 is the only one that can be images
    np.savez(tmp_path / "b.npz", left=images, right=other)
    with pytest.raises(InputError, match=r"must hold an array named images, got left, right; --key NAME tells which"):
        open_images(tmp_path / "b.npz")
    assert np.array_equal(open_images(tmp_path / "b.npz", Reading(key="right")).load(), other)
    run(tmp_path, tmp_path / "b.npz", tmp_path / "c.npz", key="right")
    assert np.array_equal(np.load(tmp_path / "c.npz")["right"], 255 - other)
    assert np.array_equal(np.load(tmp_path / "c.npz")["left"], images)
    with pytest.raises(InputError, match="another run's output: its array is right"):
        run(tmp_path, tmp_path / "b.npz", tmp_path / "c.npz", key="left")
    with pytest.raises(InputError, match=r"must hold an array named depth \(--key\), got left, right"):
        open_images(tmp_path / "b.npz", Reading(key="depth"))


@pytest.mark.parametrize("to", ["same", "hdf5"])
def test_arrays_of_another_length_are_carried_along(to: str, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    camera, names = np.eye(3), np.array(["cat", "dog"])
    np.savez(tmp_path / "a.npz", images=photos(4), label=np.arange(4), camera=camera, class_names=names, version=3)
    source = ArrayImages(tmp_path / "a.npz")
    assert source.labels().keys() == {"label"} and "carried along: camera, class_names, version" in source.describe()
    output = tmp_path / ("b.npz" if to == "same" else "b.h5")
    run(tmp_path, tmp_path / "a.npz", output, to=to)
    verify(output)
    if to == "same":
        assert np.array_equal(np.load(output)["camera"], camera) and np.load(output)["version"] == 3
    else:
        import h5py

        with h5py.File(output) as file:
            assert np.array_equal(file["camera"], camera) and list(file["class_names"].asstr()) == ["cat", "dog"]
    with pytest.raises(InputError, match="array camera must have length 4, as images has, to become files"):
        run(tmp_path, tmp_path / "a.npz", tmp_path / "files", to="folder")


WRONG_ARRAYS: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "channels first": (lambda: photos(4, 3).transpose(0, 3, 1, 2), r"looks like \[N, C, H, W\], which np.moveaxis"),
    "whole numbers": (lambda: photos(4).astype(np.int64), r"got int64: astype\(np.uint8\)"),
    "0 to 255 in floats": (lambda: photos(4).astype(np.float32), r"must be in \[0, 1\], .* divide by 255"),
    "not a number": (lambda: np.full((2, 9, 9), np.nan, np.float32), r"must be in \[0, 1\]"),
    "booleans": (lambda: photos(4) > 128, "got bool"),
    "five axes": (lambda: photos(4)[None, None], "got shape"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays_are_told_how_to_be_right(case: str, tmp_path: Path) -> None:
    make, reason = WRONG_ARRAYS[case]
    np.savez(tmp_path / "a.npz", images=make())
    with pytest.raises(InputError, match=reason):
        open_images(tmp_path / "a.npz").load()
    with pytest.raises(InputError, match=reason):
        run(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


def test_hdf5_groups_of_one_dataset_an_image(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    images = photos(12)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i, image in enumerate(images):
            file[f"image/{i}"], file[f"look_vec/{i}"] = image, [i, 1.5]
    source = open_images(tmp_path / "a.h5")
    assert (
        np.array_equal(source.load(), images)
        and "12 images" in source.describe()
        and "(images: image)" in source.describe()
    )
    run(tmp_path, tmp_path / "a.h5", tmp_path / "b.h5")
    verify(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5") as file:
        assert all(np.array_equal(file[f"image/{i}"], 255 - image) for i, image in enumerate(images))
        assert all(np.array_equal(file[f"look_vec/{i}"], [i, 1.5]) for i in range(12))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["deep/left"], file["deep/right"] = images, 255 - images
    with pytest.raises(InputError, match="must hold an array named images, got deep"):
        open_images(tmp_path / "c.h5")
    assert np.array_equal(open_images(tmp_path / "c.h5", Reading(key="deep/right")).load(), 255 - images)
    run(tmp_path, tmp_path / "c.h5", tmp_path / "d.h5", key="deep/right")
    with h5py.File(tmp_path / "d.h5") as file:
        assert np.array_equal(file["deep/left"], images) and np.array_equal(file["deep/right"], images)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["images/0"], file["images/1"] = images[0], images[0][:9]
    with pytest.raises(InputError, match="must be of one size and kind"):
        open_images(tmp_path / "e.h5")


def test_a_folder_of_files_of_one_picture_each(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    colours, ids = photos(3, 3), photos(3)
    (tmp_path / "in").mkdir()
    for i in range(3):
        with h5py.File(tmp_path / "in" / f"{i}.hdf5", "w") as file:
            file.create_dataset("colors", data=colours[i], compression="gzip")
            file["class_segmaps"], file["depth"] = ids[i], np.zeros((36, 40), np.float32)
            file.attrs["camera"] = "left"
        (tmp_path / "in" / f"{i}.json").write_text("{}")
    assert np.array_equal(open_images(tmp_path / "in").load(), colours)
    for name in ("out", "again"):
        assert run(tmp_path, tmp_path / "in", tmp_path / name, 3).images == 3
    for i in range(3):
        with h5py.File(tmp_path / "out" / f"{i}.hdf5") as file:
            assert np.array_equal(file["colors"], 255 - colours[i]) and np.array_equal(file["class_segmaps"], ids[i])
            assert file.attrs["camera"] == "left"
        one, other = ((tmp_path / name / f"{i}.hdf5").read_bytes() for name in ("out", "again"))
        assert one == other
    for to, suffix in (("npz", ".npz"), ("shards", "")):  # where the labels beside the picture would be lost
        with pytest.raises(InputError, match="--to folder keeps"):
            run(tmp_path, tmp_path / "in", tmp_path / f"packed{suffix}", 3, to=to)
    (tmp_path / "npy").mkdir()
    for i in range(3):
        np.save(tmp_path / "npy" / f"{i}.npy", ids[i])
    run(tmp_path, tmp_path / "npy", tmp_path / "npy2")
    assert np.array_equal(np.load(tmp_path / "npy2" / "1.npy"), 255 - ids[1])
    Image.fromarray(ids[0]).save(tmp_path / "npy" / "0.png")  # beside pictures, they are labels
    assert len(open_images(tmp_path / "npy")) == 1  # type: ignore[arg-type]


def shard(path: Path, images: np.ndarray, first: int = 0, packed: bool = False) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, image in enumerate(images):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            for name, data in ((f"{first + i}.png", encoded.getvalue()), (f"{first + i}.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue()) if packed else buffer.getvalue())


def test_brace_patterns_and_gzipped_shards(tmp_path: Path) -> None:
    images = photos(9)
    for i in range(3):
        shard(tmp_path / f"s-{i:03d}.tar", images[3 * i : 3 * i + 3], 3 * i)
        shard(tmp_path / f"z-{i}.tar.gz", images[3 * i : 3 * i + 3], 3 * i, packed=True)
    for pattern in ("s-{000..002}.tar", "s-00{0,1,2}.tar", "z-{0..2}.tar.gz", "z-*.tar.gz", "s-0{00..02}.tar"):
        assert np.array_equal(open_images(tmp_path / pattern).load(), images), pattern
    with pytest.raises(InputError, match=r"every shard of a pattern must exist, got none at .*s-003\.tar \(1 of 4"):
        open_images(tmp_path / "s-{000..003}.tar")
    run(tmp_path, tmp_path / "z-{0..2}.tar.gz", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == ["z-0.tar", "z-1.tar", "z-2.tar"]
    assert np.array_equal(open_images(tmp_path / "out").load(), 255 - images)
    verify(tmp_path / "out")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "z-0.tar.gz").read_bytes()[:-300])
    with pytest.raises(InputError, match=r"cut\.tar\.gz: c"):
        open_images(tmp_path / "cut.tar.gz").load()


# --- labels of folders


def label_files(kind: str, source: Path) -> list[Any]:
    names = [f"{i:04d}.png" for i in range(4)]
    if kind == "jsonl":
        (source / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": n, "label": i % 2}) + "\n" for i, n in enumerate(names))
        )
        return [0, 1, 0, 1]
    if kind == "image key":
        (source / "labels.jsonl").write_text(
            "".join(json.dumps({"image": f"./{n}", "label": i % 2}) + "\n" for i, n in enumerate(names))
        )
        return [0, 1, 0, 1]
    if kind == "csv":
        (source / "metadata.csv").write_text(
            "file_name,label\r\n" + "".join(f"{n},{i % 2}\r\n" for i, n in enumerate(names))
        )
        return [0, 1, 0, 1]
    if kind == "csv of words, names without suffix":
        (source / "train.csv").write_text(
            "\ufeffimage,label\n" + "".join(f"{n[:4]},{'cat' if i % 2 else 'dog'}\n" for i, n in enumerate(names))
        )
        return ["dog", "cat", "dog", "cat"]
    for i, name in enumerate(names):
        (source / name).with_suffix(".json").write_text(json.dumps({"label": i % 2}))
    return [0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["jsonl", "image key", "csv", "csv of words, names without suffix", "sidecars"])
def test_labels_beside_images_become_arrays(kind: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", photos(4))
    expected = label_files(kind, source)
    assert open_images(source).labels()["label"].tolist() == expected
    run(tmp_path, source, tmp_path / "out.npz", to="npz")
    packed = np.load(tmp_path / "out.npz")
    assert packed["label"].tolist() == expected
    assert all(packed[f"files/{path.name}"] == path.read_bytes() for path in source.iterdir() if path.suffix != ".png")
    run(tmp_path, tmp_path / "out.npz", tmp_path / "back", to="folder")  # and back, nothing more than there was
    names = {path.name for path in (tmp_path / "back").rglob("*") if path.is_file() and ".fastsimgan" not in path.parts}
    assert names == {path.name for path in source.iterdir()}


def test_one_folder_a_class(tmp_path: Path) -> None:
    for seed, kind in enumerate(("cat", "dog")):
        folder(tmp_path / "in" / kind, photos(3, seed=seed))
    assert open_images(tmp_path / "in").labels()["label"].tolist() == ["cat"] * 3 + ["dog"] * 3
    run(tmp_path, tmp_path / "in", tmp_path / "out.npz", to="npz")
    assert np.load(tmp_path / "out.npz")["label"].tolist() == ["cat"] * 3 + ["dog"] * 3
    run(tmp_path, tmp_path / "out.npz", tmp_path / "back", to="folder")
    assert not [path for path in (tmp_path / "back").rglob("*.json") if ".fastsimgan" not in path.parts]
    for i in range(2):
        folder(tmp_path / "scenes" / f"scene{i}", photos(3, seed=i))
    assert open_images(tmp_path / "scenes").labels() == {}  # parts of a set, not classes


def test_evaluate_on_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, kind in enumerate(("cat", "dog")):
        folder(tmp_path / "s" / kind, photos(6, seed=seed))
        folder(tmp_path / "r" / kind, photos(4, seed=seed + 5))
    folder(tmp_path / "r" / "fox", photos(2, seed=9))
    sets = ["--synthetic", str(tmp_path / "s"), "--refined", str(tmp_path / "s"), "--real", str(tmp_path / "r")]
    assert evaluate.main([*sets, "--steps", "2", "--seeds", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "warning: class fox of the real set (2 of 10 images) not in the synthetic one" in text


# --- classes, and the Python API


def test_classes_are_whatever_values_there_are() -> None:
    ids = np.array([5, 1_000_000_005, -3, 5])
    part = Labelled.from_arrays({"images": photos(4), "label": ids}, "s")
    sets, real, names = number_classes({"synthetic": part}, part)
    assert names == [-3, 5, 1_000_000_005] and sets["synthetic"].labels.tolist() == real.labels.tolist() == [1, 2, 0, 1]
    words = Labelled.from_arrays({"images": photos(4), "label": np.array(["a", "b", "a", "b"])}, "w")
    with pytest.raises(
        InputError, match="label must be of one kind in all sets, got text in synthetic, numbers in real"
    ):
        number_classes({"synthetic": words}, part)
    many = Labelled("", np.arange(20_000), "class")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 10000 different values, as classes do, got 20000"):
        number_classes({}, many)
    assert unseen_classes({"synthetic": words}, words) == ""
    with pytest.raises(InputError, match="must have one label an image, got 3 for 4"):
        Labelled.from_arrays({"images": photos(4), "label": np.arange(3)}, "s")
    with pytest.raises(InputError, match="label must be integers or strings"):
        Labelled.from_arrays({"images": photos(4), "label": np.ones(4)}, "s")


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda a: a,
    "list": list,
    "big-endian": lambda a: (a.astype(np.uint16) * 257).astype(">u2"),
    "float64": lambda a: a / 255,
    "float16": lambda a: (a / 255).astype(np.float16),
    "tensor": lambda a: torch.from_numpy(a)[:, None],
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.uint8).reshape(a.shape),
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "refiner.safetensors"
    save_refiner(path, RefinerNetwork(1, hidden_channels=4, blocks=1), histogram="keep", training=TrainConfig())
    return str(path)


@pytest.mark.filterwarnings("error:The given NumPy array")  # torch's, where it may not write to one
@pytest.mark.parametrize("form", FORMS)
def test_every_public_function_takes_images_in_any_form(form: str, model: str, tmp_path: Path) -> None:
    images = FORMS[form](photos(8))
    assert as_images(images).shape == (8, 36, 40)
    refined = load_refiner(model, "cpu")(images)
    assert len(refined) == 8 and as_images(refined).shape == (8, 36, 40)
    config = fastsimgan.TrainConfig(
        out=str(tmp_path / "run"),
        steps=1,
        batch_size=4,
        pretrain_discriminator=0,
        history=4,
        device="cpu",
        dry_run=True,
    )  # type: ignore[arg-type]
    fastsimgan.fit(images, images, config)
    labelled = {"images": images, "label": [0, 1] * 4}
    assert fastsimgan.evaluate(labelled, labelled, labelled, seeds=1, steps=1, device="cpu")["classes"] == [0, 1]


def test_what_no_function_takes_is_one_line(model: str) -> None:
    one = photos(1)[0]
    for wrong in (one, photos(2).astype(np.int64), [one, one[:3]], "photos", [["a"]], None):
        for function in (as_images, load_refiner(model, "cpu"), lambda images: fastsimgan.fit(images, images)):
            if wrong is one and isinstance(function, Refiner):
                continue  # it takes one picture
            with pytest.raises(InputError) as caught:
                function(wrong)
            assert "\n" not in str(caught.value)
