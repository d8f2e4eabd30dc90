"""A refiner on a CPU that has every core at a batch of its own.

All cores at one batch wait for each other after every layer, and where something else runs on one of them, as the other
stages of a pipeline do, they wait at a loss: on two busy cores that took three to seven times as long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastsimgan.inference import Refiner

LARGE = 1 << 20  # pixels of an image from which its features fill the memory, if every core has one of them


class CoreRefiner:
    """`Refiner` for `refinement.worker`. The bytes are the same, however many threads.

    Args:
        load: loads the refiner; it runs on as many threads as torch has then and in each call.
        threads: that call it at a time.
    """

    def __init__(self, load: Callable[[], Refiner], threads: int) -> None:
        self.threads = threads
        self._load = load
        with _torch_threads(1):
            self._refiner = load()
        self._whole: Refiner | None = None  # for large images
        self._alone = threading.Lock()
        self.channels, self.span = self._refiner.channels, self._refiner.span
        self.backend_name = self._refiner.backend.name
        self.device = self._refiner.device
        self.device_name = str(self.device)

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """As `Refiner` has it; large images are refined by one caller at a time, on all cores."""
        if self.threads == 1 or images.shape[1] * images.shape[2] < LARGE:
            return self._refiner(images, batch_size)
        with self._alone, _torch_threads(self.threads):
            if self._whole is None:
                self._whole = self._load()
            return self._whole(images, batch_size)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Held by the thread that starts those that call this refiner, so that each of them has one core."""
        cudnn = torch.backends.cudnn
        kept = cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, cudnn.allow_tf32
        # these are the process's own, and where several calls set them for a while, the last may put back another's
        with cudnn.flags(*kept), _torch_threads(1):
            yield


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads for this thread and those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
