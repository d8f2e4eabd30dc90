"""Where the images of training live, and where batches of them are gathered: on the device, or ahead on the host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimgan.data.ragged import Images, RaggedImages, Size, crop_of
from fastsimgan.data.sampler import Sampler


class ResidentImages:
    """Images kept on the device as they are stored; a batch is drawn and gathered there.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``.
        sampler: on ``device``.
        device: where.
    """

    def __init__(self, images: NDArray[Any], sampler: Sampler, device: torch.device) -> None:
        if isinstance(images, np.memmap) or not images.flags.writeable:
            images = np.array(images)  # torch wants memory that it may write to
        self._stored = planes(torch.from_numpy(images)).contiguous().to(device)
        self.sampler = sampler

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]``, as stored."""
        # not `[...]`: on CUDA that knows no uint16
        return self._stored.index_select(0, self.sampler.draw(count))


class ResidentCrops:
    """Images of any sizes, packed on the device as they are stored; random crops of one size are gathered there.

    Args:
        images: the set.
        sampler: on ``device``.
        device: where.
        size: (height, width) of the crops, at most each image's.
    """

    def __init__(self, images: RaggedImages, sampler: Sampler, device: torch.device, size: Size) -> None:
        pixels = images.flat.reshape(-1, images.channels)
        if isinstance(pixels, np.memmap) or not pixels.flags.writeable:
            pixels = np.array(pixels)
        self._pixels = torch.from_numpy(pixels).to(device)
        # of each image: its first pixel, its width, and how many rows and columns a crop may begin at
        table = np.column_stack([images.starts // images.channels, images.sizes[:, 1], images.sizes - size + 1])
        self._table = torch.from_numpy(table).to(device)
        self._rows = torch.arange(size[0], device=device)[:, None]
        self._columns = torch.arange(size[1], device=device)
        self._size = size
        self.sampler = sampler

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, h, w]``, as stored."""
        indices, positions = self.sampler.draw_at(count)
        first, width, rows, columns = self._table.index_select(0, indices).unbind(1)
        top, left = self.sampler.corners(positions, rows, columns)
        corner, width = (values.view(-1, 1, 1) for values in (first + top * width + left, width))
        places = corner + self._rows * width + self._columns  # [count, h, w]
        crops = self._pixels.index_select(0, places.view(-1))
        return crops.view(count, *self._size, -1).permute(0, 3, 1, 2)


class HostImages:
    """Images that stay in host memory or in a memory-mapped file; a thread gathers the next ones meanwhile.

    What is gathered goes through pinned memory to a CUDA device while that computes.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``, perhaps a ``numpy.memmap``, or of any sizes.
        sampler: on the CPU; it is read ahead of what has been drawn.
        device: where the batches go.
        ahead: images gathered at a time.
        size: (height, width) of the random crops that are gathered, if images are of any sizes.
    """

    def __init__(
        self, images: Images, sampler: Sampler, device: torch.device, ahead: int, size: Size | None = None
    ) -> None:
        self._images, self._device, self._ahead, self._size = images, device, ahead, size
        self._reader = sampler
        #: says how far *drawing* has come; setting it starts reading anew from there
        self.sampler = _Consumed(sampler, self._forget)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._coming: Future[Tensor] | None = None
        self._ready = torch.empty(0)

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]``, as stored."""
        parts, missing = [], count
        while missing:
            if not len(self._ready):
                chunk = self._coming or self._thread.submit(self._gather)
                self._ready = planes(chunk.result().to(self._device, non_blocking=True))
                self._coming = self._thread.submit(self._gather)
            parts.append(self._ready[:missing])
            self._ready = self._ready[missing:]
            missing -= len(parts[-1])
        self.sampler.drawn(count)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _gather(self) -> Tensor:
        indices, positions = self._reader.draw_at(self._ahead)
        images, pin = self._images, self._device.type == "cuda"
        dtype = getattr(torch, images.dtype.name)
        if not isinstance(images, RaggedImages):
            chunk = torch.empty((len(indices), *images.shape[1:]), dtype=dtype, pin_memory=pin)
            np.take(images, indices.numpy(), axis=0, out=chunk.numpy())
            return chunk
        assert self._size is not None
        chosen = indices.tolist()
        rows, columns = torch.from_numpy(images.sizes[chosen] - self._size + 1).unbind(1)
        tops, lefts = (found.tolist() for found in self._reader.corners(positions, rows, columns))
        chunk = torch.empty((len(indices), *self._size, images.channels), dtype=dtype, pin_memory=pin)
        gathered = chunk.numpy()
        for to, (of, top, left) in enumerate(zip(chosen, tops, lefts, strict=True)):
            gathered[to] = crop_of(images[of], (top, left), self._size).reshape(gathered.shape[1:])
        return chunk

    def _forget(self) -> None:
        if self._coming is not None:
            self._coming.result()
        self._coming, self._ready = None, torch.empty(0)


class _Consumed:
    """The position of a sampler that something else reads ahead of."""

    def __init__(self, reader: Sampler, forget: Callable[[], None]) -> None:
        self._reader, self._forget = reader, forget
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def attempt(self) -> int:
        return self._reader.attempt

    def drawn(self, count: int) -> None:
        self._position += count * self._reader.ranks

    def restart(self, position: int, attempt: int) -> None:
        self._forget()
        self._reader.restart(position, attempt)
        self._position = position

    def indices(self, start: int, stop: int) -> list[int]:
        return self._reader.indices(start, stop)


ImageStore = ResidentImages | ResidentCrops | HostImages


def planes(images: Tensor) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``, without a copy."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
