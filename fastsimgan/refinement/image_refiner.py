"""What a worker asks of a refiner, and how it drives any. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import numpy as np

from fastsimgan.data.pixel_values import UNIT, Span

BATCHES_QUEUED = 2  # in a device: one in work and the next

Wait = Callable[[], tuple[np.ndarray, float | None]]
"""Waits for a batch: the refined images, and the device's seconds where there is one."""


class ImageRefiner(Protocol):
    """The least: `fastsimgan.inference.Refiner`, or anything that looks like it."""

    channels: int  # of the images it takes
    # ``span``, where it has one: the range of the floats that it takes, if that is not [0, 1]
    # ``device_name`` and ``backend_name``, where it has them: for the manifests

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16 or float32 in [0, 1] -> the same shape and type."""


@runtime_checkable
class ParallelRefiner(ImageRefiner, Protocol):
    """A refiner that several threads call at a time: `fastsimgan.inference.per_core`."""

    threads: int

    def shared(self) -> AbstractContextManager[None]:
        """Held by the thread that starts those threads, for as long as they call."""


@runtime_checkable
class QueuedRefiner(ImageRefiner, Protocol):
    """A refiner that takes a batch before it has given back the last: `fastsimgan.inference.cuda_stream`."""

    def begin(self, images: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        """Queue a batch. The function that comes back waits for it: the batch, and the device's seconds."""


@runtime_checkable
class DeviceRefiner(QueuedRefiner, Protocol):
    """One that can be made ready for batches of one size, and knows the device's memory."""

    def warm_up(self, batch_size: int, height: int, width: int) -> None:
        """Compile for that size, and allocate."""

    def peak_bytes(self) -> int:
        """The most memory that the device has given to this process at a time."""


class RefinerDriver:
    """Any refiner, as a worker drives it: ``threads`` threads, each with ``depth`` batches begun at most.

    What a refiner does not offer is done without, here and nowhere else.
    """

    def __init__(self, refiner: ImageRefiner) -> None:
        self.refiner = refiner
        self.channels = refiner.channels
        self.span: Span = getattr(refiner, "span", UNIT)
        self.device_name = str(getattr(refiner, "device_name", "cpu"))
        self.backend_name = str(getattr(refiner, "backend_name", ""))
        self._parallel = refiner if isinstance(refiner, ParallelRefiner) else None
        self._queued = refiner if isinstance(refiner, QueuedRefiner) else None
        self._device = refiner if isinstance(refiner, DeviceRefiner) else None
        self.threads = 1 if self._parallel is None else self._parallel.threads
        self.is_queued = self._queued is not None
        self.depth = 1 if self._queued is None else BATCHES_QUEUED

    def shared(self) -> AbstractContextManager[None]:
        """Held by the thread that starts those that call, for as long as they do."""
        return nullcontext() if self._parallel is None else self._parallel.shared()

    def begin(self, images: np.ndarray) -> Wait:
        """Begin a batch, ``[N, H, W]`` or ``[N, H, W, C]``; the function that comes back waits for it."""
        if self._queued is not None:
            return self._queued.begin(images)
        refined = self.refiner(images, len(images))
        return lambda: (refined, None)

    def warm_up(self, batch_size: int, height: int, width: int) -> None:
        """Make ready for batches of one size, where a device has to be."""
        if self._device is not None:
            self._device.warm_up(batch_size, height, width)

    def peak_bytes(self) -> int:
        """The most memory that a device has given to this process at a time; 0 without one."""
        return 0 if self._device is None else self._device.peak_bytes()
