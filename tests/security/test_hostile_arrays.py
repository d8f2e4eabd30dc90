"""Array files that someone sends: nothing of another file comes out of them, and damage is never refined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Identity

from fastsimgan.data.formats.open_images import open_arrays, open_images
from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["external", "virtual"])
@pytest.mark.parametrize("name", ["images", "gaze", "files/a.json", "group/deep/labels"])
def test_hdf5_takes_nothing_from_another_file(kind: str, name: str, model: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 4)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros(IMAGES.shape, np.uint8) if name == "images" else np.arange(12, dtype=np.uint8)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        if name != "images":
            file["images"] = IMAGES
        shape = IMAGES.shape if name == "images" else (12,)
        if kind == "external":
            file.create_dataset(name, shape, np.uint8, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(shape, np.uint8)
            layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", shape)
            file.create_virtual_dataset(name, layout)
    with pytest.raises(InputError, match=f"{name} must lie in the file itself, got external or virtual data"):
        open_images(tmp_path / "in.h5")
    for to, output in (("same", "out.h5"), ("folder", "out"), ("npz", "out.npz")):
        job = Job(model, tmp_path / "in.h5", tmp_path / output, to=to)
        with pytest.raises(InputError, match="must lie in the file itself"):
            refine(job, loader=lambda *_: Identity())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5", "other.h5", "refiner.safetensors", "secret"]


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_never_refined(packed, model: Path, tmp_path: Path) -> None:
    """One flipped bit, anywhere in the file: refused, or (in what nobody reads) the same images and labels.

    The images are larger than what zipfile reads ahead, which has it check their checksum by chance.
    """
    source = tmp_path / "in.npz"
    images, gaze = (
        np.random.default_rng(0).integers(0, 256, (40, 30, 20), dtype=np.uint8),
        np.arange(80.0).reshape(40, 2),
    )
    packed(source, images=images, gaze=gaze)
    whole = source.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for number, place in enumerate(rng.integers(0, 8 * len(whole), 30).tolist()):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        source.write_bytes(data)
        output = tmp_path / f"out{number}.npz"
        try:
            refine(Job(model, source, output), loader=lambda *_: Identity())
        except InputError:
            refused += 1
            continue
        with np.load(output) as out:
            assert np.array_equal(out["images"], images), place
            assert np.array_equal(out["gaze"], gaze), place
    assert refused > 25


def test_hdf5_key_through_a_link_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["group/images"] = IMAGES
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["images"] = IMAGES
        file["link"] = h5py.ExternalLink("other.h5", "/group")
    with pytest.raises(InputError, match="got a link"):
        open_arrays(tmp_path / "in.h5", "link/images")
