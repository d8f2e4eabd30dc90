"""A refiner on a CUDA device that is handed the next batch before it has given back the last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastsimgan.hardware.device import short_of_memory
from fastsimgan.inference.refiner import Refiner

SMALLER = "a lower --batch-size takes less; a run keeps the one that it began with, so name another --output too"


class StreamedRefiner:
    """`Refiner` for `refinement.worker`, on a stream of its own, between pinned host batches.

    The host has one batch prepared and queued while the device works at another, so that the device need not wait
    between them. Written to the contract; not yet run on a GPU.

    Attributes: ``channels``, ``device``, ``backend_name``, and ``device_name`` (the GPU's, whichever index it has).
    """

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self.channels, self.span = refiner.channels, refiner.span
        self.backend_name = refiner.backend.name
        self.device = refiner.device
        self.device_name = f"cuda ({torch.cuda.get_device_name(refiner.device)})"
        self._stream = torch.cuda.Stream(refiner.device)
        # the weights were moved and rounded on the stream that is current, which this one does not wait for by itself
        self._stream.wait_stream(torch.cuda.current_stream(refiner.device))

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """As `Refiner` has it."""
        with short_of_memory(self.device, SMALLER):
            refined: np.ndarray = self.refiner(images, batch_size)
        return refined

    def warm_up(self, batch_size: int, height: int, width: int) -> None:
        """As `Refiner` has it."""
        with short_of_memory(self.device, SMALLER), torch.cuda.stream(self._stream):
            self.refiner.warm_up(batch_size, height, width)

    def peak_bytes(self) -> int:
        """The most device memory that this process has held at a time, allocator's reserves included."""
        return torch.cuda.max_memory_reserved(self.device)

    def begin(self, images: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        """Queue one batch ``[N, H, W]`` or ``[N, H, W, C]``; the function that comes back waits for it.

        That gives the refined batch, of the same shape and type, and the seconds that the device was at it, copies
        included. Raises InputError as `Refiner` does, and UnavailableError where the device is short of memory.
        """
        planes = torch.from_numpy(images)
        planes = planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2)
        self.refiner.check(planes, images.shape)
        self.refiner.check_range(planes)  # here, on the host: on the device it would have to be waited for
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the stream makes its device the current one
        with short_of_memory(self.device, SMALLER), torch.cuda.stream(self._stream):
            pinned = planes.permute(0, 2, 3, 1).contiguous().pin_memory()
            started.record(self._stream)
            refined = self.refiner.run(pinned.permute(0, 3, 1, 2).to(self.device, non_blocking=True))
            host = torch.empty(pinned.shape, dtype=pinned.dtype, pin_memory=True)
            host.copy_(refined.permute(0, 2, 3, 1), non_blocking=True)
            ended.record(self._stream)

        def finish() -> tuple[np.ndarray, float]:
            ended.synchronize()
            return host.view(images.shape).numpy(), started.elapsed_time(ended) / 1e3

        return finish
