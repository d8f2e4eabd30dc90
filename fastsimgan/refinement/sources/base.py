"""What every kind of source offers: fixed work units, each of samples (files) or of a range of images (arrays)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fastsimgan.data.formats.image_file import decode_image
from fastsimgan.data.formats.mask_detection import Census
from fastsimgan.data.formats.stored_image import StoredImage
from fastsimgan.data.pixel_values import Span
from fastsimgan.errors import InputError
from fastsimgan.refinement.sources.array_file import ArrayFile, ImageRange
from fastsimgan.refinement.sources.unit_parts import Sample, SourceIdentity
from fastsimgan.storage.names import printable


class Source(Protocol):
    """What a run reads. Its work units are fixed when the run starts.

    A unit's images are files, which `samples` gives and `decode` decodes, or a range of an array, which `images` gives.
    """

    kind: str  # what ``--to same`` makes: "folder", "shards", "npz", "npy" or "hdf5"
    path: Path
    identity: SourceIdentity
    array_file: ArrayFile | None = None  # where images go from array to array, all of one size
    encoded: bool = True  # images are decoded from files
    linkable: bool = False  # labels are files that hard links can be made to
    began_before: bool = False  # the run had begun, and this source has kept a listing since
    in_shards: bool = False  # a file's name in a tree begins with that of the shard that it is out of

    @property
    def work_units(self) -> int:
        """How many there are; known after `prepare` or `attach`."""

    def prepare(self, state: Path) -> None:
        """Make ready for a new run, whose records go into ``state``.

        Raises:
            InputError: if this cannot be refined.
        """
        return None

    def attach(self, state: Path) -> None:
        """Make ready for a run that has begun. Nothing to do where a change shows in the identity.

        Raises:
            InputError: if this is no longer what it was.
        """
        return None

    def refuse_changes(self, state: Path) -> None:
        """Look at each file again, where no identity tells of its size and time.

        Raises:
            InputError: naming the first that is no longer as it was at the run's start.
        """
        return None

    def towards(self, to: str) -> Source:
        """The source as which this is read if the output is of kind ``to``.

        Raises:
            InputError: if it cannot become that.
        """
        return self

    def check_channels(self, channels: int) -> None:
        """Raise InputError if all images are known to have others than a refiner's ``channels``."""
        return None

    def samples(self, work_unit: int) -> Iterator[Sample]:
        """One unit's samples, in order, where `images` gives None.

        Raises:
            InputError: if they cannot be read.
        """
        return iter(())

    def images(self, work_unit: int, span: Span) -> ImageRange | None:
        """One unit's images, floats in ``span``, where they are in an array; None where they are files."""
        return None

    def decode(self, sample: Sample, data: bytes, span: Span | None) -> StoredImage:
        """A sample's image from its bytes, floats in ``span``.

        Raises:
            InputError: if it cannot be decoded.
        """
        return decode_image(data, sample.where, key=None, span=span)

    def unit_sha256(self, work_unit: int) -> str | None:
        """SHA-256 of the one file that a unit is; None where each of its files has its own in the manifest."""
        return None

    def shard(self, work_unit: int) -> Path | None:
        """The shard that a unit is; None where it is none."""
        return None

    def shard_name(self, work_unit: int) -> str | None:
        """Of the shard that a unit is to become; None for one of files that no shard takes."""
        return f"{work_unit:08d}.tar"

    def describe(self) -> str:
        """What was found, in one line."""


def refuse_unread(where: Path, census: Census) -> None:
    """Raise InputError if pictures of kinds that are not read would come out as they are among refined ones."""
    if unread := census.unread_text():
        raise InputError(
            f"{printable(where)}: {unread}: they would come out unrefined among refined ones; convert them (magick "
            "mogrify -format png), or --images 'GLOB' tells which files are images and leaves these as they are"
        )
