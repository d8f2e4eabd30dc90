"""What the benchmarks share: sides timed in turn, their errors beside their speeds, and a short table at the end.

Under ``--benchmark-disable`` each side runs once, its result is checked and nothing is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from bench import limits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_table: list[str] = []


@cache
def measured_copy_bandwidth() -> float:
    return limits.copy_bandwidth(DEVICE)


@cache
def measured_matrix_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    return limits.matrix_rate(DEVICE, dtype, clock)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph: what is left is the device's own time, with no Python and no launch gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass
class Race:
    """Times several ways to do one thing, in turn, so that a slow minute of the machine is slow for all of them."""

    benchmark: Any
    device: torch.device = DEVICE
    disabled: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def run(
        self,
        title: str,
        sides: dict[str, Callable[[], object]],
        errors: dict[str, float],
        bytes_moved: int,
        not_capturable: Collection[str] = (),
    ) -> None:
        """Time ``sides`` (name → the public call, forward and backward), ours first; synchronised within the time.

        errors: each side's largest relative error against float64. bytes_moved: what the task cannot do without,
        every input read once and every output written once. not_capturable: sides that no CUDA graph can hold.
        """
        calls = dict(sides)
        if self.device.type == "cuda" and not self.disabled:
            calls |= {f"{name}, graph": captured(call) for name, call in sides.items() if name not in not_capturable}
        self._take_turns(calls, rounds=50 if self.device.type == "cuda" else 20)
        if self.disabled:
            return
        bandwidth = measured_copy_bandwidth()
        rows = {}
        for name in calls:
            low, median, high = statistics.quantiles(self.seconds[name], n=4)
            rate = bytes_moved / median
            rows[name] = {
                "median_us": median * 1e6,
                "iqr_us": (high - low) * 1e6,
                "GB_per_s": rate / 1e9,
                "share_of_copy": rate / bandwidth,
                "error": errors[name.removesuffix(", graph")],
            }
            _table.append(
                f"{title:34} {name:18} {median * 1e6:10.1f} us ± {(high - low) * 1e6:8.1f}  {rate / 1e9:8.2f} GB/s  "
                f"{rate / bandwidth:6.1%} of copy  error {rows[name]['error']:.1e}"
            )
        self.benchmark.extra_info |= {"title": title, "copy_GB_per_s": bandwidth / 1e9, "sides": rows}

    def run_images(
        self,
        title: str,
        sides: dict[str, Callable[[], object]],
        agreement: dict[str, tuple[float, int]],
        images: int,
        flop: float,
        baseline: str,
    ) -> None:
        """Time ``sides`` (name → the public call on ``images`` images, of ``flop`` operations), ours first.

        On a CPU in CPU-seconds, which a busy machine does not stretch, and shares are of its float32 matrix product; on
        CUDA of the float16 one. agreement: PSNR in dB and most grey levels. baseline: the side that ratios are to.
        """
        on_cpu = self.device.type == "cpu"
        self.clock = time.process_time if on_cpu else time.perf_counter
        self._take_turns(sides, rounds=15 if on_cpu else 50)
        if self.disabled:
            return
        peak = measured_matrix_rate(torch.float32 if on_cpu else torch.float16, self.clock)
        rows = {}
        for name in sides:
            low, median, high = statistics.quantiles(self.seconds[name], n=4)
            ratios = [old / new for old, new in zip(self.seconds[baseline], self.seconds[name], strict=True)]
            rows[name] = {
                "median_us": median * 1e6,
                "iqr_us": (high - low) * 1e6,
                "images_per_s": images / median,
                "times_baseline": statistics.median(ratios),
                "share_of_matrix_rate": flop / median / peak,
                "psnr": agreement[name][0] if math.isfinite(agreement[name][0]) else None,
                "most_levels": agreement[name][1],
            }
            _table.append(
                f"{title:24} {name:22} {images / median:10.1f} images/{'CPU-s' if on_cpu else 's'}  "
                f"{rows[name]['times_baseline']:5.2f} x {baseline}  {flop / median / peak:6.1%} of matrix rate  "
                f"PSNR {agreement[name][0]:5.1f} dB, at most {agreement[name][1]} levels"
            )
        self.benchmark.extra_info |= {"title": title, "matrix_TFLOP_per_s": peak / 1e12, "sides": rows}

    def _take_turns(self, calls: dict[str, Callable[[], object]], rounds: int) -> None:
        ours, *others = calls
        for _ in range(1 if self.disabled else 3):
            for call in calls.values():
                call()
        synchronise()

        def time_others() -> None:
            for name in others:
                self._time(name, calls[name])

        rounds = 1 if self.disabled else rounds
        self.benchmark.pedantic(lambda: self._time(ours, calls[ours]), setup=time_others, rounds=rounds, iterations=1)

    def _time(self, name: str, call: Callable[[], object]) -> None:
        begin = self.clock()
        call()
        synchronise()
        self.seconds.setdefault(name, []).append(self.clock() - begin)


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest) -> Race:
    return Race(benchmark, disabled=request.config.getoption("benchmark_disable"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["cuda"] = torch.version.cuda
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    machine_info["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _table:
        terminalreporter.section(
            "sides in turn: medians; ops: ± interquartile range, largest relative error against float64"
        )
        for line in _table:
            terminalreporter.write_line(line)
