"""The ceilings of a device, measured, and how the benchmarks take time.

``python -m bench.limits`` prints what a copy moves and what a matrix product computes. Datasheets promise more than any
program gets; shares of a limit are shares of these.

On CUDA a sample is *many* calls between two events: one call and a wait for the device cost 10 to 20 µs by themselves,
more than a small kernel takes. Calls take turns on as many sets of buffers as the device's L2 cache cannot hold
(`copies`): a kernel whose inputs are still in the cache from the call before may well beat the memory's bandwidth.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"
"""Whether CUDA here is a pretend device, on which times mean nothing."""
SMALL = PRETEND or os.environ.get("FASTSIMGAN_BENCH_SMALL") == "1"
"""Whether everything is run at sizes that show that it runs, and no more. Figures are then of no use."""

FIGURES = "FASTSIMGAN_BENCH_FIGURES"
"""The environment variable that names the file to which `keep` adds."""
ROUNDS = 20
Clock = Callable[[], float]
Call = Callable[[], object]


def keep(title: str, lines: Sequence[str], **values: Any) -> None:
    """Give a result to ``python -m bench.gpu``, if that runs this; at once, so that it is kept whatever comes after.

    lines: the rows of the final table. values: the same for machines, as JSON has them; what is not finite is null.
    """
    if path := os.environ.get(FIGURES):
        entry = json.dumps(_finite({"title": title, "lines": list(lines), **values}), allow_nan=False)
        with open(path, "a") as file:
            file.write(entry + "\n")


def _finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Spread:
    """Median of some samples, and the distance of their quartiles."""

    median: float
    iqr: float


def spread(samples: Sequence[float]) -> Spread:
    """Median and interquartile range of two samples or more."""
    low, median, high = statistics.quantiles(samples, n=4)
    return Spread(median, high - low)


def device_name(device: torch.device) -> str:
    """What a result says that it was measured on."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device)
    return f"pretend {name.removeprefix('pretend ')}" if PRETEND else name


def l2_bytes(device: torch.device) -> int:
    """Bytes of the second-level cache of a CUDA device (50 to 60 MB on H100 and H200)."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies(bytes_of_one: int, device: torch.device) -> int:
    """Sets of buffers between which calls that touch ``bytes_of_one`` take turns, so that each finds its own cold.

    Three times what L2 holds on CUDA; 1 on a CPU, whose benchmarks have sizes of several times any cache of their own.
    """
    if device.type != "cuda":
        return 1
    if SMALL:
        return 2
    return max(1, math.ceil(3 * l2_bytes(device) / max(1, bytes_of_one)))


@contextmanager
def same_switches(tf32: bool = False) -> Iterator[None]:
    """Both of PyTorch's TF32 switches set alike, for every side of a comparison; both off unless ``tf32``.

    By default PyTorch rounds the inputs of float32 *convolutions* to TF32 and those of matrix products not. A side that
    turns it off, as ours do where they say float32, would race against one that computes in less.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class Turns:
    """Calls that do one thing on buffers of their own, in turn. Their results are kept until it is their turn again, or
    the allocator would hand the same memory, still in the cache, to each."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._next = list(calls), 0
        self._results: deque[object] = deque(maxlen=len(self._calls))

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> object:
        self._results.append(self._calls[self._next]())
        self._next = (self._next + 1) % len(self._calls)
        return self._results[-1]


class Timer:
    """Takes samples of the seconds that one call of ``calls`` takes.

    Args:
        calls: one call, or several that do the same on other buffers (see `copies`); they take turns.
        device: on CUDA a sample is the time between two events of as many rounds of all calls as take ``least``
            seconds; elsewhere it is one call by ``clock``.
        graph: CUDA only: all calls are captured, one after another, as one graph, which is replayed. What is left is
            the device's own time, with no Python and no launch gaps.
        least: seconds of a sample on CUDA.
    """

    def __init__(
        self,
        calls: Call | Sequence[Call],
        device: torch.device,
        *,
        graph: bool = False,
        clock: Clock = time.perf_counter,
        least: float = 2e-3,
    ) -> None:
        self._turns = Turns([calls] if callable(calls) else calls)
        self._device, self._clock = device, clock
        for _ in range(3 * len(self._turns) if not SMALL else len(self._turns)):
            self._turns()
        self._round: Call = self._once_round
        self.rounds = 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if graph:
                self._round = captured(self._once_round, device)
                self._round()
            self.rounds = 1 if SMALL else min(1000, math.ceil(least / self._between_events(1)))

    def _once_round(self) -> object:
        for _ in range(len(self._turns)):
            self._turns()
        return self._turns  # keeps the results of a capture alive

    def sample(self) -> float:
        """Seconds of one call."""
        if self._device.type == "cuda":
            return self._between_events(self.rounds) / (self.rounds * len(self._turns))
        begin = self._clock()
        self._turns()
        return self._clock() - begin

    def _between_events(self, rounds: int) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(rounds):
                self._round()
            end.record()
            end.synchronize()
            return max(1e-9, start.elapsed_time(end) * 1e-3)


def captured(call: Call, device: torch.device) -> Call:
    """``call``, which has run before, as a CUDA graph: calling what is returned replays it."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # torch's own is of the device that captured first
            kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def seconds(
    calls: Call | Sequence[Call],
    device: torch.device,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
    graph: bool = False,
) -> Spread:
    """Seconds of a call, median and IQR over ``rounds`` samples; see `Timer`."""
    timer = Timer(calls, device, graph=graph, clock=clock)
    return spread([timer.sample() for _ in range(2 if SMALL else rounds)])


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes of device memory that tensors took at most during ``call``, those from before included; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes a second of a large copy within the device's memory, read and written bytes both counted."""
    device = torch.device(device)
    size = 2**20 if SMALL else 2**30 if device.type == "cuda" else 2**27  # many times any cache
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()  # zeros can be faster than data
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device).median


def matrix_rate(
    device: torch.device | str, dtype: torch.dtype, clock: Clock = time.perf_counter, tf32: bool = False
) -> float:
    """Floating-point operations a second of a large square matrix product in ``dtype``, TF32 off unless ``tf32``."""
    device = torch.device(device)
    size = 64 if SMALL else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with same_switches(tf32):
        return 2 * size**3 / seconds(lambda: a @ b, device, clock=clock).median


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device_name(device)
    found = {"copy_GB_per_s": copy_bandwidth(device) / 1e9}
    # Many a CPU emulates the narrow types, minutes long.
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32,):
        found[f"{str(dtype)[6:]}_TFLOP_per_s"] = matrix_rate(device, dtype) / 1e12
    if device.type == "cuda":
        found["tf32_TFLOP_per_s"] = matrix_rate(device, torch.float32, tf32=True) / 1e12
        found["L2_MB"] = l2_bytes(device) / 1e6
    lines = [f"{name}: {what.replace('_', ' ')} {value:.3f}" for what, value in found.items()]
    print("\n".join(lines))
    keep("limits", lines, **found)


if __name__ == "__main__":
    main()
