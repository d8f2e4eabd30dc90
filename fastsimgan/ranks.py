"""The processes that train together, each on an equal share of every mini-batch (plain data parallelism).

Gradients are averaged by one flat all-reduce a network and update: R has 0.3 million parameters and D 0.08, so that
there is nothing to overlap, and a CUDA graph can hold the call. `torch.nn.parallel.DistributedDataParallel`'s hooks
would have to be told about a network that is frozen half of the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from fastsimgan.errors import TrainingError

TIMEOUT = 45
"""Seconds after which a rank that does not answer is taken for gone."""


class Ranks:
    """Process ``rank`` of ``count``. With one process every method is the identity, and nothing is set up."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks; all in one transfer."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in order, on rank 0; elsewhere an empty list."""
        if self.count == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.first else None
        with self._together():
            dist.gather(tensor, parts)
        return parts or []

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of the ranks' values, on each of them. Waits for the device."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, device=device)
        with self._together():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def seed(self, seed: int) -> int:
        """A seed of this rank's own; rank 0 keeps ``seed``."""
        return (
            seed if self.first else int(np.random.SeedSequence((seed, self.rank)).generate_state(1, np.uint64)[0] >> 1)
        )

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise when a peer's connection closes or times out
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"rank {self.rank} of {self.count} lost another rank ({reason}): start the job again with --resume"
            ) from error


def join_ranks(device: str) -> tuple[Ranks, str]:
    """Join the processes that ``torchrun`` started, if it did; gives this one's place and its device's name.

    Args:
        device: as `choose_device` takes it; "auto" and "cuda" become the GPU with the process's local rank.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(), device
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda and device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=TIMEOUT))
    return Ranks(dist.get_rank(), dist.get_world_size()), device
