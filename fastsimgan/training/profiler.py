"""Where an iteration's time goes, and how much arithmetic it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from fastsimgan.training.batches import Pools
from fastsimgan.training.simgan import SimGAN

#: Dense bfloat16 matrix rates of the makers' data sheets, FLOP/s, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}

_WARM_UP = 10
_REST = "losses and the rest"
_PARTS = (
    "data", "R forward", "D forward", "history", "backward, R's step", "backward, D's step", "optimiser", _REST
)  # fmt: skip


def profile_iterations(trainer: SimGAN, pools: Pools, count: int, folder: Path) -> str:
    """Profile ``count`` iterations after ten others, on a copy of the trainer: the run itself is as if it had not been.

    The copy's networks are not compiled and its iterations no CUDA graph: those have no parts to tell apart. The first
    rank writes ``profile.txt`` and ``trace.json.gz`` into ``folder``.

    Returns:
        The table: milliseconds an iteration on the host, and on the device where that is another one, between CUDA
        events around the parts. A part within another is taken out of that, so that all add up to the iteration.
        "losses and the rest" is what no other part covers: the losses' forward, the average, and Python.
    """
    positions, attempt = pools.positions(), pools.synthetic.sampler.attempt
    trainer = copy.deepcopy(trainer)
    clock = _Clock(trainer.device)
    draws = [clock.around(draw, "data") for draw in (pools.draw_synthetic, pools.draw_real)]
    _label_parts(trainer, clock)
    iteration = clock.around(trainer.iteration, _REST)
    for _ in range(_WARM_UP):
        trainer.iteration(draws[0], draws[1])
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    clock.clear()
    with profile(activities=activities) as found:
        for _ in range(count):
            iteration(draws[0], draws[1])
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
    table = _table(clock.milliseconds(), count)
    pools.restart(positions, attempt)
    if trainer.ranks.first:
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

    def around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """``function``, whose calls belong to ``label``."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(label):
                return function(*arguments, **options)

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


def _label_parts(trainer: SimGAN, clock: _Clock) -> None:
    """Time the parts of ``trainer``'s iterations, for good."""
    for network, label in ((trainer.refiner, "R forward"), (trainer.discriminator, "D forward")):
        network.forward = clock.around(network.forward, label)  # type: ignore[method-assign]
    backward = trainer._backward

    def timed_backward(name: str, loss: Tensor) -> None:
        with clock.part(f"backward, {name[0].upper()}'s step"):
            backward(name, loss)

    trainer._backward = timed_backward  # type: ignore[method-assign]
    if trainer.history is not None:
        trainer.history.swap = clock.around(trainer.history.swap, "history")  # type: ignore[method-assign]
    for optimiser in (trainer.refiner_optimiser, trainer.discriminator_optimiser):
        # which a copy forgets: that steps outside of a graph need no warning
        optimiser._warned_capturable_if_run_uncaptured = True
        optimiser.step = clock.around(optimiser.step, "optimiser")  # type: ignore[method-assign]


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


def iteration_flops(trainer: SimGAN) -> int:
    """Floating-point operations of one iteration of all ranks: the convolutions', which are nearly all of it.

    R's step: forward, and backward to the weights and to the layers below; D's forward and its backward to R only.
    D's step: R forward on half a batch (all of it without a history), D forward and backward on two batches.
    """
    config = trainer.config
    shape = (1, trainer.refiner.last.out_channels, *trainer.image_size)
    of_refiner, of_discriminator = (_forward_flops(n, shape) for n in (trainer.average, trainer.discriminator))
    b = config.batch_size
    fresh = b // 2 if config.history else b
    return trainer.k_g * b * (3 * of_refiner + 2 * of_discriminator) + config.k_d * (
        fresh * of_refiner + 2 * b * 3 * of_discriminator
    )


def _forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    network = copy.deepcopy(network).to("meta")
    network._compiled_call_impl = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """The data sheet's bfloat16 matrix rate of a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
