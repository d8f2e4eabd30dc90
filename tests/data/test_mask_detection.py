"""What is an image, a label, junk or an unread picture: every command gives one answer, before anything is written."""

from __future__ import annotations

import fnmatch
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Identity
from PIL import Image

from fastsimgan import evaluate, export, refine, train, turing
from fastsimgan.config import TrainConfig
from fastsimgan.data.formats.listing import is_image, is_junk, list_units
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.reading import Reading
from fastsimgan.errors import InputError
from fastsimgan.inference import save_refiner
from fastsimgan.models.refiner import Refiner
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine as refine_job
from fastsimgan.refinement.session import open_session

SIZE = (36, 40)
RNG = np.random.default_rng(0)


def photo(i: int, channels: int = 1) -> np.ndarray:
    pixels = np.random.default_rng(i).integers(0, 256, (*SIZE, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def mask(i: int, classes: int = 4) -> np.ndarray:
    pixels = np.zeros(SIZE, np.uint8)
    for value in range(1, classes):
        pixels[value * 30 // classes + i % 3 :, value * 5 :] = value
    return pixels


def png(image: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "PNG")
    return buffer.getvalue()


def palette(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels).convert("P")
    image.putdata(pixels.reshape(-1).tolist())
    image.putpalette([c for i in range(256) for c in (i * 37 % 256, i * 91 % 256, i * 13 % 256)])
    return image


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(image: str, label: str, make: Callable[[int], object] = mask, count: int = 6) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i in range(count):
        found[image.format(i)] = png(photo(i))
        found[label.format(i)] = png(make(i))  # type: ignore[arg-type]
    return found


def many_levels(i: int) -> np.ndarray:
    """An instance mask with more ids than a few."""
    return np.arange(36, dtype=np.uint8).repeat(40).reshape(SIZE) + np.uint8(i)


LABELLED = {
    "a folder called mask": pairs("rgb/{:04d}.png", "mask/{:04d}.png"),
    "labels, not the same numbers": pairs("images/{}.png", "labels/x{}.png", lambda i: photo(i + 50)),
    "SegmentationClass": pairs("JPEGImages/{:04d}.png", "SegmentationClass/{:04d}.png", lambda i: palette(mask(i))),
    "labelIds": pairs("a_{:03d}_left.png", "a_{:03d}_gtFine_labelIds.png"),
    "before the number": pairs("Image{:04d}.png", "Depth{:04d}.png", lambda i: photo(i + 9)),
    "deep": pairs("s1/v2/rgb/{:02d}.png", "s1/v2/normals/{:02d}.png", lambda i: photo(i, 3)),
    "two dots, no plain image": pairs("{:04d}.rgb.png", "{:04d}.seg.png"),
    "few levels in a folder of any name": pairs("x/{:04d}.png", "y/{:04d}.png"),
    "few levels by any suffix": pairs("{:04d}.png", "{:04d}_m.png"),
    "few levels among others, no pattern": {
        f"{name}.png": png(photo(i) if i % 2 else mask(i)) for i, name in enumerate("abcdefgh")
    },
    "few colours": pairs("x/{}.png", "y/{}.png", lambda i: np.stack([mask(i) * 60, 255 - mask(i) * 9, mask(i)], -1)),
    "a palette among photographs": pairs("x/{}.png", "y/{}.png", lambda i: palette(mask(i))),
    "a palette of few colours, alone": {f"{i}.png": png(palette(mask(i))) for i in range(4)},
    "1 bit among photographs": pairs("x/{}.png", "y/{}.png", lambda i: Image.fromarray(photo(i) > 128)),
    "16 bits that share names": pairs("x/{}.png", "y/{}.png", lambda i: photo(i).astype(np.uint16) * 77),
    "many ids that share names": pairs("x/{}.png", "y/{}.png", many_levels),
}
HONEST = {
    "one folder a class": {
        f"{kind}/{i:04d}.png": png(photo(i + ord(kind[0]))) for kind in ("cat", "dog") for i in range(6)
    },
    "two cameras": {f"camera{k}/{i:04d}.png": png(photo(10 * k + i)) for k in range(2) for i in range(6)},
    "depth alone": {f"depth/{i:04d}.png": png(photo(i).astype(np.uint16) * 99) for i in range(4)},
    "flat pictures alone": {f"{i}.png": png(mask(i)) for i in range(4)},
    "1 bit alone": {f"{i}.png": png(Image.fromarray(photo(i) > 128)) for i in range(4)},
    "some empty frames": {f"{i}.png": png(photo(i) if i % 4 else np.zeros(SIZE, np.uint8)) for i in range(16)},
    "one dark frame of many": {f"{i}.png": png(photo(i) if i else photo(i) // 128) for i in range(16)},
    "two sets in one folder": pairs("day{}.png", "night{}.png", many_levels),
    "sidecars": pairs("{:04d}.png", "{:04d}.mask.png"),
    "words that hold others": {f"abnormal_flowers/unlabeled{i}.png": png(photo(i)) for i in range(4)}
    | {f"masked/{i}.png": png(photo(i)) for i in range(3)},
}


@pytest.fixture
def refiner(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model" / "refiner.safetensors"
    path.parent.mkdir()
    save_refiner(path, Refiner(1, width=4, blocks=1), histogram="keep", training=TrainConfig())
    return path


def run(refiner: Path, source: Path, output: Path, **settings: object) -> object:
    return refine_job(Job(refiner, source, output, **settings), loader=lambda *_: Identity())  # type: ignore[arg-type]


@pytest.mark.parametrize("case", LABELLED)
@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_labels_among_images_are_refused_before_anything_is_written(
    case: str, kind: str, refiner: Path, tmp_path: Path
) -> None:
    files = LABELLED[case]
    source = fill(tmp_path / "in", files) if kind == "folder" else shard(tmp_path / "in.tar", files)
    if kind == "shard" and case == "two dots, no plain image":  # two extensions of one sample: neither is an image's
        with pytest.raises(InputError, match="takes a name up to its first dot"):
            open_session(Job(refiner, source, tmp_path / "out"))
        return
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="--images '.+' tells which files are images, --images '\\*' that all are"):
        open_session(Job(refiner, source, tmp_path / "out"))
    with pytest.raises(InputError, match="--images '.+' tells which files are images"):
        open_images(source)
    assert sorted(tmp_path.rglob("*")) == before
    open_session(Job(refiner, source, tmp_path / "out", images="*"))  # the user's word is enough


@pytest.mark.parametrize("case", HONEST)
def test_what_is_no_label_is_not_held_up(case: str, refiner: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "in", HONEST[case])
    open_session(Job(refiner, source, tmp_path / "out"))
    open_images(source)


def test_the_glob_that_is_proposed_works(refiner: Path, tmp_path: Path) -> None:
    for i, case in enumerate(("a folder called mask", "labelIds", "few levels by any suffix", "before the number")):
        source = fill(tmp_path / str(i), LABELLED[case])
        with pytest.raises(InputError) as caught:
            open_images(source)
        glob = str(caught.value).split("--images '")[1].split("'")[0]
        labels = {name: data for j, (name, data) in enumerate(LABELLED[case].items()) if j % 2}
        assert len(open_images(source, Reading(images=glob))) == len(labels)  # type: ignore[arg-type]
        assert run(refiner, source, tmp_path / f"out{i}", images=glob).images == len(labels)  # type: ignore[attr-defined]
        for name, data in labels.items():
            assert (tmp_path / f"out{i}" / name).read_bytes() == data


def test_sidecars_stay_sidecars_where_all_else_is_said_to_be_images(refiner: Path, tmp_path: Path) -> None:
    files = LABELLED["few levels in a folder of any name"] | {"x/0000.mask.png": png(mask(0))}
    source = fill(tmp_path / "in", files)
    assert run(refiner, source, tmp_path / "out", images="*").images == 12  # type: ignore[attr-defined]
    assert len(open_images(source, Reading(images="*"))) == 12  # type: ignore[arg-type]


def test_every_command_asks(refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = fill(tmp_path / "in", LABELLED["few levels in a folder of any name"])
    plain = fill(tmp_path / "plain", {f"{i}.png": png(photo(i)) for i in range(6)})
    out = str(tmp_path / "out")
    calls = {
        "refine": (refine.main, ["--refiner", refiner, "--input", labelled, "--output", out]),
        "train": (train.main, ["--synthetic", labelled, "--real", plain, "--out", out]),
        "train, real": (train.main, ["--synthetic", plain, "--real", labelled, "--out", out]),
        "export": (export.main, ["--refiner", refiner, "--images", labelled, "--out", out]),
        "evaluate": (evaluate.main, ["--synthetic", labelled, "--refined", plain, "--real", plain]),
        "turing": (turing.main, ["make", "--real", plain, "--refined", labelled, "--out", out, "--count", "2"]),
    }
    before = sorted(tmp_path.rglob("*"))
    for name, (main, arguments) in calls.items():
        assert main(list(map(str, arguments))) == 2, name
        error = [line for line in capsys.readouterr().err.splitlines() if line]
        flag = "--real-images" if name == "train, real" else "--images"
        assert len(error) == 1 and f"; {flag} '" in error[0], (name, error)
        if name == "export":
            assert f"--images '{labelled}/x/*.png'" in error[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_every_command_takes_the_glob(refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = fill(tmp_path / "in", LABELLED["a folder called mask"])
    plain = fill(tmp_path / "plain", {f"{i}.png": png(photo(i)) for i in range(6)})
    glob = ["--images", "rgb/*.png"]
    quick = [
        "--preset",
        "quick",
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--pretrain-discriminator",
        "0",
        "--history",
        "4",
    ]
    out = str(tmp_path / "out")
    train_it = ["--synthetic", str(labelled), "--real", str(plain), "--out", out, "--dry-run", "--device", "cpu"]
    assert train.main([*train_it, *glob, *quick]) == 0
    printed = capsys.readouterr().out
    assert "in: 6 images" in printed and "no name matches --images 'rgb/*.png'" in printed
    page = ["make", "--real", str(plain), "--refined", str(labelled), "--out", out + ".html", "--count", "6"]
    assert turing.main([*page, *glob]) == 0
    assert len(open_images(labelled / "rgb" / "*.png")) == 6  # type: ignore[arg-type]
    assert len(open_images(f"{labelled}/rgb/*.png").load()) == 6


# --- junk, and pictures that are not read

JUNK = ["._0.png", ".hidden/0.png", "@eaDir/0.png/SYNOFILE_THUMB_M.png", "__MACOSX/._0.png", "Thumbs.db", ".DS_Store",
        "a/.ipynb_checkpoints/0.png", "$RECYCLE.BIN/0.jpg", ".Trash-0/0.tif", "desktop.ini",
        "#recycle/0.png"]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_junk_is_never_an_image(kind: str, refiner: Path, tmp_path: Path) -> None:
    files = {f"{i}.png": png(photo(i)) for i in range(3)} | dict.fromkeys(JUNK, b"\0\5\x16\7junk")
    source = fill(tmp_path / "in", files) if kind == "folder" else shard(tmp_path / "in.tar", files)
    assert all(is_junk(name) and not is_image(name, None) and not is_image(name, "*") for name in JUNK)
    assert len(open_images(source).load()) == 3
    assert run(refiner, source, tmp_path / "out").images == 3  # type: ignore[attr-defined]
    if kind == "folder":
        for name in JUNK:
            assert (tmp_path / "out" / name).read_bytes() == files[name]


@pytest.mark.parametrize("suffix", ["bmp", "webp", "jfif", "ppm", "exr", "heic", "gif", "jp2"])
@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_pictures_that_are_not_read_are_told(
    suffix: str, kind: str, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{i}.png": png(photo(i)) for i in range(3)} | {f"x{i}.{suffix}": b"picture" for i in range(2)}
    source = fill(tmp_path / "in", files) if kind == "folder" else shard(tmp_path / "in.tar", files)
    told = f"2 files look like images and are not read: 2 .{suffix}"
    with pytest.raises(InputError, match=f"{told}.*they would come out unrefined among refined ones"):
        open_session(Job(refiner, source, tmp_path / "out"))
    assert told in open_images(source).describe()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
    images = "[0-9].png"
    assert run(refiner, source, tmp_path / "out", images=images).images == 3  # type: ignore[attr-defined]


def test_an_unread_sidecar_or_label_travels(refiner: Path, tmp_path: Path) -> None:
    files = {f"{i}.png": png(photo(i)) for i in range(3)} | {"0.exr": b"depth", "masks/1.bmp": b"mask"}
    source = fill(tmp_path / "in", files)
    assert run(refiner, source, tmp_path / "out").images == 3  # type: ignore[attr-defined]
    assert (tmp_path / "out/0.exr").read_bytes() == b"depth" and (tmp_path / "out/masks/1.bmp").read_bytes() == b"mask"


def test_unread_pictures_in_a_later_shard_are_refused_too(refiner: Path, tmp_path: Path) -> None:
    shard(tmp_path / "in" / "s0.tar", {f"{i}.png": png(photo(i)) for i in range(3)})
    shard(tmp_path / "in" / "s1.tar", {"3.png": png(photo(3)), "4.webp": b"picture"})
    with pytest.raises(InputError, match=r"s1\.tar: 1 file looks like an image and is not read: 1 \.webp"):
        run(refiner, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (
            ["render.0001.png", "render.0002.png"],
            "takes a name up to its first dot, so render.0001.png is the .0001.png of",
        ),
        (["000000001.webp"], "1 file looks like an image and is not read: 1 .webp"),
        (["0001.txt"], "the first member is 0001.txt"),
        ([], ""),
    ],
)
def test_a_shard_without_an_image_is_one_line(names: list[str], why: str, refiner: Path, tmp_path: Path) -> None:
    source = shard(tmp_path / "in.tar", {name: png(photo(0)) for name in names})
    for ask in (lambda: open_session(Job(refiner, source, tmp_path / "out")), lambda: open_images(source)):
        with pytest.raises(InputError, match="must hold at least one image") as caught:
            ask()
        assert why in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tar", "model"]


@pytest.mark.parametrize("kind", ["plain", "link"])
def test_an_output_inside_an_input_is_refused(
    kind: str, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fill(tmp_path / "in", {f"{i}.png": png(photo(i)) for i in range(6)})
    (tmp_path / "link").symlink_to(source)
    out = str((source if kind == "plain" else tmp_path / "link") / "runs" / "x")
    other = fill(tmp_path / "other", {f"{i}.png": png(photo(i)) for i in range(6)})
    before = sorted(source.rglob("*"))
    calls = [
        (train.main, ["--synthetic", source, "--real", other, "--out", out]),
        (train.main, ["--synthetic", other, "--real", source, "--out", out]),
        (export.main, ["--refiner", refiner, "--images", source, "--out", out]),
        (turing.main, ["make", "--real", other, "--refined", source, "--out", out]),
        (evaluate.main, ["--synthetic", source, "--refined", other, "--real", other, "--worst", out]),
    ]
    for main, arguments in calls:
        assert main(list(map(str, arguments))) == 2
        assert "must not be inside the input" in capsys.readouterr().err
    assert sorted(source.rglob("*")) == before


def test_train_and_refine_list_the_same(refiner: Path, tmp_path: Path) -> None:
    names = ["1.png", "1.mask.png", "1.json", "10.png", "2.tif", "a/1.jpg", "a/1.txt", "._1.png", "notes.txt"]
    source = tmp_path / "in"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"png": "PNG", "tif": "TIFF", "jpg": "JPEG"}.get(name.rpartition(".")[2])
        buffer = io.BytesIO()
        if kind:
            Image.fromarray(photo(0)).save(buffer, kind)
        (source / name).write_bytes(buffer.getvalue())
    listed = open_images(source)
    units = list(list_units(source))
    assert [str(name) for name in listed.images] == [unit.image for unit in units if unit.image]  # type: ignore[union-attr]
    assert [str(name) for name in listed.others] == [name for unit in units for name in unit.others]  # type: ignore[union-attr]
    report = run(refiner, source, tmp_path / "out")
    assert report.images == len(listed) == 4  # type: ignore[attr-defined, arg-type]
    assert report.others == len(listed.others) == 5  # type: ignore[attr-defined, union-attr]


def test_links_are_followed_when_told(refiner: Path, tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", {f"{i}.png": png(photo(i)) for i in range(3)} | {"0.json": b"{}"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "there").symlink_to(outside)
    with pytest.raises(InputError, match="--follow-links"):
        open_session(Job(refiner, tmp_path / "in", tmp_path / "out"))
    assert run(refiner, tmp_path / "in", tmp_path / "out", follow_links=True).images == 3  # type: ignore[attr-defined]
    assert (tmp_path / "out/there/0.json").read_bytes() == b"{}" and not (tmp_path / "out/there").is_symlink()
    with pytest.raises(InputError, match="another run's output: its links is all"):
        shutil.rmtree(tmp_path / "in")
        fill(tmp_path / "in", {f"there/{i}.png": png(photo(i)) for i in range(3)} | {"there/0.json": b"{}"})
        open_session(Job(refiner, tmp_path / "in", tmp_path / "out"))


@pytest.mark.parametrize(
    ("images", "labels", "glob"),
    [
        (
            ["leftImg8bit/train/aachen/a_{:06}_leftImg8bit.png", "leftImg8bit/val/ulm/u_{:06}_leftImg8bit.png"],
            ["gtFine/train/aachen/a_{:06}_gtFine_color.png", "gtFine/val/ulm/u_{:06}_gtFine_labelIds.png"],
            "leftImg8bit/*.png",
        ),
        (["train2017/{:012}.jpg"], ["annotations/panoptic_train2017/{:012}.png"], "train2017/*.jpg"),
        (["a/left{}.jpg", "b/right{}.jpg"], ["a/left{}_mask.png"], "*.jpg"),
        (["s1/{}_rgb.png", "s2/v_{}_rgb.png"], ["s1/{}_mask.png", "s2/v_{}_mask.png"], "*_rgb.png"),
        (["[x]/{}.png", "[x]/b/v{}.png"], ["y/mask{}.png"], "[[]x]/*.png"),
    ],
)
def test_images_of_several_patterns_are_told_by_one_glob(images: list[str], labels: list[str], glob: str) -> None:
    census = Census()
    for i in range(1, 5):
        for name in (*images, *labels):
            census.image(name.format(i))
    with pytest.raises(InputError) as caught:
        census.check("in", lambda name: pytest.fail(name), lambda found: f"--images '{found}'")
    assert f"--images '{glob}' tells which" in str(caught.value)
    for i in range(1, 5):
        assert all(fnmatch.fnmatchcase(name.format(i), glob) for name in images)
        assert not any(fnmatch.fnmatchcase(name.format(i), glob) for name in labels)
