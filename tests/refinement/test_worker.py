"""Offline refinement: labels byte for byte, pixels exactly the refiner's, and a whole output or none."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimgan.config import TrainConfig
from fastsimgan.data.formats.image_file import read_image
from fastsimgan.data.formats.numpy_file import ArrayImages
from fastsimgan.errors import InputError
from fastsimgan.inference import save_refiner
from fastsimgan.models.refiner import Refiner
from fastsimgan.refinement import worker
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.report import Report
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.run_paths import state_of
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.sinks.folder import FolderWriter
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.verification import verify

RNG = np.random.default_rng(0)


class Fake:
    """A refiner of our own: applies ``change`` and remembers the batches that it saw."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray] = np.copy, channels: int = 1) -> None:
        self.change = change
        self.channels = channels
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        assert len(images) <= batch_size
        assert images.dtype.isnative
        self.seen.append(images.shape)
        return self.change(images)


@pytest.fixture(autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The refiner's file, of which a run records the hash; the refiner itself is a Fake."""
    path = tmp_path_factory.mktemp("model") / "refiner.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(f"{__name__}.MODEL", path)
    return path


MODEL = Path()


def refine_source(source: Path, refiner: Fake, output: Path, *, workers: int = 1, **settings: Any) -> Report:
    job = Job(MODEL, source, output, **settings)
    return refine(job, loader=lambda job, worker, workers: refiner, workers=workers)


def reasons(source: Path, output: Path, **settings: Any) -> list[str]:
    return [reason for _, reason in open_session(Job(MODEL, source, output, **settings)).run.failures()]


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def invert(images: np.ndarray) -> np.ndarray:
    white = 1 if images.dtype.kind == "f" else np.iinfo(images.dtype).max
    return white - images


def noise(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by relative name."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".fastsimgan" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Device(Fake):
    """A refiner that works by itself, as a GPU does: what was begun is done later, in order."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(change)
        self.at_once: list[int] = []
        self.begun = self.ended = 0
        self._worker = ThreadPoolExecutor(1)

    def begin(self, images: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        number = self.begun
        self.begun += 1
        self.at_once.append(self.begun - self.ended)
        result = self._worker.submit(lambda: (time.sleep(0.005), self.change(images))[1])

        def finish() -> tuple[np.ndarray, float]:
            assert number == self.ended  # the order of beginning
            self.ended += 1
            return result.result(), 0.005

        return finish


@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_a_device_has_the_next_batch_before_it_ends_the_last(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 20)
    monkeypatch.setattr(unit_parts, "BYTES_PER_UNIT", 20 * 35)
    images = noise(50, 5, 7)
    source = tmp_path / ("in" if kind == "folder" else "in.npy")
    for i, image in enumerate(images):
        if kind == "folder":
            save(source / f"{i}.png", image)
    if kind == "npy":
        np.save(source, images)
    outputs = [source.with_stem(name) for name in ("queued", "plain")]
    device = Device(invert)
    report = refine_source(source, device, outputs[0], batch_size=4)
    assert report.images == 50 and device.ended == device.begun and not device.seen
    assert max(device.at_once) == 2  # one in work and the next
    assert report.busy["device"] == pytest.approx(0.005 * device.ended)
    refine_source(source, Fake(invert), outputs[1], batch_size=4)
    if kind == "folder":
        assert tree(outputs[0]) == tree(outputs[1])
    else:
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_images_larger_than_all_that_may_wait_go_through_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BYTES_IN_BATCHES", 10)
    np.save(tmp_path / "in.npy", noise(6, 5, 7))
    assert refine_source(tmp_path / "in.npy", Device(invert), tmp_path / "out.npy", batch_size=1).images == 6


class Several(Fake):
    """A refiner that three threads call at a time; its batches end in another order than they began."""

    threads = 3

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(change)
        self.begun = itertools.count()
        self.together = self.most = 0

    def shared(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        self.together += 1
        self.most = max(self.most, self.together)
        time.sleep(0.02 if next(self.begun) % 3 == 0 else 0.002)
        self.together -= 1
        return super().__call__(images, batch_size)


@pytest.mark.parametrize("kind", ["folder", "npy", "to npz", "to shards", "to folder"])
def test_batches_may_end_in_any_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 20)
    monkeypatch.setattr(unit_parts, "BYTES_PER_UNIT", 20 * 35)
    images = noise(90, 5, 7)
    source = tmp_path / ("in.npy" if kind in ("npy", "to folder") else "in")
    for i, image in enumerate(images):
        if source.suffix != ".npy":
            save(source / f"{i}.png", image)
            (source / f"{i}.txt").write_text(str(i))
    if source.suffix == ".npy":
        np.save(source, images)
    to = kind.removeprefix("to ") if kind.startswith("to ") else "same"
    suffix = {"npy": ".npy", "to npz": ".npz"}.get(kind, "")
    outputs = [tmp_path / f"{name}{suffix}" for name in ("several", "one")]
    several = Several(invert)
    report = refine_source(source, several, outputs[0], batch_size=4, to=to)
    assert report.images == 90 and several.most == 3 and report.threads["refine"] == 3
    refine_source(source, Fake(invert), outputs[1], batch_size=4, to=to)
    if suffix:
        assert outputs[0].read_bytes() == outputs[1].read_bytes()
    else:
        assert tree(outputs[0]) == tree(outputs[1])
    manifests = [state_of(output, bool(suffix)) / "blocks" for output in outputs]
    assert [path.read_bytes() for path in sorted(manifests[0].iterdir())] == [
        path.read_bytes() for path in sorted(manifests[1].iterdir())
    ]


@pytest.mark.parametrize("where", ["refiner", "write", "commit"])
def test_a_failure_in_any_thread_ends_the_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 20)
    for i, image in enumerate(noise(90, 5, 7)):
        save(tmp_path / "in" / f"{i}.png", image)
    calls, before = itertools.count(), threading.active_count()

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= 2:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return call

    refiner = Several(failing(invert) if where == "refiner" else invert)
    if where == "write":
        monkeypatch.setattr(FolderWriter, "put", failing(FolderWriter.put))
    if where == "commit":
        monkeypatch.setattr(RunDirectory, "commit", failing(RunDirectory.commit))
    with pytest.raises(OSError, match="No space left"):
        refine_source(tmp_path / "in", refiner, tmp_path / "out", batch_size=4)
    assert not (tmp_path / "out").exists()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_refiner(tmp_path / "r.safetensors", Refiner(1), histogram="keep", training=TrainConfig())
    np.save(tmp_path / "in.npy", noise(5_000, 35, 55))
    for device in ("cpu", "cuda"):
        report = refine(Job(tmp_path / "r.safetensors", tmp_path / "in.npy", tmp_path / f"{device}.npy", device=device))
        assert report.images == 5_000
        assert ("device" in report.busy) == (device == "cuda")
    found = [np.load(tmp_path / f"{device}.npy").astype(int) for device in ("cpu", "cuda")]
    assert np.abs(found[0] - found[1]).max() <= 1


# --- folders


def test_folder_keeps_names_pixels_depth_and_every_other_file(tmp_path: Path) -> None:
    root = tmp_path / "in"
    names = ["a/1.png", "a/2.tif", "a/16.png", "b c/é.tiff", os.fsdecode(b"new\nline \xff.png")]
    pixels = {
        name: save(root / name, noise(6, 9, dtype="uint16" if "16" in name or "tiff" in name else "uint8"))
        for name in names
    }
    others = {
        "a/1.json": b'{"gaze": "(0.1, 0.2)"}\r\n',
        "a/1.mask.npy": os.urandom(999),
        "coco.json": b"{}",
        "empty.txt": b"",
        os.fsdecode(b"new\nline \xff.txt"): b"\xff",
    }
    for name, content in others.items():
        (root / name).write_bytes(content)
    before = tree(root)

    report = refine_source(root, Fake(invert), tmp_path / "out", batch_size=2)

    assert tree(root) == before
    after = tree(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    for name in names:
        refined = read_image(tmp_path / "out" / name).pixels
        assert refined.dtype == pixels[name].dtype
        assert np.array_equal(refined, invert(pixels[name]))
    assert (report.images, report.failed, report.others) == (5, 0, len(others))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_identity_gives_identical_pixels(tmp_path: Path) -> None:
    pixels = {f"{i}.png": save(tmp_path / "in" / f"{i}.png", noise(5, 4 + i % 3)) for i in range(40)}
    report = refine_source(tmp_path / "in", Fake(), tmp_path / "out", batch_size=4)
    for name, expected in pixels.items():
        assert np.array_equal(read_image(tmp_path / "out" / name).pixels, expected)
    assert report.mean_change == 0


def test_colour(tmp_path: Path) -> None:
    pixels = save(tmp_path / "in" / "x.png", noise(5, 4, 3))
    refine_source(tmp_path / "in", Fake(invert, channels=3), tmp_path / "out")
    assert np.array_equal(read_image(tmp_path / "out" / "x.png").pixels, invert(pixels))


def test_jpeg_stays_jpeg_near_the_original(tmp_path: Path) -> None:
    slope = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(slope).save(tmp_path / "in" / "x.jpg", quality=95)
    original = read_image(tmp_path / "in" / "x.jpg")
    refine_source(tmp_path / "in", Fake(), tmp_path / "out")
    refined = read_image(tmp_path / "out" / "x.jpg")
    assert refined.header == original.header
    assert np.abs(refined.pixels.astype(int) - original.pixels).max() <= 2


def test_sizes_are_batched_together_wherever_they_stand_and_the_batch_never_matters(tmp_path: Path) -> None:
    for i in range(50):
        save(tmp_path / "in" / f"{i}.png", noise(4 + i % 2, 5))
    outputs = []
    for batch_size in (1, 8, 64):
        refiner = Fake(invert)
        out = tmp_path / f"out{batch_size}"
        refine_source(tmp_path / "in", refiner, out, batch_size=batch_size)
        outputs.append(tree(out))
        if batch_size == 8:
            assert sorted(refiner.seen) == [(1, 4, 5), (1, 5, 5), *[(8, 4, 5)] * 3, *[(8, 5, 5)] * 3]
    assert outputs[0] == outputs[1] == outputs[2]


def test_many_sizes_do_not_pile_up(tmp_path: Path) -> None:
    for i in range(30):
        save(tmp_path / "in" / f"{i}.png", noise(1 + i, 3))
    refiner = Fake()
    refine_source(tmp_path / "in", refiner, tmp_path / "out", batch_size=4)
    assert len(refiner.seen) == 30
    assert len(tree(tmp_path / "out")) == 30


def broken_folder(root: Path) -> Path:
    """Two good images; one truncated, one with other channels, one of no known format; each with a sidecar."""
    for name in ("1.png", "5.png"):
        save(root / name, noise(8, 8))
    save(root / "2.jpg", noise(64, 64))
    (root / "2.jpg").write_bytes((root / "2.jpg").read_bytes()[:1500])
    save(root / "3.png", noise(8, 8, 3))
    (root / "4.png").write_bytes(b"nothing")
    for i in range(1, 6):
        (root / f"{i}.json").write_text(str(i))
    return root


def test_skipping_leaves_out_bad_images_with_their_sidecars_and_says_so(tmp_path: Path) -> None:
    root = broken_folder(tmp_path / "in")
    report = refine_source(root, Fake(), tmp_path / "out", on_error="skip")
    assert set(tree(tmp_path / "out")) == {"1.png", "1.json", "5.png", "5.json"}
    assert (report.images, report.failed) == (2, 3)
    skipped = reasons(root, tmp_path / "out")
    assert skipped == [
        skipped[0],
        f"{root}/3.png: must have 1 channel(s), as the refiner has, got 3",
        f"{root}/4.png: cannot be recognised as PNG, JPEG or TIFF",
    ]
    assert skipped[0].startswith(f"{root}/2.jpg: cannot be decoded: image file is truncated")
    verify(tmp_path / "out")


@pytest.mark.parametrize("bad", ["2.jpg", "3.png", "4.png"])
def test_failing_names_the_file_and_leaves_nothing(bad: str, tmp_path: Path) -> None:
    root = broken_folder(tmp_path / "in")
    for name in {"2.jpg", "3.png", "4.png"} - {bad}:
        (root / name).unlink()
    with pytest.raises(InputError) as caught:
        refine_source(root, Fake(), tmp_path / "out")
    assert str(caught.value).startswith(f"{root}/{bad}: ")
    assert left(tmp_path) == ["in"]


def test_a_folder_without_one_good_image_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png", noise(3, 3, 3))
    with pytest.raises(InputError) as caught:
        refine_source(tmp_path / "in", Fake(), tmp_path / "out", on_error="skip")
    assert str(caught.value) == (
        f"{tmp_path}/in: at least one image must be readable, got 0: "
        f"{tmp_path}/in/x.png: must have 1 channel(s), as the refiner has, got 3"
    )
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(images: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    save(tmp_path / "in" / "x.png", noise(3, 3))
    with pytest.raises(KeyboardInterrupt):
        refine_source(tmp_path / "in", Fake(interrupt), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("change", [lambda x: x[:, :-1], lambda x: x.astype(np.int16)])
def test_a_refiner_that_changes_shape_or_type_is_caught(change: Callable, tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png", noise(3, 3))
    with pytest.raises(TypeError, match=r"refiner must return uint8\[1, 3, 3\], got"):
        refine_source(tmp_path / "in", Fake(change), tmp_path / "out")


# --- arrays


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2"])
def test_npz_copies_every_other_array_byte_for_byte(save_npz: Callable, dtype: str, tmp_path: Path) -> None:
    images = noise(10, 5, 7, dtype=np.dtype(dtype).name).astype(dtype)
    labels = {
        "gaze": RNG.normal(size=(10, 2)).astype(">f4"),
        "name": np.array([f"é{i}" for i in range(10)]),
        "fortran": np.asfortranarray(RNG.normal(size=(10, 3))),
    }
    save_npz(tmp_path / "a.npz", gaze=labels["gaze"], images=images, name=labels["name"], fortran=labels["fortran"])
    report = refine_source(tmp_path / "a.npz", Fake(invert), tmp_path / "b.npz", batch_size=4)

    old, new = members(tmp_path / "a.npz"), members(tmp_path / "b.npz")
    assert list(new) == list(old)
    assert {name: new[name] for name in new if name != "images.npy"} == {n: old[n] for n in old if n != "images.npy"}
    with np.load(tmp_path / "b.npz", allow_pickle=False) as loaded:
        assert loaded["images"].dtype == images.dtype
        assert np.array_equal(loaded["images"], np.iinfo(images.dtype).max - images)
        assert loaded["gaze"].dtype == labels["gaze"].dtype
    assert report.images == 10


def test_npy_in_npy_out(tmp_path: Path) -> None:
    images = noise(5, 6, 7, 3, dtype="uint16")
    np.save(tmp_path / "a.npy", images)
    refiner = Fake(channels=3)
    refine_source(tmp_path / "a.npy", refiner, tmp_path / "b.npy", batch_size=2)
    assert refiner.seen == [(2, 6, 7, 3), (2, 6, 7, 3), (1, 6, 7, 3)]
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


@pytest.mark.parametrize(
    "images", [noise(3, 4, 5, 1), np.asfortranarray(noise(3, 4, 5)), RNG.random((3, 4, 5), np.float32)]
)
def test_array_layouts(images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=images)
    refine_source(tmp_path / "a.npz", Fake(invert), tmp_path / "b.npz")
    loaded = ArrayImages(tmp_path / "b.npz").load()
    assert loaded.dtype == images.dtype
    assert np.array_equal(loaded, invert(images))


def test_mean_change_is_in_grey_levels_whatever_the_depth(tmp_path: Path) -> None:
    for name, images, step in [
        ("a", np.full((5, 3, 3), 100, np.uint8), 10),
        ("b", np.full((5, 3, 3), 100 * 257, np.uint16), 2570),
        ("c", np.full((5, 3, 3), 0.5, np.float32), np.float32(10 / 255)),
    ]:
        np.save(tmp_path / f"{name}.npy", images)

        def brighten(images: np.ndarray, step: float = step) -> np.ndarray:
            return (images + step).astype(images.dtype)

        output = tmp_path / f"{name}_out.npy"
        report = refine_source(tmp_path / f"{name}.npy", Fake(brighten), output, batch_size=2)
        assert report.mean_change == pytest.approx(10, abs=1e-3)


def test_other_channels_than_the_refiner(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(2, 3, 4, 3))
    with pytest.raises(InputError) as caught:
        refine_source(tmp_path / "a.npy", Fake(), tmp_path / "b.npy")
    assert str(caught.value) == f"{tmp_path}/a.npy: images must have 1 channel(s), as the refiner has, got 3"


def test_a_damaged_label_array_leaves_nothing(tmp_path: Path) -> None:
    gaze = RNG.normal(size=(4, 2))
    np.savez(tmp_path / "a.npz", images=noise(4, 3, 3), gaze=gaze)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(gaze.tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz: cannot be read as NumPy arrays: Bad CRC-32 for file 'gaze\.npy'"):
        refine_source(tmp_path / "a.npz", Fake(), tmp_path / "b.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_floats_out_of_range_are_named_and_leave_nothing(tmp_path: Path) -> None:
    images = np.zeros((9, 2, 2), np.float32)
    images[7] = 1.5
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(InputError, match=r"a\.npy: image 7: float images must be in \[0, 1\], got .*1.5"):
        refine_source(tmp_path / "a.npy", Fake(), tmp_path / "b.npy", batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


# --- output


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png", noise(3, 3))
    np.save(tmp_path / "a.npy", noise(2, 3, 3))
    save(tmp_path / "there" / "mine.png", noise(3, 3))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "again").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ("in", "in", "output must not be the input"),
        ("in", "again", "output must not be the input"),
        ("in", "in/out", f"output must not be inside the input {tmp_path}/in"),
        ("in", "again/out", f"output must not be inside the input {tmp_path}/in"),
        ("in", "", f"output must not contain the input {tmp_path}/in"),
        ("in", "there", "output must not exist yet; nothing is ever overwritten, and this is no run's"),
        ("in", "dangling", "output must not exist yet; nothing is ever overwritten, and this is no run's"),
        ("in", "out.npz", "output must be a folder, got the suffix .npz (--to npz makes one)"),
        ("a.npy", "a.npy", "output must not be the input"),
        ("a.npy", "out.npz", "output must end in .npy, as the input is one, got '.npz'"),
        ("a.npy", "out", "output must end in .npy, as the input is one, got ''"),
        ("a.npy", "a.npy/out.npy", f"output must not be inside the input {tmp_path}/a.npy"),
    ]
    for old, new, reason in cases:
        with pytest.raises(InputError) as caught:
            refine_source(tmp_path / old, Fake(), tmp_path / new)
        assert str(caught.value) == f"{tmp_path / new}: {reason}"
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        refine_source(tmp_path / "in", Fake(), tmp_path / "out", batch_size=0)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.png", noise(3, 3))
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        refine_source(tmp_path / "in", Fake(), tmp_path / "file" / "out")
    assert str(caught.value) == f"{tmp_path}/file/out: cannot be written: File exists ({tmp_path}/file)"
