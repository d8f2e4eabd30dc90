"""What the benchmarks share: sides timed in turn, their errors beside their speeds, and a short table at the end.

Under ``--benchmark-disable`` each side runs once, its result is checked and nothing is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from bench import limits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_table: list[str] = []

Side = Callable[[], object] | Sequence[Callable[[], object]]
"""A public call; or several of it on buffers of their own, which take turns (see `limits.copies`)."""


@cache
def measured_copy_bandwidth() -> float:
    return limits.copy_bandwidth(DEVICE)


@cache
def measured_matrix_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    return limits.matrix_rate(DEVICE, dtype, clock)


@pytest.fixture(autouse=True)
def tf32_off() -> Iterator[None]:
    """No side of any comparison computes float32 in TF32 because another one had its switch set."""
    with limits.same_switches(tf32=False):
        yield


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
        sides: Mapping[str, Side],
        errors: dict[str, float],
        bytes_moved: int,
        not_capturable: Collection[str] = (),
    ) -> None:
        """Time ``sides`` (name → the public call, forward and backward), ours first; see `limits.Timer` for how.

        On CUDA each side is timed twice: as Python calls it, and as a CUDA graph (", graph"), which is the device's own
        time. Where a side is one call alone, its buffers stay in the cache if they fit there: see `limits.copies`.

        errors: each side's largest relative error against float64. bytes_moved: what the task cannot do without,
        every input read once and every output written once. not_capturable: sides that no CUDA graph can hold.
        """
        timers = self._timers(sides, set(sides) - set(not_capturable))
        self._take_turns(timers, rounds=50 if self.device.type == "cuda" else 20)
        if self.disabled:
            return
        bandwidth = measured_copy_bandwidth()
        rows, lines = {}, []
        for name in timers:
            taken = limits.spread(self.seconds[name])
            rate = bytes_moved / taken.median
            rows[name] = {
                "median_us": taken.median * 1e6,
                "iqr_us": taken.iqr * 1e6,
                "GB_per_s": rate / 1e9,
                "share_of_copy": rate / bandwidth,
                "error": errors[name.removesuffix(", graph")],
            }
            lines.append(
                f"{title:34} {name:18} {taken.median * 1e6:10.1f} us ± {taken.iqr * 1e6:8.1f}  {rate / 1e9:8.2f} GB/s  "
                f"{rate / bandwidth:6.1%} of copy  error {rows[name]['error']:.1e}"
            )
        self._keep(title, lines, rows, copy_GB_per_s=bandwidth / 1e9, bytes_moved=bytes_moved, buffers=_buffers(sides))

    def run_images(
        self,
        title: str,
        sides: Mapping[str, Side],
        agreement: dict[str, tuple[float, int]],
        images: int,
        flop: float,
        baseline: str,
        peak_dtype: torch.dtype | None = None,
        not_capturable: Collection[str] | None = None,
    ) -> None:
        """Time ``sides`` (name → the public call on ``images`` images, of ``flop`` operations), ours first.

        On a CPU in CPU-seconds, which a busy machine does not stretch. agreement: PSNR in dB and most grey levels.
        baseline: the side that ratios are to. peak_dtype: of the matrix product that shares are of; None: float32 on a
        CPU, float16 on CUDA. not_capturable: on CUDA, the sides that are not timed as a graph too; None: no side is.
        """
        on_cpu = self.device.type == "cpu"
        self.clock = time.process_time if on_cpu else time.perf_counter
        capturable = set() if not_capturable is None else set(sides) - set(not_capturable)
        timers = self._timers(sides, capturable)
        self._take_turns(timers, rounds=15 if on_cpu else 50)
        if self.disabled:
            return
        peak = measured_matrix_rate(peak_dtype or (torch.float32 if on_cpu else torch.float16), self.clock)
        rows, lines = {}, []
        for name in timers:
            taken = limits.spread(self.seconds[name])
            ratios = [old / new for old, new in zip(self.seconds[baseline], self.seconds[name], strict=True)]
            psnr, levels = agreement[name.removesuffix(", graph")]
            rows[name] = {
                "median_us": taken.median * 1e6,
                "iqr_us": taken.iqr * 1e6,
                "images_per_s": images / taken.median,
                "times_baseline": statistics.median(ratios),
                "share_of_matrix_rate": flop / taken.median / peak,
                "psnr": psnr if math.isfinite(psnr) else None,
                "most_levels": levels,
            }
            lines.append(
                f"{title:24} {name:22} {images / taken.median:10.1f} images/{'CPU-s' if on_cpu else 's'}  "
                f"{rows[name]['times_baseline']:5.2f} x {baseline}  {flop / taken.median / peak:6.1%} of matrix rate  "
                f"PSNR {psnr:5.1f} dB, at most {levels} levels"
            )
        self._keep(title, lines, rows, matrix_TFLOP_per_s=peak / 1e12, flop=flop, buffers=_buffers(sides))

    def _keep(self, title: str, lines: list[str], rows: dict[str, dict[str, Any]], **facts: Any) -> None:
        """Put a result into the table at the end, into what pytest-benchmark stores and into what `bench.gpu` does."""
        name = limits.device_name(self.device)
        facts |= {"device": name, "small": limits.SMALL, "sides": rows}
        _table.extend(lines)
        self.benchmark.extra_info |= {"title": title, **facts}
        limits.keep(title, lines, **facts)

    def _timers(self, sides: Mapping[str, Side], capturable: Collection[str]) -> dict[str, Callable[[], float]]:
        """What takes a sample of each side, warmed up; captured ones of ``capturable`` beside them on CUDA."""
        if self.disabled:  # one call of each, and of its first buffers alone

            def once(side: Side) -> Callable[[], float]:
                call = side if callable(side) else side[0]
                return lambda: (call(), 0.0)[1]

            return {name: once(side) for name, side in sides.items()}
        timers = {name: limits.Timer(side, self.device, clock=self.clock).sample for name, side in sides.items()}
        if self.device.type == "cuda":
            timers |= {
                f"{name}, graph": limits.Timer(side, self.device, graph=True).sample
                for name, side in sides.items()
                if name in capturable
            }
        return timers

    def _take_turns(self, timers: dict[str, Callable[[], float]], rounds: int) -> None:
        ours, *others = timers

        def take(names: Sequence[str]) -> None:
            for name in names:
                self.seconds.setdefault(name, []).append(timers[name]())

        rounds = 1 if self.disabled else 3 if limits.SMALL else rounds
        # pytest-benchmark's own clock is around a whole sample of ours: what is reported are the samples
        self.benchmark.pedantic(lambda: take([ours]), setup=lambda: take(others), rounds=rounds, iterations=1)


def _buffers(sides: Mapping[str, Side]) -> int:
    """Sets of buffers that a side goes round."""
    side = next(iter(sides.values()))
    return 1 if callable(side) else len(side)


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest) -> Race:
    return Race(benchmark, disabled=request.config.getoption("benchmark_disable"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["cuda"] = torch.version.cuda
    machine_info["device"] = limits.device_name(DEVICE)
    machine_info["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _table:
        terminalreporter.section(
            "sides in turn: medians; ops: ± interquartile range, largest relative error against float64"
        )
        for line in _table:
            terminalreporter.write_line(line)
