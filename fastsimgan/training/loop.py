"""The training loop: data on the device, pre-training, Algorithm 1, and what is written along the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import as_images, in_units
from fastsimgan.data.ragged import Images, RaggedImages, pack
from fastsimgan.errors import InputError, Stopped
from fastsimgan.hardware.device import choose_device, current, keep_freed_memory, short_of_memory
from fastsimgan.hardware.precision import choose_precision, convolutions
from fastsimgan.inference.refiner import Refiner
from fastsimgan.training.acceleration import GraphedIterations, choose_blocks, compile_networks, why_no_graph
from fastsimgan.training.batches import Pools, open_pools
from fastsimgan.training.data_parallel import Ranks, join_ranks
from fastsimgan.training.graceful_stop import StopRequest
from fastsimgan.training.model_selection import drift_line
from fastsimgan.training.profiler import profile_iterations
from fastsimgan.training.progress import Numbers, Reports, line
from fastsimgan.training.run_directory import RunFolder, State, saved_crop
from fastsimgan.training.simgan import SimGAN

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
    uninterrupted run would have; on CUDA so with ``config.deterministic``. Under ``torchrun`` each process calls it
    with the same arguments.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, or a list of ``[H, W]`` or ``[H, W, C]`` of any sizes;
            uint8, uint16, or float32 in [0, 1] (or ``config.range``); same channels.
        config: settings; the defaults if None.
        say: called with each line meant for a person.

    Returns:
        The trained refiner, loaded from its file.

    Raises:
        InputError: images or settings break a rule; nothing has been written.
        UnavailableError: the device, a precision, or ``config.compile`` "on" cannot be had, or the device is short of
            memory.
        TrainingError: a loss or gradient is not finite, again and again; labels drift beyond ``config.max_drift`` at
            the first look; or another rank is gone.
        Stopped: SIGTERM or SIGINT came; a checkpoint has been written. Where a step takes longer than seconds, SIGTERM
            ends the process instead (exit code 143) once a checkpoint is written of what was before that step.
    """
    config = config or TrainConfig()
    config.validate()
    synthetic, real = _as_set(synthetic, "synthetic images"), _as_set(real, "real images")
    if config.range is not None:
        synthetic = in_units(synthetic, config.range, "synthetic images")
        real = in_units(real, config.range, "real images")

    # Device, data, networks.
    ranks, device_name = join_ranks(config.device)
    device = choose_device(device_name)
    if not ranks.first:
        say = _silent
    _check_shares(config, ranks)
    keep_freed_memory()
    smaller = (
        f"a lower --batch-size, --accumulate {2 * config.accumulate} (the same update in a part of the memory)"
        f"{'' if config.recompute else ', --recompute'} or --data host takes less; where another program had it, "
        "--resume goes on"
    )
    with current(device), convolutions(device, config.deterministic), short_of_memory(device, smaller):
        return _fit(synthetic, real, config, say, ranks, device)


def _fit(
    synthetic: Images, real: Images, config: TrainConfig, say: Callable[[str], None], ranks: Ranks, device: torch.device
) -> Refiner:
    if config.resume and config.crop is None:
        config = dataclasses.replace(config, crop=saved_crop(config.out))
    pools = open_pools(
        synthetic,
        real,
        config,
        device,
        say,
        rank=ranks.rank,
        ranks=ranks.count,
        least_of_all=lambda value: -ranks.largest(-value),
    )
    if pools.crop_chosen:
        config = dataclasses.replace(config, crop=pools.crop)  # a resumed run takes it from there
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
        numbers, _ = Numbers(trainer.iteration(pools.draw_synthetic, pools.draw_real), ranks).read()
        say("dry run: one iteration, nothing written: " + line(numbers))
        return Refiner.from_module(trainer.average, pools.histogram, device)

    run = RunFolder(config, trainer, pools, say)
    alone = ranks.count == 1  # several stop together, after a step: one that left would keep the others waiting
    with StopRequest() as stop:
        run.open()
        with stop.ending_within((lambda: "before the first step; --resume goes on") if alone else None):
            if config.profile:
                say(profile_iterations(trainer, pools, config.profile, run.folder))
            choose_blocks(trainer, say)
            compile_networks(trainer, config.compile, say)
        graphs = _graphs(config, trainer, pools, say)
        reports = Reports(run, trainer, pools, say)
        seconds: dict[str, float] = {}  # that the last step of each phase took
        while (phase := trainer.phase) and not run.drifted:
            # SIGTERM does not wait for a step that takes many seconds, or a look: what was before it is saved instead.
            step = trainer.done[phase] + 1
            looks = phase == "train" and (step % config.picture_every == 0 or step == config.steps)
            # Of several ranks none does: each has a clock of its own, and what one reports all must have reported.
            saves = alone and (looks or seconds.get(phase, _SLOW) >= _SLOW)
            if saves and not reports.settle():
                continue
            end = partial(_save_unfinished, run, run.remember(), phase, step) if saves else None
            began = time.monotonic()
            with stop.ending_within(end):
                # One step of R alone, of D alone, or one iteration of Algorithm 1.
                before = pools.positions()
                if phase == "train" and graphs:
                    metrics = graphs()
                else:
                    metrics = trainer.advance(pools.draw_synthetic, pools.draw_real)

                # Report: this step; on CUDA the one before, while this one is computed, unless R is to be looked at as
                # this one left it. After a number that is not finite training goes on from a checkpoint.
                reports.add(phase, step, metrics, before, looks)
                if not reports.settle(everything=looks):
                    continue
            seconds[phase] = time.monotonic() - began

            # Save.
            stopped_by = ranks.largest(stop.signal)
            due = step % config.checkpoint_every == 0 or trainer.phase != phase or run.drifted
            if due or stopped_by:
                if not reports.settle():
                    continue
                run.checkpoint(due)
            if stopped_by and trainer.phase and not run.drifted:
                reports.close()
                raise Stopped(stopped_by, f"after {phase} step {step}; {_SAVED}")
        reports.close()
        refiner = run.finish()
    if ranks.first and not stop.signal:
        say(drift_line(pools.arrays["synthetic"], refiner))
    return refiner


def _save_unfinished(run: RunFolder, state: State, phase: str, step: int) -> str:
    """Save what was before a step; gives where that is."""
    run.write(state, due=False)
    return f"before the end of {phase} step {step}; {_SAVED}"


def _graphs(config: TrainConfig, trainer: SimGAN, pools: Pools, say: Callable[[str], None]) -> GraphedIterations | None:
    """What replays iterations, where that is wanted and can be; else why it cannot is said."""
    if trainer.device.type != "cuda" or not config.cuda_graph:
        return None
    if reason := why_no_graph(trainer, pools):
        say(f"no CUDA graph: {reason}")
        return None
    return GraphedIterations(trainer, pools, say)


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


def _as_set(images: Any, name: str) -> Images:
    """What a caller has as a set of images. Raises InputError if it is none."""
    if isinstance(images, RaggedImages):
        return images
    if isinstance(images, list | tuple) and len({getattr(image, "shape", ())[:2] for image in images}) > 1:
        try:
            return pack([as_images(image[None], name)[0] for image in images])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return as_images(images, name)


def _silent(_: str) -> None:
    pass
