"""What a step of training has to say: its numbers come from the device, are checked, shown and written."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastsimgan import cli
from fastsimgan.training.data_parallel import DataParallelGroup
from fastsimgan.training.flops import iteration_flops, peak
from fastsimgan.training.model_selection import ModelSelector, evaluation_line
from fastsimgan.training.monitor import TrainingMonitor
from fastsimgan.training.pictures import draw_picture
from fastsimgan.training.run_directory import RunDirectory
from fastsimgan.training.simgan import Metrics, PackedMetrics, SimGAN
from fastsimgan.training.state import TrainingState


class MetricsTransfer:
    """A step's metrics, means over the ranks, on their way to the host in one transfer.

    On CUDA the transfer is only asked for: it happens after the step and before the next one changes anything, while
    the host goes on.

    Args:
        metrics: of the step.
        group: each of its ranks must make one.
        counters: the history's, to be kept as they are now; None: not wanted.
    """

    def __init__(self, metrics: Metrics, group: DataParallelGroup, counters: Tensor | None = None) -> None:
        values = metrics.tensor if isinstance(metrics, PackedMetrics) else PackedMetrics(metrics).tensor
        group.mean_([values])
        self._names, self._group = list(metrics), group
        # to pinned memory, on CUDA
        self._values = values.to("cpu", non_blocking=True)
        self._counters = None if counters is None else counters.to("cpu", non_blocking=True)
        self._there: torch.cuda.Event | None = None
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(values.device))

    def read(self) -> tuple[dict[str, float], Tensor | None]:
        """The numbers, and the history's counters. Waits for them."""
        if self._there is not None:
            self._group.wait(self._there)
        return dict(zip(self._names, self._values.tolist(), strict=True)), self._counters


@dataclass(frozen=True)
class _Step:
    """One that has been taken and not yet been reported."""

    phase: str
    number: int
    numbers: MetricsTransfer
    before: dict[str, int]  # how far images had been drawn
    after: dict[str, int]
    k_g: int
    evaluates: bool


class Reporter:
    """Reports steps in their order: numbers that are not finite roll the run back, all others are shown and written.

    A step may be added before the one before it is reported. Whatever needs the state of training as a step left it (an
    evaluation, a checkpoint, a K_g that may change) calls for `settle` first.

    Args:
        run: where they are written.
        algorithm: what takes the steps; its K_g follows their numbers.
        log: called with each line meant for a person.
    """

    def __init__(self, run: RunDirectory, algorithm: SimGAN, log: Callable[[str], None]) -> None:
        self._run, self._algorithm, self._state, self._log = run, algorithm, algorithm.state, log
        self._unread: deque[_Step] = deque()
        self._monitor = TrainingMonitor(log)
        self._selector = ModelSelector(self._state)
        self._bar = _ProgressBar(self._state)
        # On CUDA the next step is on its way before one is reported, so that the device never waits for the host.
        self._kept = 1 if self._state.device.type == "cuda" else 0

    def add(self, phase: str, number: int, metrics: Metrics, before: dict[str, int], evaluates: bool) -> None:
        """Take in the step that has just been taken.

        Args:
            phase, number: which it is.
            metrics: of it, on the device.
            before: how far images had been drawn before it.
            evaluates: whether its report has R evaluated.
        """
        state = self._state
        aged = phase == "train" and number % 10 == 0 and state.history is not None
        counters = state.history.counters() if aged and state.history is not None else None
        numbers = MetricsTransfer(metrics, state.group, counters)
        self._unread.append(_Step(phase, number, numbers, before, state.positions(), state.k_g, evaluates))

    def settle(self, everything: bool = True) -> bool:
        """Report all steps, or all but what may wait; False if one rolled the run back: the later ones never were."""
        wanted = everything or self._algorithm.decides(len(self._unread))
        while len(self._unread) > (0 if wanted else self._kept):
            step = self._unread.popleft()
            numbers, counters = step.numbers.read()
            if not all(map(math.isfinite, numbers.values())):
                self._unread.clear()
                self._run.rollback(step.phase, step.number, numbers, step.before, step.after)
                return False
            self._report(step, numbers, counters)
        return True

    def _report(self, step: _Step, numbers: dict[str, float], counters: Tensor | None) -> None:
        state, config, phase = self._state, self._state.config, step.phase
        if phase == "train":
            if counters is not None:
                assert state.history is not None
                numbers["history_age"] = state.history.statistics(counters)["mean_age"]
            if config.k_g_max:
                numbers["k_g"] = step.k_g
            self._algorithm.adapt((numbers["accuracy_refined"] + numbers["accuracy_real"]) / 2)
            self._monitor.watch(step.number, numbers)
        evaluation = self._evaluate() if step.evaluates else {}
        self._run.record(phase, step.number, numbers | evaluation)
        self._bar.show(phase, step.number, step.k_g, numbers)
        if phase == "train" and step.number % config.eval_every == 0:
            text = metrics_line(numbers) + (f"; {evaluation_line(evaluation)}" if evaluation else "")
            path = self._run.path / "pictures" / f"{state.step:08d}.png"
            rate = self._bar.rate()
            if self._run.writes:
                draw_picture(state, path)
            self._log(f"{step.number}/{config.steps}: {text}; {rate}; {path}")

    def _evaluate(self) -> dict[str, float]:
        """R's evaluation, on the first rank; the others get nothing, but know whether labels drifted."""
        state = self._state
        found = self._selector.evaluate() if self._run.writes else {}
        state.drifted = bool(state.group.largest(int(state.drifted)))
        return found

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class _ProgressBar:
    """The bar, and images a second."""

    def __init__(self, state: TrainingState) -> None:
        self._state, self._phase = state, ""
        self._bar: tqdm[None] | None = None
        self._images, self._since = 0, time.monotonic()

    def show(self, phase: str, done: int, k_g: int, numbers: dict[str, float]) -> None:
        """Move on to step ``done`` of ``phase``."""
        if phase != self._phase:
            self.close()
            self._bar = tqdm(
                total=self._state.length(phase),
                initial=done - 1,
                desc={"pretrain_refiner": "R alone", "pretrain_discriminator": "D alone"}.get(phase, "Algorithm 1"),
                unit="it",
                dynamic_ncols=True,
                disable=None if self._state.group.first and not cli.quiet() else True,
            )
            self._phase, self._images, self._since = phase, 0, time.monotonic()
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        self._images += self._state.config.batch_size * k_g
        if phase == "train" and done % 10 == 0:
            self._bar.set_postfix_str(metrics_line(numbers))

    def rate(self) -> str:
        """Synthetic images that R has been trained on, a second; on a known GPU also the share of its matrix peak."""
        state, images = self._state, self._images / (time.monotonic() - self._since)
        text = f"{images:.0f} images/s"
        if (limit := peak(state.device)) is not None:
            rate = images / (state.config.batch_size * state.k_g) * iteration_flops(state)
            text += f", {rate / limit / state.group.size:.0%} of the bfloat16 peak"
        return text

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def metrics_line(metrics: dict[str, float]) -> str:
    """An iteration's numbers, for a person."""
    return (
        f"R {metrics['loss_refiner']:.1f} (adversarial {metrics['adversarial']:.1f}), "
        f"D {metrics['loss_discriminator']:.1f}, "
        f"D right on refined {metrics['accuracy_refined']:.0%} real {metrics['accuracy_real']:.0%}, "
        f"change {metrics['change']:.1f} grey levels"
    )
