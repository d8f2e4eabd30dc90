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

from fastsimgan.training.batches import Pools
from fastsimgan.training.data_parallel import Ranks
from fastsimgan.training.model_selection import seen
from fastsimgan.training.monitor import GuardRails
from fastsimgan.training.profiler import iteration_flops, peak
from fastsimgan.training.run_directory import RunFolder
from fastsimgan.training.simgan import Metrics, OneTensor, SimGAN


class Numbers:
    """A step's metrics, means over the ranks, on their way to the host in one transfer.

    On CUDA the transfer is only asked for: it happens after the step and before the next one changes anything, while
    the host goes on.

    Args:
        metrics: of the step.
        ranks: each must make one.
        counters: the history's, to be kept as they are now; None: not wanted.
    """

    def __init__(self, metrics: Metrics, ranks: Ranks, counters: Tensor | None = None) -> None:
        values = metrics.tensor if isinstance(metrics, OneTensor) else OneTensor(metrics).tensor
        ranks.mean_([values])
        self._names, self._ranks = list(metrics), ranks
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
            self._ranks.wait(self._there)
        return dict(zip(self._names, self._values.tolist(), strict=True)), self._counters


@dataclass(frozen=True)
class _Step:
    """One that has been taken and not yet been reported."""

    phase: str
    number: int
    numbers: Numbers
    before: dict[str, int]  # positions of the pools
    after: dict[str, int]
    k_g: int
    looks: bool


class Reports:
    """Reports steps in their order: numbers that are not finite take the run back, all others are shown and written.

    A step may be added before the one before it is reported. Whatever needs the state of training as a step left it (a
    look, a checkpoint, a K_g that may change) calls for `settle` first.

    Args:
        run: where they are written.
        trainer, pools: what takes the steps.
        say: called with each line meant for a person.
    """

    def __init__(self, run: RunFolder, trainer: SimGAN, pools: Pools, say: Callable[[str], None]) -> None:
        self._run, self._trainer, self._pools, self._say = run, trainer, pools, say
        self._unread: deque[_Step] = deque()
        self._guard = GuardRails(say)
        self._bar = _Progress(trainer)
        # On CUDA the next step is on its way before one is reported, so that the device never waits for the host.
        self._kept = 1 if trainer.device.type == "cuda" else 0

    def add(self, phase: str, number: int, metrics: Metrics, before: dict[str, int], looks: bool) -> None:
        """Take in the step that has just been taken.

        Args:
            phase, number: which it is.
            metrics: of it, on the device.
            before: positions of the pools before it.
            looks: whether its report has R looked at.
        """
        trainer = self._trainer
        aged = phase == "train" and number % 10 == 0 and trainer.history is not None
        counters = trainer.history.counters() if aged and trainer.history is not None else None
        numbers = Numbers(metrics, trainer.ranks, counters)
        self._unread.append(_Step(phase, number, numbers, before, self._pools.positions(), trainer.k_g, looks))

    def settle(self, everything: bool = True) -> bool:
        """Report all steps, or all but what may wait; False if one took the run back: the later ones never were."""
        wanted = everything or self._trainer.decides(len(self._unread))
        while len(self._unread) > (0 if wanted else self._kept):
            step = self._unread.popleft()
            numbers, counters = step.numbers.read()
            if not all(map(math.isfinite, numbers.values())):
                self._unread.clear()
                self._run.go_back(step.phase, step.number, numbers, step.before, step.after)
                return False
            self._report(step, numbers, counters)
        return True

    def _report(self, step: _Step, numbers: dict[str, float], counters: Tensor | None) -> None:
        trainer, config, phase = self._trainer, self._run.config, step.phase
        if phase == "train":
            if counters is not None:
                assert trainer.history is not None
                numbers["history_age"] = trainer.history.statistics(counters)["mean_age"]
            if config.k_g_max:
                numbers["k_g"] = step.k_g
            trainer.adapt((numbers["accuracy_refined"] + numbers["accuracy_real"]) / 2)
            self._guard.watch(step.number, numbers)
        looked = self._run.look() if step.looks else {}
        self._run.record(phase, step.number, numbers | looked)
        self._bar.show(phase, step.number, step.k_g, numbers)
        if phase == "train" and step.number % config.picture_every == 0:
            text = f"{line(numbers)}; {seen(looked)}" if looked else line(numbers)
            self._say(f"{step.number}/{config.steps}: {text}; {self._bar.rate()}; {self._run.picture()}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class _Progress:
    """The bar, and images a second."""

    def __init__(self, trainer: SimGAN) -> None:
        self._trainer, self._phase = trainer, ""
        self._bar: tqdm[None] | None = None
        self._images, self._since = 0, time.monotonic()

    def show(self, phase: str, done: int, k_g: int, numbers: dict[str, float]) -> None:
        """Move on to step ``done`` of ``phase``."""
        if phase != self._phase:
            self.close()
            self._bar = tqdm(
                total=self._trainer.length(phase),
                initial=done - 1,
                desc={"pretrain_refiner": "R alone", "pretrain_discriminator": "D alone"}.get(phase, "Algorithm 1"),
                unit="it",
                dynamic_ncols=True,
                disable=None if self._trainer.ranks.first else True,
            )
            self._phase, self._images, self._since = phase, 0, time.monotonic()
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        self._images += self._trainer.config.batch_size * k_g
        if phase == "train" and done % 10 == 0:
            self._bar.set_postfix_str(line(numbers))

    def rate(self) -> str:
        """Synthetic images that R has been trained on, a second; on a known GPU also the share of its matrix peak."""
        trainer, images = self._trainer, self._images / (time.monotonic() - self._since)
        text = f"{images:.0f} images/s"
        if (limit := peak(trainer.device)) is not None:
            rate = images / (trainer.config.batch_size * trainer.k_g) * iteration_flops(trainer)
            text += f", {rate / limit / trainer.ranks.count:.0%} of the bfloat16 peak"
        return text

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def line(metrics: dict[str, float]) -> str:
    """An iteration's numbers, for a person."""
    return (
        f"R {metrics['loss_refiner']:.1f} (adversarial {metrics['adversarial']:.1f}), "
        f"D {metrics['loss_discriminator']:.1f}, "
        f"D right on refined {metrics['accuracy_refined']:.0%} real {metrics['accuracy_real']:.0%}, "
        f"change {metrics['change']:.1f} grey levels"
    )
