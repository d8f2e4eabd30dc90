"""``python -m bench.bench_waiting``: what it costs how OpenMP's threads wait for each other (`hardware.openmp`).

Forward and backward of the paper's gaze refiner and gaze network, batch 32, float32, on the CPU. Each side is a process
of its own, since torch's OpenMP reads its settings when it is loaded; they take turns, one at a time. First with the
machine to themselves, then beside processes that do nothing but keep a core busy. Seconds by the clock are the question
here, beside them CPU-seconds: medians, and the least and the most.

``--preload /path/to/libomp.so`` (or libiomp5.so) puts another OpenMP in the place of torch's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32


def sides() -> dict[str, dict[str, str]]:
    """What each side has in its environment."""
    from fastsimgan.hardware.openmp import SETTINGS

    return {"as OpenMP has it": {}, "ours": SETTINGS, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


def work() -> None:
    """One side: for each network named on standard input, an iteration; its seconds and CPU-seconds come back."""
    import torch

    from fastsimgan.models.gaze import GazeNetwork
    from fastsimgan.models.refiner import RefinerNetwork

    torch.manual_seed(0)
    networks = {"refiner": RefinerNetwork(), "gaze network": GazeNetwork()}
    images = torch.rand(BATCH, 1, 35, 55) * 2 - 1
    for line in sys.stdin:
        network = networks[line.strip()]
        begin, begin_cpu = time.perf_counter(), time.process_time()
        network(images).square().mean().backward()
        print(time.perf_counter() - begin, time.process_time() - begin_cpu, flush=True)
        network.zero_grad()


def start(settings: dict[str, str], preload: str | None) -> subprocess.Popen[str]:
    """A side's process. The script itself and not the package, which would settle how threads wait before we do."""
    owned = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in owned}
    environment |= {"PYTHONPATH": str(ROOT)} | settings | ({"LD_PRELOAD": preload} if preload else {})
    command = [sys.executable, str(Path(__file__).resolve()), "--work"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def iterate(process: subprocess.Popen[str], network: str) -> tuple[float, float]:
    assert process.stdin is not None and process.stdout is not None
    print(network, file=process.stdin, flush=True)
    seconds, cpu_seconds = process.stdout.readline().split()
    return float(seconds), float(cpu_seconds)


def measure(processes: dict[str, subprocess.Popen[str]], rounds: int, busy: int) -> None:
    """Print a table: each side, each network, beside ``busy`` processes."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for network in ("refiner", "gaze network"):
            spent: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
            for _ in range(rounds):
                for name, process in processes.items():
                    spent[name].append(iterate(process, network))
            for name, pairs in spent.items():
                wall, cpu = zip(*pairs, strict=True)
                print(
                    f"{busy:4}  {network:12}  {name:16}  {statistics.median(wall):7.3f} s "
                    f"({min(wall):.3f} to {max(wall):.3f})  {statistics.median(cpu):7.3f} CPU-s",
                    flush=True,
                )
    finally:
        for other in others:
            other.kill()
            other.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_waiting", description=__doc__)
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 2], help="other processes, each on a core of its own"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--preload", help="another OpenMP library")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        work()
        return 0
    processes = {name: start(settings, arguments.preload) for name, settings in sides().items()}
    try:
        for process in processes.values():
            for network in ("refiner", "gaze network"):
                iterate(process, network)  # untimed: the first takes memory and plans
        print(f"{'busy':4}  {'network':12}  {'side':16}  median (least to most), CPU-seconds")
        for busy in arguments.busy:
            measure(processes, arguments.rounds, busy)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
