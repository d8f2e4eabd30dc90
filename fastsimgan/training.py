"""The training loop: data on the device, pre-training, Algorithm 1, and what is written along the way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastsimgan.algorithm import Metrics, SimGAN
from fastsimgan.checkpoint import newest_checkpoint, save_checkpoint, write_atomically
from fastsimgan.config import TrainConfig
from fastsimgan.data.histogram import non_uniformity
from fastsimgan.data.sampler import Sampler
from fastsimgan.data.values import to_float
from fastsimgan.device import choose_device, keep_freed_memory
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.guard import GuardRails
from fastsimgan.pictures import save_contact_sheet
from fastsimgan.runtime.refiner import FILE, Refiner, load_refiner, prepare, save_refiner

Images = NDArray[Any]
_EQUALISED = 0.06  # below this `non_uniformity`, images are taken for equalised
_SHOWN = 8  # images in a contact sheet


def fit(
    synthetic: Images,
    real: Images,
    config: TrainConfig | None = None,
    *,
    say: Callable[[str], None] = tqdm.write,
) -> Refiner:
    """Train a refiner.

    Writes into ``config.out``: ``config.json``, ``metrics.jsonl``, ``refiner.safetensors`` (the moving average of R),
    ``contact_sheet.png``, ``pictures/`` and ``checkpoints/``. With ``config.resume`` it goes on from the newest whole
    checkpoint there and ends exactly where an uninterrupted run would have.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16, or float32 in [0, 1]; same size and channels.
        config: settings; the defaults if None.
        say: called with each line meant for a person.

    Returns:
        The trained refiner, loaded from its file.

    Raises:
        InputError: images or settings break a rule; nothing has been written.
        TrainingError: a loss is not finite.
    """
    config = config or TrainConfig()
    config.validate()
    device = choose_device(config.device)
    keep_freed_memory()
    pools = _on_device(synthetic, real, config, device, say)
    trainer = SimGAN(config, pools.image_shape, device)
    if config.identity_init and not trainer.starts_at_identity:
        say(
            f"warning: --identity-init needs --width at least {20 * pools.image_shape[0]} for these images, got "
            f"{config.width}: R starts at random weights (a larger --width, or --pretrain-refiner 1000, helps)"
        )
    if config.dry_run:
        metrics = trainer.iteration(pools.draw_synthetic, pools.draw_real)
        say("dry run: one iteration, nothing written: " + _line(_read(metrics)))
        return Refiner.from_module(trainer.average, pools.histogram, device)

    run = _Run(config, trainer, pools, say)
    run.open()
    _pretrain(config, trainer, pools, run)
    guard = GuardRails(say)
    bar = tqdm(total=config.steps, initial=trainer.step, desc="Algorithm 1", unit="it", dynamic_ncols=True)
    while trainer.step < config.steps:
        numbers = _read(trainer.iteration(pools.draw_synthetic, pools.draw_real))
        if trainer.history is not None and trainer.step % 10 == 0:
            numbers["history_age"] = trainer.history.statistics()["mean_age"]
        run.record("train", trainer.step, numbers)
        guard.watch(trainer.step, numbers)
        bar.update()
        if trainer.step % 10 == 0:
            bar.set_postfix_str(_line(numbers))
        if trainer.step % config.picture_every == 0:
            say(f"{trainer.step}/{config.steps}: {_line(numbers)}; {run.picture()}")
        if trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps:
            run.checkpoint()
    bar.close()
    return run.finish()


def _pretrain(config: TrainConfig, trainer: SimGAN, pools: _Pools, run: _Run) -> None:
    """R alone, then D alone (Algorithm 1); a run that resumes has both behind it."""
    if trainer.step:
        return
    for step in tqdm(range(config.pretrain_refiner), desc="R alone", unit="it", dynamic_ncols=True):
        run.record(
            "pretrain_refiner", step + 1, _read(trainer.pretrain_refiner(pools.draw_synthetic(config.batch_size)))
        )
    for step in tqdm(range(config.pretrain_discriminator), desc="D alone", unit="it", dynamic_ncols=True):
        metrics = _read(trainer.update_discriminator(pools.draw_synthetic, pools.draw_real))
        run.record("pretrain_discriminator", step + 1, metrics)


@dataclasses.dataclass
class _Pools:
    """Both sets of images on the device as they are stored, and mini-batches out of them."""

    synthetic: Tensor
    real: Tensor
    histogram: str
    synthetic_sampler: Sampler
    real_sampler: Sampler
    hashes: dict[str, str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.synthetic.shape[1:]
        return channels, height, width

    def draw_synthetic(self, count: int) -> Tensor:
        return prepare(_take(self.synthetic, self.synthetic_sampler.draw(count)), self.histogram)

    def draw_real(self, count: int) -> Tensor:
        return prepare(_take(self.real, self.real_sampler.draw(count)), "keep")


def _take(images: Tensor, indices: Tensor) -> Tensor:
    return images[indices.to(images.device)]


def _on_device(
    synthetic: Images, real: Images, config: TrainConfig, device: torch.device, say: Callable[[str], None]
) -> _Pools:
    tensors = {}
    for name, images in (("synthetic", synthetic), ("real", real)):
        if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16, np.float32) or not len(images):
            raise InputError(
                f"{name} images must be [N, H, W] or [N, H, W, C], uint8, uint16 or float32 in [0, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
        planes = torch.from_numpy(np.array(images))  # a copy: memory maps are read-only
        tensors[name] = (planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2)).contiguous().to(device)
    first, second = tensors["synthetic"], tensors["real"]
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"synthetic and real images must have one size and number of channels, "
            f"got {_size(first)} and {_size(second)}"
        )
    histogram = config.histogram
    if histogram == "equalise" and first.shape[1] != 1:
        raise InputError(f"--histogram equalise needs grey images, got {first.shape[1]} channels")
    if histogram == "auto":
        histogram = "keep"
        if first.shape[1] == 1 and first.dtype != torch.float32 and second.dtype != torch.float32:
            theirs, ours = (non_uniformity(images[:: max(1, len(images) // 500)]) for images in (second, first))
            if theirs < _EQUALISED <= ours:
                histogram = "equalise"
                say(
                    f"histogram: the real images are equalised (distance from uniform {theirs:.3f}) and the synthetic "
                    f"are not ({ours:.3f}): each synthetic image is equalised before R (--histogram keep: not)"
                )
    seeds = np.random.SeedSequence(config.seed).generate_state(2)
    return _Pools(
        first,
        second,
        histogram,
        Sampler(len(first), int(seeds[0])),
        Sampler(len(second), int(seeds[1])),
        {name: hashlib.sha256(np.ascontiguousarray(a).data).hexdigest() for name, a in
         (("synthetic", synthetic), ("real", real))},
    )  # fmt: skip


def _size(images: Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"{height}x{width} with {channels} channel(s)"


class _Run:
    """The folder of a run: what is written there, and going on from it."""

    def __init__(self, config: TrainConfig, trainer: SimGAN, pools: _Pools, say: Callable[[str], None]) -> None:
        self.config, self.trainer, self.pools, self.say = config, trainer, pools, say
        self.folder: Path = config.out
        self.started = time.monotonic()

    def open(self) -> None:
        """Make the folder, or take over the state of its newest whole checkpoint."""
        if not self.config.resume:
            if self.folder.exists():
                raise InputError(f"{self.folder}: --out must not exist yet, or --resume goes on with it")
            (self.folder / "pictures").mkdir(parents=True)
            self.write_config()
            return
        path, tensors, facts, refused = newest_checkpoint(self.folder / "checkpoints")
        for reason in refused:
            self.say(f"passed over: {reason}")
        for name, found in self.pools.hashes.items():
            if found != facts["data"][name]:
                raise InputError(f"--{name} must be the images that {path} was trained on (sha256 differs)")
        self.trainer.load_state(tensors, facts["step"])
        self.pools.synthetic_sampler.position = facts["synthetic_position"]
        self.pools.real_sampler.position = facts["real_position"]
        self._cut_metrics(facts["step"])
        self.write_config()
        self.say(f"resumed from {path}, after iteration {facts['step']}")

    def write_config(self) -> None:
        config = dataclasses.replace(self.config, resume=False)
        write_atomically(self.folder / "config.json", config.to_json().encode())

    def _cut_metrics(self, step: int) -> None:
        """Drop the lines that an interrupted run wrote after its last checkpoint: they will be written again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            if line.endswith("\n") and (row := json.loads(line))["phase"] == "train" and row["step"] > step:
                continue
            kept.append(line)
        write_atomically(path, "".join(line for line in kept if line.endswith("\n")).encode())

    def record(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; stop if a loss is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} must be finite, got {value} in {phase} step {step}: "
                    "try a lower --learning-rate-refiner and --learning-rate-discriminator"
                )
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 3)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row | {name: round(value, 6) for name, value in metrics.items()}) + "\n")

    def picture(self) -> Path:
        """Draw the contact sheet of this moment; always the same images, so that pictures can be compared."""
        synthetic, real = self.pools.synthetic, self.pools.real
        spread = torch.linspace(0, len(synthetic) - 1, _SHOWN).long()
        shown = prepare(_take(synthetic, spread), self.pools.histogram)
        with torch.no_grad():
            refined = self.trainer.average(shown)
        path = self.folder / "pictures" / f"{self.trainer.step:08d}.png"
        raw = to_float(_take(synthetic, spread))
        save_contact_sheet(path, raw, refined, to_float(real[:20_000]))
        return path

    def checkpoint(self) -> None:
        """Write a checkpoint and the refiner as it now is."""
        facts = {
            "synthetic_position": self.pools.synthetic_sampler.position,
            "real_position": self.pools.real_sampler.position,
            "data": self.pools.hashes,
        }
        state = self.trainer.state()
        save_checkpoint(self.folder / "checkpoints", self.trainer.step, state, facts, keep=self.config.keep)
        save_refiner(self.folder / FILE, self.trainer.average, histogram=self.pools.histogram, training=self.config)

    def finish(self) -> Refiner:
        """Draw the last contact sheet and load what was trained."""
        last = self.picture()
        write_atomically(self.folder / "contact_sheet.png", last.read_bytes())
        self.say(f"refiner: {self.folder / FILE}")
        self.say(f"contact sheet: {self.folder / 'contact_sheet.png'}")
        return load_refiner(self.folder, self.config.device)


def _read(metrics: Metrics) -> dict[str, float]:
    """One transfer from the device for all of an iteration's numbers."""
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def _line(metrics: dict[str, float]) -> str:
    return (
        f"R {metrics['loss_refiner']:.1f} (adversarial {metrics['adversarial']:.1f}), "
        f"D {metrics['loss_discriminator']:.1f}, "
        f"D right on refined {metrics['accuracy_refined']:.0%} real {metrics['accuracy_real']:.0%}, "
        f"change {metrics['change']:.1f} grey levels"
    )
