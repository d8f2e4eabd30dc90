"""A worker's refiner, on the device or the cores that are its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from fastsimgan.refinement.image_refiner import ImageRefiner
from fastsimgan.refinement.job import Job

Loader = Callable[[Job, int, int], ImageRefiner]
"""Loads the refiner of a job, given a worker's number and how many share its machine."""


def load(job: Job, worker: int = 0, workers: int = 1) -> ImageRefiner:
    """The job's refiner: several workers share the CUDA devices out among them, or else the cores."""
    import torch

    from fastsimgan.hardware.device import choose_device, short_of_memory
    from fastsimgan.inference import load_refiner
    from fastsimgan.inference.cuda_stream import SMALLER, StreamedRefiner
    from fastsimgan.inference.per_core import CoreRefiner

    device = job.device
    if workers > 1:
        torch.set_num_threads(cores(workers))
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{worker % torch.cuda.device_count()}"
    chosen = choose_device(device)
    load_it = partial(
        load_refiner, job.refiner, device=str(chosen), precision=job.precision, trust_engine=job.trust_engine
    )
    if chosen.type == "cpu":
        return CoreRefiner(load_it, cores(workers))
    if workers > 1:  # a process of its own, which has no business on another device
        torch.cuda.set_device(chosen)
    # whoever does a work unit must write the same bytes, so nothing may depend on what was faster
    with short_of_memory(chosen, SMALLER):
        block = job.residual_block or "auto"
        return StreamedRefiner(load_it(compiled=bool(job.compiled), repeatable=True, block=block))


def cores(workers: int) -> int:
    """Cores that this process may use, for each of ``workers``; at least 1, at most 16."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // workers))
