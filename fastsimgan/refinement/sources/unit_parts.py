"""What work units are made of: samples, their parts, and how much goes into one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from tarfile import TarInfo

import numpy as np

from fastsimgan.data.formats.image_file import read_bytes
from fastsimgan.data.formats.stored_image import StoredImage
from fastsimgan.errors import InputError
from fastsimgan.refinement.records import named

SAMPLES_PER_UNIT = 1024  # a kill loses a few seconds' work, and ten million files make ten thousand manifests
BYTES_PER_UNIT = 1 << 24  # of packed images


@dataclass(frozen=True)
class Part:
    """One file of a sample: on the disk (``path``), or read already (``data``), then with its tar header."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    info: TarInfo | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a shard's entry of a folder, which holds nothing."""
        return self.info is not None and self.info.isdir()

    def read(self) -> bytes:
        """All of it.

        Raises:
            InputError: if it cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        return read_bytes(self.path)


@dataclass(frozen=True)
class Sample:
    """An image with its sidecars, encoded as the source has them, or parts with no image among them."""

    position: int  # in its work unit
    parts: tuple[Part, ...]
    image: int | None  # which part
    where: Path  # what an error about the image is to name


@dataclass(frozen=True)
class Decoded:
    """A sample with its decoded image (None where it has none), or with what is wrong with it."""

    sample: Sample
    image: StoredImage | None = None
    sha256: str = ""  # of the encoded image
    error: InputError | None = None
    unfit: bool = False  # a good image that this refiner does not take: the others will be no better

    def with_pixels(self, pixels: np.ndarray) -> Decoded:
        """The same with other pixels in its image."""
        assert self.image is not None
        return replace(self, image=replace(self.image, pixels=pixels))

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory: what was read, and its pixels."""
        data = sum(len(part.data) for part in self.sample.parts if part.data is not None)
        return data + (0 if self.image is None else self.image.pixels.nbytes)


@dataclass(frozen=True)
class SourceIdentity:
    """What makes two sources the same one, as far as it is known without a listing."""

    path: str = field(metadata=named("input"))
    kind: str = field(metadata=named("input kind"))


def absolute(path: Path) -> str:
    """A path as identities have it."""
    return os.path.realpath(path)


def units_of(samples: int) -> int:
    """Work units that so many samples make."""
    return -(-samples // SAMPLES_PER_UNIT)
