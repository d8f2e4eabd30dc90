"""A set of images with labels of every kind beside each, as a folder and as shards; odd names, so that none is lost."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from builders import add, png

COUNT = 47
SIZE = 5, 7
SUFFIX = {"npz": ".npz", "hdf5": ".h5"}


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, SIZE, dtype=np.uint8)


def gaze(i: int) -> list[float]:
    return np.random.default_rng(i).normal(size=2).tolist()


def sidecars(i: int) -> dict[str, bytes]:
    label = {"pitch_yaw": gaze(i), "label": i % 3, "left": i % 2 == 0, "who": f"é{i}", "nested": {"a": 1}}
    found = {"json": json.dumps(label).encode(), "txt": b"\r\n\0\xff" * (i % 3)}
    return found | ({"mask.png": png(pixels(i)), "npy": b"\0" * 9} if i % 5 == 0 else {})


def make_folder(path: Path, count: int = COUNT) -> Path:
    for i in range(count):
        folder = path / f"d {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"new\nline {i}.png").write_bytes(png(pixels(i)))
        for kind, data in sidecars(i).items():
            (folder / f"new\nline {i}.{kind}").write_bytes(data)
    (path / "classes.txt").write_bytes(b"of nobody")
    (path / "empty").touch()
    return path


def make_shards(path: Path, count: int = COUNT) -> Path:
    path.mkdir()
    for first in range(0, count, 20):
        with tarfile.open(path / f"s{first:03d}.tar", "w") as tar:
            folder = tarfile.TarInfo("d")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for i in range(first, min(count, first + 20)):
                add(tar, f"./d/{i}.png", png(pixels(i)))
                for kind, data in sidecars(i).items():
                    add(tar, f"./d/{i}.{kind}", data)
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {"folder": make_folder, "shards": make_shards}


def number(name: str) -> int:
    """Of the image that a file or member is, or belongs to."""
    return int(name.rpartition("/")[2].partition(".")[0].removeprefix("new\nline "))
