"""HDF5 files: refined images, every other dataset, group and attribute as it was; nothing read from other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Invert

from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.verification import verify

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
RNG = np.random.default_rng(0)


def run(tmp_path: Path, name: str = "in.h5") -> Path:
    (tmp_path / "model").write_bytes(b"weights")
    output = tmp_path / "out.h5"
    refine(Job(tmp_path / "model", tmp_path / name, output), loader=lambda *_: Invert())
    return output


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 5, 7), "compression": "gzip", "shuffle": True}])
@pytest.mark.parametrize("dtype", ["uint8", ">u2"])
def test_labels_groups_and_attributes_travel(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9, 5, 7)).astype(dtype)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("images", data=images, **options).attrs["camera"] = "left"
        file["gaze"] = RNG.normal(size=(9, 2)).astype(">f4")
        file["meta/name"] = [f"é{i}" for i in range(9)]
        file["meta"].attrs["unit"] = "rad"
        file["alias"] = h5py.SoftLink("/gaze")
        file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/x")
        file.attrs["version"] = 3
    output = run(tmp_path)
    assert verify(output).images == 9
    with h5py.File(tmp_path / "in.h5") as old, h5py.File(output) as new:
        assert new["images"].dtype == images.dtype and np.array_equal(new["images"][()], np.iinfo(dtype).max - images)
        assert new["images"].chunks == old["images"].chunks and new["images"].compression == old["images"].compression
        assert new["gaze"].dtype == old["gaze"].dtype and new["gaze"][()].tobytes() == old["gaze"][()].tobytes()
        assert list(new["meta/name"][()]) == list(old["meta/name"][()])
        assert (new["images"].attrs["camera"], new["meta"].attrs["unit"], new.attrs["version"]) == ("left", "rad", 3)
        assert new.get("alias", getlink=True).path == "/gaze"
        assert new.get("elsewhere", getlink=True).filename == "/etc/passwd"  # carried along, never opened


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((3, 5, 7), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3, 5, 7))
    file.create_virtual_dataset("images", layout)


HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "none": (lambda file: file.create_dataset("pictures", data=[1]), "must hold an array named images, got pictures"),
    "link": (
        lambda file: file.__setitem__("images", h5py.ExternalLink("/etc/passwd", "/x")),
        "must hold an array named images, got ",
    ),
    "virtual": (virtual, "images must lie in the file itself, got external or virtual data"),
    "external": (
        lambda file: file.create_dataset("images", (3, 5, 7), "u1", external=[("/etc/passwd", 0, 105)]),
        "images must lie in the file itself, got external or virtual data",
    ),
    "group": (lambda file: file.create_group("images"), "must hold an array named images, got "),
    "type": (
        lambda file: file.create_dataset("images", data=np.zeros((3, 5, 7), int)),
        "images must be uint8, uint16 or float32 in [0, 1], got int64: astype(np.uint8)",
    ),
    "shape": (
        lambda file: file.create_dataset("images", data=np.zeros((3, 1, 5, 7), np.uint8)),
        "images must be [N, H, W] or [N, H, W, C] with C from 1 to 4, got shape (3, 1, 5, 7)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    with h5py.File(tmp_path / "in.h5", "w") as file:
        make(file)
    with pytest.raises(InputError) as caught:
        run(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/in.h5: {message}")
    assert not (tmp_path / "out.h5").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match=r"in\.h5: cannot be read as HDF5: "):
        run(tmp_path)


def test_damaged_pixels_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (60, 20, 20), dtype=np.uint8) // 8
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(10, 20, 20), compression="gzip")
    data = bytearray((tmp_path / "in.h5").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 500] = bytes(500)
    (tmp_path / "in.h5").write_bytes(data)
    with pytest.raises(InputError, match=r"in\.h5: cannot be read as HDF5: "):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "model"]
