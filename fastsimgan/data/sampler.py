"""Which images, and which parts of them, make the next mini-batch: a pure function of (seed, position), so that
resuming is exact."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LOW = 0xFFFFFFFF


class Sampler:
    """Endless mini-batches of indices, each epoch a fresh permutation of all images.

    ``position`` (images drawn so far, by all ranks) is its whole state: set it, and the same batches follow.

    The permutations of the epochs at hand and a cursor live on the device, so that a draw is three small operations
    there with nothing from the host, and a CUDA graph that holds one draws anew at each replay. It reads them where
    they were when it was captured: `reserve` for the largest batch first, and `addresses` says whether they moved.

    Args:
        count: number of images, at least 1.
        seed: seed of the permutations; two samplers with different seeds are unrelated.
        device: where the indices are wanted.
        rank, ranks: of ``ranks`` processes that share one stream, each takes every ``ranks``-th index.
    """

    def __init__(
        self, count: int, seed: int, device: torch.device | str = "cpu", *, rank: int = 0, ranks: int = 1
    ) -> None:
        self.count, self.seed, self.rank, self.ranks = count, seed, rank, ranks
        self.attempt = 0  # another number, another order: see `restart`
        self._position = 0
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)  # the position, where a graph can move it
        self._ring = torch.empty(0, dtype=torch.int64, device=device)  # some consecutive epochs' permutations
        self._epochs: list[int] = []  # which epoch each part of the ring holds
        self._key = torch.from_numpy(self._hash_key()).to(device)

    @property
    def position(self) -> int:
        """Images drawn so far."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position = value
        self._cursor.fill_(value)

    def restart(self, position: int, attempt: int) -> None:
        """Go to ``position`` in the order number ``attempt``; 0 is the first, the others are unrelated to it."""
        if attempt != self.attempt:
            self.attempt, self._epochs = attempt, [-1] * len(self._epochs)
            self._key.copy_(torch.from_numpy(self._hash_key()))
        self.position = position

    def draw(self, batch: int) -> Tensor:
        """The next ``batch`` indices of this rank, int64 ``[batch]`` on the device."""
        return self.draw_at(batch)[0]

    def draw_at(self, batch: int) -> tuple[Tensor, Tensor]:
        """The next ``batch`` indices of this rank and the positions that they are drawn at, int64 ``[batch]`` each."""
        self.reserve(batch)
        spread = torch.arange(batch, device=self._ring.device) * self.ranks + (self._cursor + self.rank)
        drawn = self._ring[spread % len(self._ring)]
        self._cursor.add_(batch * self.ranks)
        self._position += batch * self.ranks
        return drawn, spread

    def corners(self, positions: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where crops begin: for each position a row below ``rows`` and a column below ``columns``, equally likely.

        A hash of seed, attempt and position, and nothing else: any part of a stream can be had, in any order, and a
        CUDA graph draws anew at each replay. All are int64 ``[n]`` on the device, ``rows`` and ``columns`` from 1 to
        2^31.
        """
        first = _mixed((positions & _LOW) ^ self._key[0])
        down = _mixed(first ^ (positions >> 32) ^ self._key[1])
        right = _mixed(down ^ self._key[2])
        return (down * rows) >> 32, (right * columns) >> 32

    def reserve(self, batch: int) -> None:
        """Have the next ``batch`` indices of each rank on the device. Within a CUDA graph this must have been done."""
        first = self._position // self.count
        last = (self._position + batch * self.ranks - 1) // self.count
        parts = (batch * self.ranks - 1) // self.count + 2  # wherever the batch starts, its epochs fit
        if parts > len(self._epochs):  # moves it
            self._ring = torch.empty(parts * self.count, dtype=torch.int64, device=self._ring.device)
            self._epochs = [-1] * parts
        for epoch in range(first, last + 1):
            part = epoch % len(self._epochs)
            if self._epochs[part] != epoch:
                start = part * self.count
                order = torch.from_numpy(self._order(epoch))
                if self._ring.is_cuda:
                    order = order.pin_memory()  # from elsewhere the host would wait until it is copied
                self._ring[start : start + self.count].copy_(order, non_blocking=True)
                self._epochs[part] = epoch

    def drawn_by_a_graph(self, images: int) -> None:
        """Follow a CUDA graph's replay, which moved the cursor on the device by ``images``."""
        self._position += images

    def cursor(self) -> int:
        """The position that draws have come to on the device. Waits for it."""
        return int(self._cursor)

    def addresses(self) -> tuple[int, ...]:
        """Where in the device's memory a draw reads: a CUDA graph is good for as long as they stay."""
        return self._ring.data_ptr(), self._cursor.data_ptr(), self._key.data_ptr()

    def indices(self, start: int, stop: int) -> list[int]:
        """What was or will be drawn at the positions from ``start`` to ``stop``, by all ranks. For messages."""
        orders = {epoch: self._order(epoch) for epoch in range(start // self.count, (stop - 1) // self.count + 1)}
        return [int(orders[at // self.count][at % self.count]) for at in range(start, stop)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # NumPy mixes all numbers into its state; torch's CPU generator keeps the low 32 bits of a seed only.
        key = (self.seed, epoch, self.attempt) if self.attempt else (self.seed, epoch)
        return np.random.default_rng(key).permutation(self.count)

    def _hash_key(self) -> NDArray[np.int64]:
        return np.random.SeedSequence((self.seed, self.attempt, 1)).generate_state(3).astype(np.int64)


def _mixed(values: Tensor) -> Tensor:
    """A bijection of [0, 2^32) that looks random (Wellons' two-round integer hash), in int64 without overflow."""
    values = ((values ^ (values >> 16)) * 0x21F0AAAD) & _LOW
    values = ((values ^ (values >> 15)) * (0xD35A2D97 - 2**32)) & _LOW  # the same low half, and below 2^63
    return values ^ (values >> 15)
