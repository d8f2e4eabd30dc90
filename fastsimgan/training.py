"""The training loop: data on the device, pre-training, Algorithm 1, and what is written along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from fastsimgan.acceleration import GraphedIterations, compile_networks
from fastsimgan.algorithm import Metrics, SimGAN
from fastsimgan.config import TrainConfig
from fastsimgan.data.values import as_images
from fastsimgan.device import choose_device, keep_freed_memory
from fastsimgan.errors import InputError, Stopped
from fastsimgan.guard import GuardRails
from fastsimgan.pools import Images, Pools, open_pools
from fastsimgan.precision import choose_precision, no_tf32
from fastsimgan.profiling import iteration_flops, peak, profile_iterations
from fastsimgan.ranks import Ranks, join_ranks
from fastsimgan.run_folder import RunFolder, State
from fastsimgan.runtime.refiner import Refiner
from fastsimgan.selection import drift_line, seen
from fastsimgan.signals import StopRequest

_SLOW = 1.0
"""Seconds from which on a step is taken for slow; quicker ones are not worth a copy of the state."""

_SAVED = "a checkpoint is written, --resume goes on"


def fit(
    synthetic: Images,
    real: Images,
    config: TrainConfig | None = None,
    *,
    say: Callable[[str], None] = tqdm.write,
) -> Refiner:
    """Train a refiner.

    Writes into ``config.out``: ``config.json``, ``metrics.jsonl``, ``refiner.safetensors`` (the moving average of R),
    ``best.safetensors`` (the best of it on the way, see `Selection`), ``contact_sheet.png``, ``pictures/`` and
    ``checkpoints/``. With ``config.resume`` it goes on from the newest whole checkpoint there and ends exactly where an
    uninterrupted run would have. Under ``torchrun`` each process calls it
    with the same arguments.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16, or float32 in [0, 1]; same size and channels.
        config: settings; the defaults if None.
        say: called with each line meant for a person.

    Returns:
        The trained refiner, loaded from its file.

    Raises:
        InputError: images or settings break a rule; nothing has been written.
        TrainingError: a loss or gradient is not finite, again and again; labels drift beyond ``config.max_drift`` at
            the first look; or another rank is gone.
        Stopped: SIGTERM or SIGINT came; a checkpoint has been written. Where a step takes longer than seconds, SIGTERM
            ends the process instead (exit code 143) once a checkpoint is written of what was before that step.
    """
    config = config or TrainConfig()
    config.validate()
    synthetic, real = as_images(synthetic, "synthetic images"), as_images(real, "real images")

    # Device, data, networks.
    ranks, device_name = join_ranks(config.device)
    device = choose_device(device_name)
    if not ranks.first:
        say = _silent
    _check_shares(config, ranks)
    keep_freed_memory()
    pools = open_pools(synthetic, real, config, device, say, rank=ranks.rank, ranks=ranks.count)
    precision, reason = choose_precision(config.precision, device)
    if config.precision != "auto" or precision != "float32":
        say(f"precision: {precision} ({reason})")
    trainer = SimGAN(config, pools.image_shape, device, ranks, precision)
    if config.identity_init and not trainer.starts_at_identity:
        say(
            f"warning: --identity-init needs --width at least {20 * pools.image_shape[0]} for these images, got "
            f"{config.width}: R starts at random weights (a larger --width, or --pretrain-refiner 1000, helps)"
        )
    if config.dry_run:
        metrics = trainer.iteration(pools.draw_synthetic, pools.draw_real)
        say("dry run: one iteration, nothing written: " + _line(_read(metrics, ranks)))
        return Refiner.from_module(trainer.average, pools.histogram, device)

    run = RunFolder(config, trainer, pools, say)
    alone = ranks.count == 1  # several stop together, after a step: one that left would keep the others waiting
    with StopRequest() as stop, no_tf32():
        run.open()
        with stop.ending_within((lambda: "before the first step; --resume goes on") if alone else None):
            if config.profile:
                say(profile_iterations(trainer, pools, config.profile, run.folder))
            compile_networks(trainer, config.compile, say)
        graphs = GraphedIterations(trainer, pools) if _can_graph(config, pools, device, ranks) else None
        guard = GuardRails(say)
        bar = _Progress(trainer)
        seconds: dict[str, float] = {}  # that the last step of each phase took
        while (phase := trainer.phase) and not run.drifted:
            # SIGTERM does not wait for a step that takes many seconds, or a look: what was before it is saved instead.
            step = trainer.done[phase] + 1
            looks = phase == "train" and (step % config.picture_every == 0 or step == config.steps)
            slow = looks or seconds.get(phase, _SLOW) >= _SLOW
            end = partial(_save_unfinished, run, run.remember(), phase, step) if slow and alone else None
            began = time.monotonic()
            with stop.ending_within(end):
                # One step of R alone, of D alone, or one iteration of Algorithm 1.
                before = pools.positions()
                if phase == "train" and graphs:
                    metrics = graphs()
                else:
                    metrics = trainer.advance(pools.draw_synthetic, pools.draw_real)
                numbers = _read(metrics, ranks)
                if not all(map(math.isfinite, numbers.values())):
                    run.go_back(phase, numbers, before)
                    if graphs:
                        graphs.forget()
                    continue

                # Report.
                if phase == "train":
                    if trainer.history is not None and step % 10 == 0:
                        numbers["history_age"] = trainer.history.statistics()["mean_age"]
                    if config.k_g_max:
                        numbers["k_g"] = trainer.k_g
                    trainer.adapt((numbers["accuracy_refined"] + numbers["accuracy_real"]) / 2)
                    guard.watch(step, numbers)
                looked = run.look() if looks else {}
                run.record(phase, numbers | looked)
                bar.show(phase, numbers)
                if phase == "train" and step % config.picture_every == 0:
                    text = f"{_line(numbers)}; {seen(looked)}" if looked else _line(numbers)
                    say(f"{step}/{config.steps}: {text}; {bar.rate()}; {run.picture()}")
            seconds[phase] = time.monotonic() - began

            # Save.
            stopped_by = ranks.largest(stop.signal, device)
            due = step % config.checkpoint_every == 0 or trainer.phase != phase or run.drifted
            if due or stopped_by:
                run.checkpoint(due)
            if stopped_by and trainer.phase and not run.drifted:
                bar.close()
                raise Stopped(stopped_by, f"after {phase} step {step}; {_SAVED}")
        bar.close()
        refiner = run.finish()
    if ranks.first and not stop.signal:
        say(drift_line(synthetic, refiner))
    return refiner


def _save_unfinished(run: RunFolder, state: State, phase: str, step: int) -> str:
    """Save what was before a step; gives where that is."""
    run.write(state, due=False)
    return f"before the end of {phase} step {step}; {_SAVED}"


def _can_graph(config: TrainConfig, pools: Pools, device: torch.device, ranks: Ranks) -> bool:
    # of several ranks' graphs, one that fails to capture would leave the others waiting: not before it has been run
    return config.cuda_graph and device.type == "cuda" and pools.resident and ranks.count == 1


def _check_shares(config: TrainConfig, ranks: Ranks) -> None:
    if config.batch_size % (2 * ranks.count):
        raise InputError(
            f"--batch-size must be a multiple of twice the {ranks.count} processes, got {config.batch_size}"
        )
    if config.batch_size % (ranks.count * config.accumulate):
        raise InputError(
            f"--accumulate must divide each process's share of --batch-size, {config.batch_size // ranks.count}, "
            f"got {config.accumulate}"
        )
    if config.history and config.history // ranks.count < config.batch_size // ranks.count // 2:
        raise InputError(f"--history must hold half a batch in each process, got {config.history}")


class _Progress:
    """The bar, and images a second."""

    def __init__(self, trainer: SimGAN) -> None:
        self._trainer, self._phase = trainer, ""
        self._bar: tqdm[None] | None = None
        self._images, self._since = 0, time.monotonic()

    def show(self, phase: str, numbers: dict[str, float]) -> None:
        """Move on by one step of ``phase``."""
        config, done = self._trainer.config, self._trainer.done[phase]
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
        self._images += config.batch_size * self._trainer.k_g
        if phase == "train" and done % 10 == 0:
            self._bar.set_postfix_str(_line(numbers))

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


def _silent(_: str) -> None:
    pass


def _read(metrics: Metrics, ranks: Ranks) -> dict[str, float]:
    """An iteration's numbers, means over the ranks, in one transfer from the device."""
    values = torch.stack([value.detach().float() for value in metrics.values()])
    ranks.mean_([values])
    return dict(zip(metrics, values.tolist(), strict=True))


def _line(metrics: dict[str, float]) -> str:
    return (
        f"R {metrics['loss_refiner']:.1f} (adversarial {metrics['adversarial']:.1f}), "
        f"D {metrics['loss_discriminator']:.1f}, "
        f"D right on refined {metrics['accuracy_refined']:.0%} real {metrics['accuracy_real']:.0%}, "
        f"change {metrics['change']:.1f} grey levels"
    )
