"""Sets larger than half of the memory are decoded into a nameless file, whatever they come from."""

import errno
import io
import os
import tarfile
import tempfile

import numpy as np
import pytest
from PIL import Image

from fastsimgan.data.formats.open_images import open_images
from fastsimgan.errors import InputError
from fastsimgan.hardware import memory as module


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 6, 5), dtype=np.uint8)


def write(kind, path, images):
    if kind == "hdf5":
        h5py = pytest.importorskip("h5py", reason="h5py is not installed")
        with h5py.File(path / "a.h5", "w") as file:
            file.create_dataset("images", data=images, chunks=(4, 6, 5))
        return path / "a.h5"
    if kind == "folder":
        for number, image in enumerate(images):
            Image.fromarray(image).save(path / f"{number}.png")
        return path
    for shard, part in enumerate((images[:4], images[4:])):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for number, image in enumerate(part):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "png")
                for name, data in ((f"{number}.png", buffer.getvalue()), (f"{number}.txt", b"label")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "shards", "hdf5"])
@pytest.mark.parametrize("memory", [539, 540])
def test_what_takes_more_than_half_of_the_memory_is_mapped(kind, memory, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    (tmp_path / "in").mkdir()
    loaded = open_images(write(kind, tmp_path / "in", images)).load()
    assert images.nbytes == 270 and isinstance(loaded, np.memmap) == (memory == 539)
    assert np.array_equal(loaded, images)
    assert not list((tmp_path / "t").iterdir())  # whatever becomes of the process, nothing stays


def test_a_full_disk_is_said_before_anything_is_decoded(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "available_memory", lambda: 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    source = open_images(write("folder", tmp_path, images))
    with pytest.raises(InputError, match=r"must fit half of the memory or the disk of .* \(TMPDIR\): No space left"):
        source.load()


def test_available_memory_is_that_of_the_machine():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < module.available_memory() <= physical


@pytest.mark.parametrize("damage", ["no tar", "cut short"])
def test_a_damaged_later_shard_is_named(damage, images, tmp_path):
    write("shards", tmp_path, images)
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(b"x" * 2048 if damage == "no tar" else data[:700])
    with pytest.raises(InputError, match=r"1\.tar: c"):
        open_images(tmp_path).load()
