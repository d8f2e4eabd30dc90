"""What several test modules share: refiners that cost nothing, sets of images of every kind, and what an output holds.

Workers in other processes import it by this name.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsimgan.refinement.job import Job


class Identity:
    """A refiner that changes nothing."""

    channels = 1

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        return images


class Invert:
    """A refiner that changes every pixel. ``delay``: seconds a batch, which give a kill something to hit."""

    def __init__(self, channels: int = 1, delay: float = 0.0) -> None:
        self.channels = channels
        self.delay = delay

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        time.sleep(self.delay)
        return (1 if images.dtype == np.float32 else np.iinfo(images.dtype).max) - images


def load_invert(job: Job, worker: int, workers: int) -> Invert:
    if "MARK" in os.environ:
        Path(os.environ["MARK"]).touch()  # a worker is about to claim its first block
    return Invert(delay=float(os.environ.get("DELAY", "0")))


class Inverts(Invert):
    """Called by two threads at a time."""

    threads = 2

    def shared(self) -> AbstractContextManager[None]:
        return nullcontext()


def load_inverts(job: Job, worker: int, workers: int) -> Invert:
    return Inverts(delay=2 * load_invert(job, worker, workers).delay)


def load_dying(job: Job, worker: int, workers: int) -> Invert:
    """The first to come dies, as if killed for memory; whoever comes next finds the mark and lives."""
    try:
        (job.output.parent / "mark").touch(exist_ok=False)
    except FileExistsError:
        return Invert()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def load_mortal(job: Job, worker: int, workers: int) -> Invert:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def make_folder(root: Path, count: int, seed: int = 0, sizes: int = 3) -> Path:
    """Images of ``sizes`` sizes with sidecars, in three folders, with a file that belongs to none."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = root / f"d{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4 + i % sizes, 7), dtype=np.uint8)).save(path, compress_level=1)
        path.with_suffix(".json").write_text(f'{{"gaze": {rng.random()}}}')
        if i % 7 == 0:
            path.with_suffix(".mask.npy").write_bytes(rng.bytes(40))
    (root / "README").write_text("of nobody")
    return root


def make_shards(root: Path, count: int, seed: int = 0, sizes: int = 3) -> Path:
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    for first in range(0, count, 20):
        with tarfile.open(root / f"s{first:05d}.tar", "w") as tar:
            for i in range(first, min(count, first + 20)):
                add(tar, f"{i:05d}.png", png(rng.integers(0, 256, (4 + i % sizes, 7), dtype=np.uint8)))
                add(tar, f"{i:05d}.json", f'{{"gaze": {rng.random()}}}'.encode())
    (root / "README").write_text("beside the shards")
    return root


def make_npz(path: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=rng.integers(0, 256, (count, 5, 7), dtype=np.uint8), gaze=rng.random((count, 2)))
    return path


def make_npy(path: Path, count: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 256, (count, 5, 7), dtype=np.uint8))
    return path


def make_hdf5(path: Path, count: int, seed: int = 0) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=rng.integers(0, 256, (count, 5, 7), dtype=np.uint8), chunks=(16, 5, 7))
        file["gaze"] = rng.random((count, 2))
    return path


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


MAKERS: dict[str, tuple[Callable[[Path, int, int], Path], str]] = {
    "folder": (make_folder, ""),
    "shards": (make_shards, ""),
    "npz": (make_npz, ".npz"),
    "npy": (make_npy, ".npy"),
    "hdf5": (make_hdf5, ".h5"),
}
CONVERSIONS = {"folder": ("npz", "shards"), "shards": ("hdf5", "npz"), "npz": ("folder",), "hdf5": ("shards",)}


def content(output: Path) -> dict[str, str]:
    """SHA-256 of every file of an output, manifests included."""
    if output.is_file():
        state = output.with_name(output.name + ".fastsimgan")
        return content(state) | {"": hashlib.sha256(output.read_bytes()).hexdigest()}
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in ("run.json", "listing.json")]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
