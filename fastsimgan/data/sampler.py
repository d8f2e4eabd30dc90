"""Which images make the next mini-batch: a pure function of (seed, position), so that resuming is exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Sampler:
    """Endless mini-batches of indices, each epoch a fresh permutation of all images.

    ``position`` (images drawn so far) is its whole state: set it, and the same batches follow.

    Args:
        count: number of images, at least 1.
        seed: seed of the permutations; two samplers with different seeds are unrelated.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.position = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def draw(self, batch: int) -> Tensor:
        """The next ``batch`` indices, int64 ``[batch]``."""
        parts: list[Tensor] = []
        missing = batch
        while missing:
            epoch, offset = divmod(self.position, self.count)
            if epoch != self._epoch:
                # NumPy mixes both numbers into its state; torch's CPU generator keeps the low 32 bits of a seed only.
                order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
                self._order, self._epoch = torch.from_numpy(order), epoch
            part = self._order[offset : offset + missing]
            parts.append(part)
            self.position += len(part)
            missing -= len(part)
        return torch.cat(parts)
