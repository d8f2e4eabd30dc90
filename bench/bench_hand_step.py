"""``python -m bench.bench_hand_step``: one iteration of Algorithm 1 on depth hands, 224x224, at the paper's full size.

Networks of §3.2 (preset ``hand``). First the largest batch that fits the device at once, by doubling, or by halving
where the first does not; then the paper's batch of 512 in parts of that size (``--accumulate``), with and without
``--recompute``: seconds an iteration, images/s, the share of the measured matrix rate and the peak of memory. For a
GPU; flags shrink it so that a CPU can show that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench import limits
from fastsimgan.config import preset
from fastsimgan.hardware.device import choose_device, keep_freed_memory
from fastsimgan.hardware.precision import DTYPES, choose_precision
from fastsimgan.training.batches import open_batches
from fastsimgan.training.compilation import compile_networks
from fastsimgan.training.flops import iteration_flops
from fastsimgan.training.graphed_iterations import GraphedIterations
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState


def measure(
    batch: int, accumulate: int, recompute: bool, size: int, width: int, rounds: int, device: torch.device
) -> tuple[list[float], int, float, str]:
    """Seconds of each iteration, its floating-point operations, the peak of device memory in GB, and the precision."""
    config = preset(
        "hand",
        batch_size=batch,
        accumulate=accumulate,
        recompute=recompute,
        hidden_channels=width,
        history=max(2048, batch),
    )
    random = np.random.default_rng(0)
    sides = [random.integers(0, 65536, (max(512, batch), size, size), dtype=np.uint16) for _ in range(2)]
    precision, _ = choose_precision("auto", device)
    batches = open_batches(sides[0], sides[1], config, device, lambda _: None)
    trainer = SimGAN(TrainingState(config, batches.image_shape, device, precision=precision, batches=batches))
    flops = iteration_flops(trainer.state)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        compile_networks(trainer.state, "auto", print)
    graphs = GraphedIterations(trainer, print) if on_gpu else None
    call = graphs or (lambda: trainer.iteration(batches.draw_synthetic, batches.draw_real))
    for _ in range(6 if on_gpu else 0):  # compiling, and the capture of the graph
        call()
    if on_gpu:  # between events around as many iterations as take 0.1 s: nothing is made to wait for the host
        timer = limits.Timer(call, device, least=0.1)
        seconds = [timer.sample() for _ in range(rounds)]
        return seconds, flops, torch.cuda.max_memory_allocated() / 1e9, precision
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds, flops, float("nan"), precision


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_hand_step", description=__doc__)
    full = not limits.SMALL
    parser.add_argument("--batch", type=int, default=512 if full else 4, help="effective batch")
    parser.add_argument(
        "--first", type=int, default=16 if full else 2, help="batch to begin with when looking for the largest"
    )
    parser.add_argument("--size", type=int, default=224 if full else 32)
    parser.add_argument("--hidden-channels", type=int, default=64 if full else 20)
    parser.add_argument("--rounds", type=int, default=5 if full else 2)
    arguments = parser.parse_args(argv)
    device = choose_device("auto")
    keep_freed_memory()
    size, width, rounds = arguments.size, arguments.hidden_channels, arguments.rounds

    def show(batch: int, accumulate: int, recompute: bool) -> None:
        with limits.same_switches(tf32=False):  # as `fit` has it
            seconds, flops, peak, precision = measure(batch, accumulate, recompute, size, width, rounds, device)
        median = statistics.median(seconds)
        text = f"batch {batch:4} in {accumulate:3} parts{', recomputing' if recompute else '':13} "
        text += f"{median:8.3f} s ({min(seconds):.3f} to {max(seconds):.3f}) {batch / median:8.1f} images/s"
        facts: dict[str, Any] = {"batch": batch, "parts": accumulate, "recompute": recompute, "seconds": seconds}
        if device.type == "cuda":
            share = flops / median / limits.matrix_rate(device, DTYPES[precision])
            text += f" {share:6.1%} of the measured {precision} matrix rate, {peak:.1f} GB"
            facts |= {"share_of_matrix_rate": share, "peak_bytes": peak * 1e9}
        print(text, flush=True)
        limits.keep(f"hand step, batch {batch} in {accumulate} parts", [text], **facts)

    def fits_at_once(batch: int) -> bool:
        try:
            show(batch, 1, False)
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch:4} does not fit at once", flush=True)
            return False
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    fits = first = min(arguments.first, arguments.batch)
    while not fits_at_once(fits):
        fits //= 2
        if fits < 2:
            print("error: not even a batch of 2 fits", file=sys.stderr)
            return 1
    halved = fits < first  # then twice as many have been tried
    while not halved and 2 * fits <= arguments.batch and fits_at_once(2 * fits):
        fits *= 2
    if fits < arguments.batch:
        for recompute in (False, True):
            show(arguments.batch, arguments.batch // fits, recompute)
    return 0


if __name__ == "__main__":
    sys.exit(main())
