"""Where an iteration's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastsimgan.training.simgan import Draw, SimGAN
from fastsimgan.training.state import TrainingState

_WARM_UP = 10
_REST = "losses and the rest"
_PARTS = (
    "data", "R forward", "D forward", "history", "backward, R's step", "backward, D's step", "optimiser", _REST
)  # fmt: skip


def profile_iterations(state: TrainingState, count: int, folder: Path) -> str:
    """Profile ``count`` iterations after ten others, on a copy of the state: the run itself is as if it had not been.

    The copy's networks are not compiled and its iterations no CUDA graph: those have no parts to tell apart. The first
    rank writes ``profile.txt`` and ``trace.json.gz`` into ``folder``.

    Returns:
        The table: milliseconds an iteration on the host, and on the device where that is another one, between CUDA
        events around the parts. A part within another is taken out of that, so that all add up to the iteration.
        "losses and the rest" is what no other part covers: the losses' forward, the average, and Python.
    """
    positions = state.positions()
    clock = _Clock(state.device)
    algorithm = SimGAN(state.copy(), clock.part)
    draws = clock.drawing(state.batches.draw_synthetic), clock.drawing(state.batches.draw_real)
    for _ in range(_WARM_UP):
        algorithm.iteration(*draws)
    activities = [ProfilerActivity.CPU]
    if state.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    clock.clear()
    with profile(activities=activities) as found:
        for _ in range(count):
            with clock.part(_REST):
                algorithm.iteration(*draws)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
    table = _table(clock.milliseconds(), count)
    state.batches.restart(positions, state.attempt)
    if state.group.first:
        found.export_chrome_trace(str(folder / "trace.json.gz"))
        (folder / "profile.txt").write_text(table + "\n")
    return table


class _Clock:
    """Times labelled parts on the host and, by events on the current stream, on a CUDA device; each without the parts
    within it. The parts are labelled in a profiler's trace too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        #: moments at which the part on top changed: the host's, the device's, and the part that began then
        self._moments: list[tuple[float, torch.cuda.Event | None, str]] = []

    def clear(self) -> None:
        """Begin anew."""
        self._moments.clear()

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        """What is inside belongs to ``label``."""
        self._open.append(label)
        self._now()
        try:
            with record_function("iteration" if label == _REST else label):
                yield
        finally:
            self._open.pop()
            self._now()

    def drawing(self, draw: Draw) -> Draw:
        """``draw``, whose calls belong to "data"."""

        def call(count: int) -> Tensor:
            with self.part("data"):
                return draw(count)

        return call

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """By column, "host ms" and perhaps "device ms", and by label. The device must have been waited for."""
        columns = ["host ms"] + ["device ms"] * (self._device.type == "cuda")
        spent = {column: dict.fromkeys(_PARTS, 0.0) for column in columns}
        for (began, started, label), (ended, stopped, _) in pairwise(self._moments):
            if label:
                spent["host ms"][label] += (ended - began) * 1e3
                if started is not None and stopped is not None:
                    spent["device ms"][label] += started.elapsed_time(stopped)
        return spent

    def _now(self) -> None:
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        self._moments.append((time.perf_counter(), event, self._open[-1] if self._open else ""))


def _table(spent: dict[str, dict[str, float]], count: int) -> str:
    columns = {title: {name: value / count for name, value in parts.items()} for title, parts in spent.items()}
    for parts in columns.values():
        parts["an iteration"] = sum(parts.values())
    lines = [f"{'':24}" + "".join(f"{title:>12}{'':7}" for title in columns)]
    for name in next(iter(columns.values())):
        cells = (
            f"{parts[name]:12.2f} {parts[name] / (parts['an iteration'] or 1):5.0%} " for parts in columns.values()
        )
        lines.append(f"{name:24}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)
