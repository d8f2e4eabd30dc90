"""``python -m bench.bench_train_step``: an iteration of ours against a plain trainer's, CPU-seconds, in turn.

Gaze networks of the paper (64 feature maps), K_g = 2. Sides: ours; the plain trainer of `bench.baselines`; and that one
compiled, in bfloat16 where the device has it (a CPU that emulates it is not raced in it). On a GPU TF32 is off on
these, as `fit` has it, and on in a further side, the plain trainer as PyTorch computes unless told not to.
Before timing, ours and the plain one are trained from the same weights on the same images without a history, float32,
and their losses compared. ``--schedule`` times the paper's whole schedule instead (``--preset paper``, random images):
for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import limits
from bench.baselines.plain_trainer import PlainTrainer
from fastsimgan.config import TrainConfig, preset
from fastsimgan.hardware.device import choose_device, keep_freed_memory
from fastsimgan.hardware.precision import DTYPES, choose_precision
from fastsimgan.training.batches import open_batches
from fastsimgan.training.compilation import compile_networks
from fastsimgan.training.flops import iteration_flops
from fastsimgan.training.graphed_iterations import GraphedIterations
from fastsimgan.training.loop import fit
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState

SIZE = (35, 55)


def images(count: int, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def plain(config: TrainConfig, trainer: SimGAN, sides: tuple[np.ndarray, np.ndarray], **options) -> PlainTrainer:
    """A plain trainer with copies of ``trainer``'s weights, contiguous."""
    refiner, discriminator = (
        copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        for network in (trainer.state.refiner, trainer.state.discriminator)
    )
    refiner.impl = "reference"  # PyTorch's own convolutions
    rates = config.learning_rate_refiner, config.learning_rate_discriminator
    return PlainTrainer(
        refiner, discriminator, *sides, batch=config.batch_size, k_g=config.k_g, lam=config.lam, rates=rates,
        history=config.history, device=trainer.state.device, **options,
    )  # fmt: skip


def losses_side_by_side(
    steps: int, *, batch: int, width: int = 64, size: tuple[int, int] = SIZE, computes: str = "change"
) -> np.ndarray:
    """R's and D's losses of ours and of the plain trainer, ``[2, steps, 2]``: same weights, same images, float32.

    The histories hand back what is put in: which slots they draw is the one thing in which the two cannot agree.
    Rounding differs (channels_last or not), and training multiplies it: at full size it is 1e-7 for some ten iterations
    and, from there, grows tenfold every two or three; small images put that off.
    """
    config = TrainConfig(
        batch_size=batch, k_g=2, hidden_channels=width, history=batch // 2, steps=steps, warm_up=0, decay=False,
        computes=computes,
    )  # fmt: skip
    ours = SimGAN(TrainingState(config, (1, *size), torch.device("cpu")))
    sides = images(64, 0, size), images(64, 1, size)
    other = plain(config, ours, sides)
    ours.state.history.swap = other.swap = lambda fresh: fresh  # type: ignore[method-assign,union-attr]
    ours_drawn, other.random = np.random.default_rng(2), np.random.default_rng(2)

    def draw(pool: np.ndarray, count: int) -> torch.Tensor:
        chosen = pool[ours_drawn.integers(len(pool), size=count)]
        return torch.from_numpy(chosen[:, None].astype(np.float32) / 127.5 - 1).to(memory_format=torch.channels_last)

    rows: list[list[tuple[float, float]]] = [[], []]
    for _ in range(steps):
        metrics = ours.iteration(lambda n: draw(sides[0], n), lambda n: draw(sides[1], n))
        rows[0].append((float(metrics["loss_refiner"]), float(metrics["loss_discriminator"])))
        rows[1].append(other.iteration())
    return np.array(rows)


@dataclass(frozen=True)
class Found:
    """What `race` measured: seconds of iterations by side, the arithmetic of one, and of ours precision and memory."""

    seconds: dict[str, list[float]]
    flops: int
    precision: str
    peak_bytes: int | None


def race(batch: int, rounds: int, device: torch.device, width: int = 64) -> Found:
    """Time each side's iterations, in turn: CPU-seconds on a CPU; on a GPU between events around as many as take 0.1 s,
    so that ours, which waits for nothing, is not made to."""
    config = TrainConfig(batch_size=batch, k_g=2, hidden_channels=width, history=max(2048, batch))
    sides = images(4096, 0), images(2048, 1)
    precision, _ = choose_precision("auto", device)
    batches = open_batches(*sides, config, device, lambda _: None)
    ours = SimGAN(TrainingState(config, batches.image_shape, device, precision=precision, batches=batches))
    flops = iteration_flops(ours)
    first = plain(config, ours, sides)
    second = plain(config, ours, sides, autocast=torch.bfloat16 if precision == "bfloat16" else None)
    second.refiner.compile()
    second.discriminator.compile()
    on_gpu = device.type == "cuda"
    compile_networks(ours, "auto", print)
    graphs = GraphedIterations(ours, print) if on_gpu else None
    calls: dict[str, Callable[[], object]] = {
        "ours": graphs or (lambda: ours.iteration(batches.draw_synthetic, batches.draw_real)),
        "plain": first.iteration,
        f"plain, compiled, {precision}": second.iteration,
    }
    warm_up = 6 if on_gpu else 1  # compiling, and on a GPU the capture of the graph
    peak = limits.peak_memory(lambda: [calls["ours"]() for _ in range(warm_up)], device) if on_gpu else None
    if on_gpu:
        third = plain(config, ours, sides)

        def with_tf32() -> object:
            with limits.same_switches(tf32=True):
                return third.iteration()

        calls["plain, TF32"] = with_tf32
    for name, call in calls.items():
        for _ in range(0 if on_gpu and name == "ours" else warm_up):
            call()
    if on_gpu:
        samples = {name: limits.Timer(call, device, least=0.1).sample for name, call in calls.items()}
    else:
        samples = {name: partial(_cpu_seconds, call) for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, sample in samples.items():
            spent[name].append(sample())
    return Found(spent, flops, precision, peak)


def _cpu_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def whole_schedule() -> None:
    """Train by the paper's schedule on random images of the gaze experiment's size, and say how long it took."""
    counts = (200, 100) if limits.SMALL else (200_000, 50_000)
    settings: dict[str, Any] = {"eval_every": 100_000, "checkpoint_every": 100_000}
    if limits.SMALL:
        settings |= {
            "steps": 8,
            "batch_size": 4,
            "hidden_channels": 20,
            "blocks": 1,
            "history": 16,
            "pretrain_refiner": 2,
        }
        settings |= {"pretrain_discriminator": 2}
    with tempfile.TemporaryDirectory() as folder:
        config = preset("paper", out=Path(folder) / "run", **settings)
        begin = time.perf_counter()
        fit(images(counts[0], 0), images(counts[1], 1), config)
        seconds = time.perf_counter() - begin
    work = f"{config.pretrain_refiner} + {config.pretrain_discriminator} + {config.steps} iterations"
    line = f"{work}, batch {config.batch_size}, K_g {config.k_g}: {seconds:.0f} s, with compiling and a checkpoint"
    print(line)
    limits.keep("the paper's schedule", [line], seconds=seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_train_step", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="default: 32 128 on a CPU, 512 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schedule", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.schedule:
        whole_schedule()
        return 0
    device = choose_device("auto")
    keep_freed_memory()  # for all sides alike: it is a setting of the process
    rows = losses_side_by_side(20, batch=8, size=(17, 27))
    gap = float(np.abs(rows[0] / rows[1] - 1).max())
    print(f"losses after 20 iterations (17x27, batch 8, float32, CPU): ours {rows[0, -1]}, plain {rows[1, -1]}")
    print(f"largest gap in any of them: {gap:.1e}")
    unit = "s" if device.type == "cuda" else "CPU-s"
    width = 20 if limits.SMALL else 64
    default = ([8] if limits.SMALL else [512]) if device.type == "cuda" else [32, 128]
    for batch in arguments.batch or default:
        with limits.same_switches(tf32=False):
            found = race(batch, arguments.rounds, device, width)
        ours = statistics.median(found.seconds["ours"])
        lines, sides = [], {}
        for name, seconds in found.seconds.items():
            taken = limits.spread(seconds) if len(seconds) > 1 else limits.Spread(seconds[0], float("nan"))
            between = f"({min(seconds):.4f} to {max(seconds):.4f}, IQR {taken.iqr:.4f})"
            lines.append(
                f"batch {batch:4} {name:28} {taken.median:8.4f} {unit} {between}, {taken.median / ours:.2f}x ours"
            )
            sides[name] = {"median_s": taken.median, "iqr_s": taken.iqr}
        facts: dict[str, Any] = {"batch": batch, "flop": found.flops, "largest_gap_of_losses": gap, "sides": sides}
        if device.type == "cuda":
            rate = found.flops / ours / limits.matrix_rate(device, DTYPES[found.precision])
            memory = (found.peak_bytes or 0) / 1e9
            lines.append(
                f"batch {batch:4} ours: {rate:.1%} of the measured {found.precision} matrix rate, all of the iteration"
                f"; {memory:.2f} GB at most"
            )
            facts |= {"share_of_matrix_rate": rate, "precision": found.precision, "peak_bytes": found.peak_bytes}
        print("\n".join(lines))
        limits.keep(f"train step, batch {batch}", lines, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
