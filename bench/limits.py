"""The two ceilings of a device, measured: what a copy moves and what a matrix product computes.

``python -m bench.limits`` prints them. Datasheets promise more than any program gets; shares of a limit are shares of
these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 20


Clock = Callable[[], float]


def seconds(
    call: Callable[[], object], device: torch.device, rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> float:
    """Median seconds of ``call`` after three warm-up calls: by events on CUDA, by ``clock`` elsewhere."""
    for _ in range(3):
        call()
    times = []
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        with torch.cuda.device(device):
            for start, end in events:
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) * 1e-3 for start, end in events]
    else:
        for _ in range(rounds):
            begin = clock()
            call()
            times.append(clock() - begin)
    return statistics.median(times)


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes a second of a large copy within the device's memory, read and written bytes both counted."""
    device = torch.device(device)
    size = 2**30 if device.type == "cuda" else 2**27  # many times any cache
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()  # zeros can be faster than data
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device | str, dtype: torch.dtype, clock: Clock = time.perf_counter) -> float:
    """Floating-point operations a second of a large square matrix product in ``dtype`` (float32 as PyTorch is set)."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, clock=clock)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: copy {copy_bandwidth(device) / 1e9:.1f} GB/s")
    # Many a CPU emulates bfloat16, minutes long.
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        print(f"{name}: {dtype} matrix product {matrix_rate(device, dtype) / 1e12:.3f} TFLOP/s")


if __name__ == "__main__":
    main()
