"""A refiner on a CUDA device that is handed the next batch before it has given back the last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastsimgan.runtime.refiner import Refiner


class StreamedRefiner:
    """`Refiner` for `fastsimgan.pipeline`, on a stream of its own, between pinned host batches.

    The host has one batch prepared and queued while the device works at another, so that the device need not wait
    between them. Written to the contract; not yet run on a GPU.
    """

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner
        self.channels = refiner.channels
        self.backend_name = refiner.backend.name
        self.device = refiner.device
        self._stream = torch.cuda.Stream(refiner.device)

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """As `Refiner` has it."""
        refined: np.ndarray = self.refiner(images, batch_size)
        return refined

    def begin(self, images: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        """Queue one batch ``[N, H, W]`` or ``[N, H, W, C]``; the function that comes back waits for it.

        That gives the refined batch, of the same shape and type, and the seconds that the device was at it, copies
        included. Raises InputError as `Refiner` does; floats are looked at at once, which waits for the device.
        """
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            pinned = torch.from_numpy(images).pin_memory()
            planes = pinned[:, None] if pinned.ndim == 3 else pinned.permute(0, 3, 1, 2)
            started.record(self._stream)
            refined = self.refiner(planes.to(self.device, non_blocking=True), len(images))
            refined = refined[:, 0] if pinned.ndim == 3 else refined.permute(0, 2, 3, 1)
            host = torch.empty(pinned.shape, dtype=pinned.dtype, pin_memory=True)
            host.copy_(refined, non_blocking=True)
            ended.record(self._stream)

        def finish() -> tuple[np.ndarray, float]:
            ended.synchronize()
            return host.numpy(), started.elapsed_time(ended) / 1e3

        return finish
