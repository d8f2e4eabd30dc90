"""``python -m bench.bench_two_gpus train|refine``: two GPUs against one.

``train``: an iteration of one process, and of two under torchrun that share the same mini-batch; how far the first
step's losses are apart is said. ``refine``: packed images from disk to disk by one worker and by two; the bytes must be
equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import limits

STEPS, FROM = (6, 2) if limits.SMALL else (300, 100)
WAIT = 200  # seconds for a process, of which compiling is the most


def child(out: Path) -> None:
    """Train in this process, alone or as a rank."""
    from fastsimgan.config import TrainConfig
    from fastsimgan.training.loop import fit

    size, count = ((16, 20), 64) if limits.SMALL else ((35, 55), 8192)
    width, batch = (20, 8) if limits.SMALL else (64, 512)
    config = TrainConfig(
        out=out, device="cuda", steps=STEPS, batch_size=batch, hidden_channels=width, k_g=2, history=4 * batch,
        warm_up=0,
        pretrain_discriminator=0, eval_every=100_000, checkpoint_every=100_000, precision="float32",
        cuda_graph=False,  # as it is for several ranks
    )  # fmt: skip
    random = np.random.default_rng(0)
    sides = [random.integers(0, 256, (count, *size), dtype=np.uint8) for _ in range(2)]
    fit(sides[0], sides[1], config)


def losses_of(out: Path) -> list[tuple[float, float]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["loss_refiner"], row["loss_discriminator"]) for row in rows if row["phase"] == "train"]


def train(folder: Path) -> int:
    seconds: dict[int, float] = {}
    for ranks in (1, 2):
        out = folder / str(ranks)
        command = [sys.executable, "-m", "bench.bench_two_gpus", "--child", str(out)]
        if ranks == 2:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(command)
        begin, seen = time.monotonic(), {}
        while process.poll() is None:
            if time.monotonic() - begin > WAIT:
                process.kill()
                break
            done = len(losses_of(out))
            if done >= FROM:
                seen.setdefault("from", (done, time.monotonic()))
                if done > seen.get("to", (0, 0.0))[0]:
                    seen["to"] = done, time.monotonic()
            time.sleep(0.005)
        if process.wait():
            print(f"error: {ranks} process(es) ended with exit code {process.returncode}")
            return 1
        (first, at), (last, end) = seen.get("from", (0, 0.0)), seen.get("to", (0, 0.0))
        seconds[ranks] = (end - at) / (last - first) if last > first else float("nan")
    one, two = (np.array(losses_of(folder / str(ranks))[0]) for ranks in (1, 2))  # later, rounding is multiplied
    gap = float(np.abs(one / two - 1).max())
    lines = [
        f"train, float32, no graph: {seconds[1] * 1e3:.2f} ms an iteration on one GPU, {seconds[2] * 1e3:.2f} on two "
        f"({seconds[1] / seconds[2]:.2f}x); the first step's losses are {gap:.1e} apart"
    ]
    print(lines[0])
    limits.keep("train, two GPUs", lines, seconds=seconds, first_gap=gap)
    return 0


def refine(folder: Path) -> int:
    import torch

    from fastsimgan.config import TrainConfig
    from fastsimgan.inference import save_refiner
    from fastsimgan.models.refiner import Refiner
    from fastsimgan.refinement.job import Job
    from fastsimgan.refinement.run import refine as run

    count, size, shape = (3000, (16, 20), {"width": 20}) if limits.SMALL else (600_000, (35, 55), {})
    torch.manual_seed(0)
    save_refiner(folder / "refiner.safetensors", Refiner(1, **shape), histogram="keep", training=TrainConfig())
    rows = np.lib.format.open_memmap(folder / "in.npy", "w+", np.uint8, (count, *size))
    random = np.random.default_rng(0)
    for first in range(0, count, 10_000):
        rows[first : first + 10_000] = random.integers(0, 256, rows[first : first + 10_000].shape, dtype=np.uint8)
    del rows
    found: dict[str, Any] = {}
    for workers in (1, 2):
        out = folder / f"{workers}.npy"
        job = Job(folder / "refiner.safetensors", folder / "in.npy", out, device="cuda")
        report = run(job, workers=workers)
        with out.open("rb") as file:
            found[f"sha256_{workers}"] = hashlib.file_digest(file, "sha256").hexdigest()
        found[f"images_per_s_{workers}"] = report.images / (report.working or report.seconds)
    equal = found["sha256_1"] == found["sha256_2"]
    rates = found["images_per_s_1"], found["images_per_s_2"]
    lines = [
        f"refine: {rates[0]:.0f} images/s by one worker, {rates[1]:.0f} by two ({rates[1] / rates[0]:.2f}x), once "
        f"loaded; the bytes are {'equal' if equal else 'NOT equal'}"
    ]
    print(lines[0])
    limits.keep("refine, two GPUs", lines, equal=equal, **found)
    return 0 if equal else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_two_gpus", description=__doc__)
    parser.add_argument("what", choices=("train", "refine"), nargs="?")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child is not None:
        child(given.child)
        return 0
    if given.what is None:
        parser.error("train or refine must be given")
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder)) if given.what == "train" else refine(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
