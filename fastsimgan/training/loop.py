"""The training loop: data on the device, pre-training, Algorithm 1, and what is written along the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from fastsimgan import cli
from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import as_images, in_units
from fastsimgan.data.ragged import Images, RaggedImages, pack
from fastsimgan.errors import InputError, Stopped
from fastsimgan.hardware.device import choose_device, current, keep_freed_memory, short_of_memory
from fastsimgan.hardware.precision import choose_precision, convolutions
from fastsimgan.inference.refiner import Refiner, load_refiner
from fastsimgan.inference.refiner_file import BEST, FILE
from fastsimgan.storage.atomic import write_atomically
from fastsimgan.training.batches import TrainingBatches, open_batches
from fastsimgan.training.compilation import choose_residual_blocks, compile_networks
from fastsimgan.training.data_parallel import DataParallelGroup, join_group
from fastsimgan.training.graceful_stop import StopRequest
from fastsimgan.training.graphed_iterations import GraphedIterations, why_no_graph
from fastsimgan.training.model_selection import drift_line, evaluation_line
from fastsimgan.training.pictures import draw_picture
from fastsimgan.training.profiler import profile_iterations
from fastsimgan.training.progress import MetricsTransfer, Reporter, metrics_line
from fastsimgan.training.run_directory import RunDirectory, Snapshot, saved_crop
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState

Log = Callable[[str], None]
"""Called with each line meant for a person."""

_SLOW = 1.0
"""Seconds from which on a step is taken for slow; quicker ones are not worth a copy of the state."""

_SAVED = "a checkpoint is written, --resume goes on"


def fit(
    synthetic: Images,
    real: Images,
    config: TrainConfig | None = None,
    *,
    log: Log = cli.say,
) -> Refiner:
    """Train a refiner.

    Writes into ``config.out``: ``config.json``, ``metrics.jsonl``, ``refiner.safetensors`` (the moving average of R),
    ``best.safetensors`` (the best of it on the way, see `ModelSelector`), ``contact_sheet.png``, ``pictures/`` and
    ``checkpoints/``. With ``config.resume`` it goes on from the newest whole checkpoint there and ends exactly where an
    uninterrupted run would have; on CUDA so with ``config.deterministic``. Under ``torchrun`` each process calls it
    with the same arguments.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, or a list of ``[H, W]`` or ``[H, W, C]`` of any sizes;
            uint8, uint16, or float32 in [0, 1] (or ``config.range``); same channels.
        config: settings; the defaults if None.
        log: called with each line meant for a person; by itself it is printed, above the progress bar.

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
    group, device_name = join_group(config.device)
    device = choose_device(device_name)
    if not group.first:
        log = _silent
    _check_shares(config, group)
    keep_freed_memory()
    smaller = (
        f"a lower --batch-size, --accumulate {2 * config.accumulate} (the same update in a part of the memory)"
        f"{'' if config.recompute else ', --recompute'} or --data host takes less; where another program had it, "
        "--resume goes on"
    )
    with current(device), convolutions(device, config.deterministic), short_of_memory(device, smaller):
        return _fit(synthetic, real, config, log, group, device)


def _fit(
    synthetic: Images, real: Images, config: TrainConfig, log: Log, group: DataParallelGroup, device: torch.device
) -> Refiner:
    # Data on the device, networks.
    if config.resume and config.crop is None:
        config = dataclasses.replace(config, crop=saved_crop(config.out))
    batches = open_batches(synthetic, real, config, device, log, group)
    if batches.crop_chosen:
        config = dataclasses.replace(config, crop=batches.crop)  # a resumed run takes it from there
    state = _new_state(config, batches, device, group, log)
    algorithm = SimGAN(state)
    if config.dry_run:
        numbers, _ = MetricsTransfer(algorithm.iteration(batches.draw_synthetic, batches.draw_real), group).read()
        log("dry run: one iteration, nothing written: " + metrics_line(numbers))
        return Refiner.from_module(state.ema, batches.histogram, device)

    # Start or go on, train, end.
    run = RunDirectory(config, state, log)
    with StopRequest() as stop, closing(run):
        run.open()
        alone = group.size == 1  # several stop together, after a step: one that left would keep the others waiting
        with stop.ending_within((lambda: "before the first step; --resume goes on") if alone else None):
            if config.profile:
                log(profile_iterations(state, config.profile, run.path))
            choose_residual_blocks(state, log)
            compile_networks(state, config.compile, log)
        _train(algorithm, run, stop, log)
        refiner = _finish(state, run, log)
    if group.first and not stop.signal:
        log(drift_line(batches.arrays["synthetic"], refiner))
    return refiner


def _new_state(
    config: TrainConfig, batches: TrainingBatches, device: torch.device, group: DataParallelGroup, log: Log
) -> TrainingState:
    """Networks, optimisers and the rest as training begins."""
    precision, reason = choose_precision(config.precision, device)
    if config.precision != "auto" or precision != "float32":
        log(f"precision: {precision} ({reason})")
    state = TrainingState(config, batches.image_shape, device, group, precision, batches)
    return state


def _train(algorithm: SimGAN, run: RunDirectory, stop: StopRequest, log: Log) -> None:
    """All phases from where the state is. Raises Stopped between two steps if a signal asks for it."""
    state, batches, config = algorithm.state, algorithm.state.batches, algorithm.state.config
    graphs = _graphs(algorithm, log)
    reporter = Reporter(run, algorithm, log)
    seconds: dict[str, float] = {}  # that the last step of each phase took
    while (phase := state.phase) and not state.drifted:
        # SIGTERM does not wait for a step that takes many seconds, or an evaluation: what was before it is saved.
        step = state.done[phase] + 1
        evaluates = phase == "train" and (step % config.eval_every == 0 or step == config.steps)
        # Of several ranks none does: each has a clock of its own, and what one reports all must have reported.
        saves = state.group.size == 1 and (evaluates or seconds.get(phase, _SLOW) >= _SLOW)
        if saves and not reporter.settle():
            continue
        end = _saver(run, run.snapshot(), f"{phase} step {step}") if saves else None
        began = time.monotonic()
        with stop.ending_within(end):
            # One step of R alone, of D alone, or one iteration of Algorithm 1.
            before = state.positions()
            if phase == "train" and graphs:
                metrics = graphs()
            else:
                metrics = algorithm.advance(batches.draw_synthetic, batches.draw_real)

            # Report: this step; on CUDA the one before, while this one is computed, unless R is to be evaluated as this
            # one left it. After a number that is not finite training goes on from a checkpoint.
            reporter.add(phase, step, metrics, before, evaluates)
            if not reporter.settle(everything=evaluates):
                continue
        seconds[phase] = time.monotonic() - began

        # Save.
        stopped_by = state.group.largest(stop.signal)
        due = step % config.checkpoint_every == 0 or state.phase != phase or state.drifted
        if due or stopped_by:
            if not reporter.settle():
                continue
            run.save(due)
        if stopped_by and state.phase and not state.drifted:
            reporter.close()
            raise Stopped(stopped_by, f"after {phase} step {step}; {_SAVED}")
    reporter.close()


def _saver(run: RunDirectory, snapshot: Snapshot, step: str) -> Callable[[], str]:
    """What saves the state before a step, and gives where that is."""

    def save() -> str:
        run.write(snapshot, due=False)
        return f"before the end of {step}; {_SAVED}"

    return save


def _graphs(algorithm: SimGAN, log: Log) -> GraphedIterations | None:
    """What replays iterations, where that is wanted and can be; else why it cannot is said."""
    state = algorithm.state
    if state.device.type != "cuda" or not state.config.cuda_graph:
        return None
    if reason := why_no_graph(state):
        log(f"no CUDA graph: {reason}")
        return None
    return GraphedIterations(algorithm, log)


def _finish(state: TrainingState, run: RunDirectory, log: Log) -> Refiner:
    """Draw the last contact sheet, say what there is, and load what was trained."""
    if run.writes:
        picture, sheet = run.path / "pictures" / f"{state.step:08d}.png", run.path / "contact_sheet.png"
        draw_picture(state, picture)
        write_atomically(sheet, picture.read_bytes())
        if state.drifted:
            log(
                f"warning: stopped after iteration {state.step}: labels drift by more than --max-drift "
                f"{state.config.max_drift:g} px; the refiner is the best look before"
            )
        log(f"refiner: {run.path / FILE}")
        if state.best is not None:
            log(f"best look: iteration {state.best['step']:.0f}, {evaluation_line(state.best)}: {run.path / BEST}")
        log(f"contact sheet: {sheet}")
    state.group.barrier()  # the others read only what is finished
    return load_refiner(run.path, str(state.device))


def _check_shares(config: TrainConfig, group: DataParallelGroup) -> None:
    if config.batch_size % (2 * group.size):
        raise InputError(
            f"--batch-size must be a multiple of twice the {group.size} processes, got {config.batch_size}"
        )
    if config.batch_size % (group.size * config.accumulate):
        raise InputError(
            f"--accumulate must divide each process's share of --batch-size, {config.batch_size // group.size}, "
            f"got {config.accumulate}"
        )
    if config.history and config.history // group.size < config.batch_size // group.size // 2:
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
