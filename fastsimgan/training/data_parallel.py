"""The processes that train together, each on an equal share of every mini-batch (plain data parallelism).

Gradients are averaged by one flat all-reduce a network and update: R has 0.3 million parameters and D 0.08, so that
there is nothing to overlap, and a CUDA graph can hold the call. `torch.nn.parallel.DistributedDataParallel`'s hooks
would have to be told about a network that is frozen half of the time.

On CUDA gradients go through NCCL, and what the processes agree on (stopping, having arrived) through gloo: it sees at
once that a process is gone, where NCCL's own end is a watchdog that kills the others after minutes.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from fastsimgan.errors import TrainingError

TIMEOUT = 45
"""Seconds after which a rank that does not answer is taken for gone, on CPUs."""

CUDA_TIMEOUT = 600
"""The same on CUDA: one that dies is noticed at once, and one that still compiles its networks must not be taken for
gone."""

_NCCL_TIMEOUT = 2 * CUDA_TIMEOUT  # later than ours, so that an end is told by our message and not by NCCL's watchdog


class DataParallelGroup:
    """Process ``rank`` of ``size``. With one process every method is the identity, and nothing is set up.

    Args:
        rank, size: this process's place.
        control: the gloo group in which they agree; None: the default group, which then is gloo.
        patience: seconds that another rank is waited for.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None, patience: float = TIMEOUT) -> None:
        self.rank, self.size = rank, size
        self._control, self._patience = control, patience

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks; all in one transfer."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in order, on rank 0; elsewhere an empty list."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else None
        with self._together():
            dist.gather(tensor, parts)
        return parts or []

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on each of them. Waits for the other ranks, not for a device."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        with self._together():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._control)
        return int(shared)

    def smallest(self, value: int) -> int:
        """As `largest`."""
        return -self.largest(-value)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for the device to reach ``event``, behind which the other ranks' gradients are waited for.

        Raises:
            TrainingError: it does not come in `CUDA_TIMEOUT` seconds.
        """
        if self.size == 1:
            event.synchronize()
            return
        deadline = time.monotonic() + self._patience
        while not event.query():
            if time.monotonic() > deadline:
                raise self._lost(f"none of its gradients in {self._patience:g} s")
            time.sleep(1e-4)

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
            raise self._lost(str(error).splitlines()[0]) from error

    def _lost(self, reason: str) -> TrainingError:
        atexit.unregister(_leave)  # it would wait for the one that is gone
        return TrainingError(
            f"rank {self.rank} of {self.size} lost another rank ({reason}): start the job again with --resume"
        )


def join_group(device: str) -> tuple[DataParallelGroup, str]:
    """Join the processes that ``torchrun`` started, if it did; gives this one's place and its device's name.

    Args:
        device: as `choose_device` takes it; "auto" and "cuda" become the GPU with the process's local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return DataParallelGroup(), device
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda and device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not dist.is_initialized():
        if on_cuda:  # by its own device NCCL connects at once, and never through another rank's
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=timedelta(seconds=_NCCL_TIMEOUT), device_id=torch.device(device))
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        # With the process, not with one run: torchrun's store still knows the first group when a second is made.
        atexit.register(_leave)
    if not on_cuda:
        return DataParallelGroup(dist.get_rank(), dist.get_world_size()), device
    return DataParallelGroup(dist.get_rank(), dist.get_world_size(), _control_group(), CUDA_TIMEOUT), device


@functools.cache
def _control_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=CUDA_TIMEOUT))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
