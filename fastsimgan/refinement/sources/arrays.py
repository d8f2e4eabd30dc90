"""An ``.npz``, ``.npy`` or HDF5 file, whose images go from array to array."""

from __future__ import annotations

from fastsimgan.data.pixel_values import Span
from fastsimgan.refinement.sources.array_file import ArrayFile, ImageRange
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.unpacked import UnpackedSource


class ArraysSource(Source):
    """An ``.npz``, ``.npy`` or HDF5 file: a work unit is a range of images."""

    encoded = False

    def __init__(self, file: ArrayFile) -> None:
        self.array_file: ArrayFile = file
        self.path = file.path
        self.kind = file.kind
        self.identity = file.identity

    @property
    def work_units(self) -> int:
        """How many there are."""
        return self.array_file.work_units

    def towards(self, to: str) -> Source:
        """These arrays, or the files that they are to become.

        Raises:
            InputError: if they cannot become that.
        """
        if to in ("folder", "shards"):
            return UnpackedSource(self.array_file)
        if to == "npz":
            self.array_file.only_arrays("an .npz")
        return self

    def check_channels(self, channels: int) -> None:
        """Raise InputError if the images have others than a refiner's ``channels``."""
        self.array_file.check_channels(channels)

    def images(self, work_unit: int, span: Span) -> ImageRange | None:
        """One unit's images, floats in ``span``.

        Raises:
            InputError: if they cannot be read.
        """
        return ImageRange(self.array_file, work_unit, span)

    def describe(self) -> str:
        """What was found, in one line. Reads no pixels."""
        return self.array_file.arrays.describe()
