"""A pipe in the place of an input is refused in one line; opening it would wait for a writer for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsimgan.data.formats.image_file import read_bytes
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.errors import InputError
from fastsimgan.storage.regular_file import read_regular


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hang ends as a failure, not as a suite that never ends."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", ["in.npz", "in.npy", "in.h5", "in.tar"])
def test_a_pipe_is_no_packed_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="must be a regular file"):
        open_images(tmp_path / name)


@pytest.mark.parametrize("read", [read_bytes, read_regular])
def test_a_pipe_is_no_image_and_no_label(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="must be a regular file"):
        read(tmp_path / "a.png")
