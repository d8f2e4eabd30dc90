"""The folder of a training run: made, saved to, loaded from, and rolled back to."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from fastsimgan.config import TrainConfig
from fastsimgan.data.ragged import Size
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.inference.refiner_file import BEST, FILE, save_refiner
from fastsimgan.models.refiner import RefinerNetwork
from fastsimgan.storage.atomic import remove_unfinished, write_atomically, writing
from fastsimgan.storage.checkpoint import STOPPED, list_checkpoints, newest_checkpoint, remove_old, save_checkpoint
from fastsimgan.storage.lock import FolderLock
from fastsimgan.training.metrics_log import MetricsLog
from fastsimgan.training.state import PHASES, Facts, StateDict, TrainingState

ATTEMPTS = 3
"""How often a run goes back to a checkpoint after a number that is not finite."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint's name, what it holds, and the refiners written with it."""

    name: str
    state: StateDict
    refiners: dict[str, RefinerNetwork]


class RunDirectory:
    """Holds ``config.json``, ``metrics.jsonl``, ``pictures/``, ``checkpoints/``, ``refiner.safetensors`` and
    ``best.safetensors``.

    Of several ranks only the first writes; each of them must make every call of `open`, `save` and `rollback`.

    Args:
        config: settings; ``config.out`` is the folder.
        state: what is saved and restored.
        log: called with each line meant for a person.

    Attributes:
        path: the folder.
        writes: whether this process writes there.
    """

    def __init__(self, config: TrainConfig, state: TrainingState, log: Callable[[str], None]) -> None:
        self._config = dataclasses.replace(config, resume=False)  # as it is written down: a resumed run is the same run
        self._resume, self._state, self._log = config.resume, state, log
        self.path: Path = config.out
        self.writes = state.group.first
        self._metrics = MetricsLog(self.path / "metrics.jsonl")
        self._lock = FolderLock()
        self._newest = ""  # name of the checkpoint that was written or loaded last, without `STOPPED`

    # -- made, or gone on with ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folder with a checkpoint of the start in it, or take over the state of its newest whole one."""
        if self._resume:
            self._go_on()
            return
        self._state.group.barrier()  # none looks before all are here
        if self.path.exists():
            raise InputError(f"{self.path}: --out must not exist yet, or --resume goes on with it")
        if not self.writes:
            self.save()
            return
        # Filled under another name, so that the folder is never there without something to resume from.
        final = self.path
        with writing(final) as self.path:
            (self.path / "pictures").mkdir(parents=True)
            self._lock.take(self.path, self._log)
            self._write_config()
            self.save()
        self.path = final

    def close(self) -> None:
        """Let another process go on with the run."""
        self._lock.release()

    def _go_on(self) -> None:
        if self.writes:
            if self.path.is_dir():  # else it is said what is missing
                self._lock.take(self.path, self._log)
            for folder in (self.path, self.path / "pictures", self.path / "checkpoints"):
                remove_unfinished(folder)
        crop = self._state.batches.crop
        if (saved := saved_crop(self.path)) is not None and saved != crop:
            raise InputError(
                f"--crop must stay {saved[0]}x{saved[1]} when resuming {self.path}, got {crop[0]}x{crop[1]}"
            )
        checkpoint = self._load()
        if self.writes:
            self._write_config()
            # A run that was killed just after its last checkpoint has an older refiner and one checkpoint too many.
            self._save_refiners(self._refiners())
            if list_checkpoints(checkpoint.parent)[-1] == checkpoint:
                remove_old(checkpoint.parent, self._config.keep)
        self._log(f"resumed from {checkpoint}, after {_where(self._state.done)}")
        if self._state.device.type == "cuda" and not self._config.deterministic:
            self._log("not to the bit as if it had never stopped: on CUDA that needs --deterministic from the start")

    def _load(self) -> Path:
        """Take over the newest whole checkpoint, and cut the metrics back to it."""
        state = self._state
        path, tensors, found, refused = newest_checkpoint(self.path / "checkpoints")
        for reason in refused:
            self._log(f"passed over: {reason}")
        facts = Facts(**found)
        for name, sha256 in state.batches.hashes.items():
            if sha256 != facts.data[name]:
                raise InputError(f"--{name} must be the images that {path} was trained on (sha256 differs)")
        if (here := state.group.size) != facts.ranks:
            raise InputError(f"{path} must go on with the {facts.ranks} processes it was made by, got {here}")
        self._check_settings(path, facts.settings)
        state.load_state_dict(StateDict(tensors, facts))
        if self.writes:
            self._metrics.cut(state.done)
        self._newest = path.name.removesuffix(STOPPED)
        return path

    def _check_settings(self, checkpoint: Path, before: dict[str, object]) -> None:
        """Raise InputError if a setting that decides about training is not what a checkpoint was written with."""
        now = self._config.decisive()
        for name, value in before.items():  # none in checkpoints of earlier versions
            if name in now and now[name] != value:
                raise InputError(
                    f"{self.path / 'config.json'}: {name} must stay {value!r}, as when {checkpoint} was written, "
                    f"got {now[name]!r}: put it back, or train anew with another --out"
                )

    def _write_config(self) -> None:
        write_atomically(self.path / "config.json", self._config.to_json().encode())

    # -- saved to ----------------------------------------------------------------------------------------------------

    def record(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if self.writes:
            self._metrics.record(phase, step, metrics)

    def save(self, due: bool = True) -> None:
        """Write a checkpoint and the refiners as they now are; not ``due`` is one that only a stop asks for."""
        self.write(Snapshot(_name(self._state), self._state.state_dict(), self._refiners()), due)

    def snapshot(self) -> Snapshot:
        """A copy of the state, in memory, that training does not touch; where there is one rank."""
        return Snapshot(_name(self._state), self._state.state_dict().clone(), copy.deepcopy(self._refiners()))

    def write(self, snapshot: Snapshot, due: bool) -> None:
        """Write a snapshot as a checkpoint, unless the newest is just that, and its refiners."""
        if self.writes and snapshot.name != self._newest:  # to replace it would leave a moment without it
            self._metrics.flush()
            name = snapshot.name if due else snapshot.name + STOPPED
            facts = vars(snapshot.state.facts)
            save_checkpoint(self.path / "checkpoints", name, snapshot.state.tensors, facts, keep=self._config.keep)
            self._save_refiners(snapshot.refiners)
        self._newest = snapshot.name

    def _refiners(self) -> dict[str, RefinerNetwork]:
        """R as it is and, once one was evaluated, the best one; after a drift beyond the limit that is both."""
        state = self._state
        last = state.best_refiner if state.drifted else state.ema
        return {FILE: last} | ({BEST: state.best_refiner} if state.best else {})

    def _save_refiners(self, refiners: dict[str, RefinerNetwork]) -> None:
        for name, network in refiners.items():
            save_refiner(self.path / name, network, histogram=self._state.batches.histogram, training=self._config)

    # -- rolled back to ----------------------------------------------------------------------------------------------

    def rollback(
        self, phase: str, step: int, metrics: dict[str, float], before: dict[str, int], after: dict[str, int]
    ) -> None:
        """After a number that is not finite: back to the newest checkpoint, and on from there in another order.

        Args:
            phase, step: that ``metrics`` are of; training may have gone beyond it.
            metrics: one of them is not finite.
            before, after: how far images had been drawn around that step.

        Raises:
            TrainingError: it has gone back `ATTEMPTS` times already. The step's images are named.
        """
        state = self._state
        name, value = next((name, value) for name, value in metrics.items() if not math.isfinite(value))
        what = f"{name} must be finite, got {value} in {phase} step {step}"
        if state.attempt >= ATTEMPTS:
            batch = state.batches.drawn_between(before, after)
            path = self.path / "not_finite.json"
            if self.writes:
                write_atomically(path, (json.dumps({"metrics": repr(metrics), **batch}) + "\n").encode())
            first = "; ".join(f"{len(taken)} {side} ({_few(taken)})" for side, taken in batch.items())
            raise TrainingError(
                f"{what}, after going back {ATTEMPTS} times. Its images by number: {first}; all in {path}. "
                "Try a lower --learning-rate-refiner and --learning-rate-discriminator"
            )
        attempt = state.attempt + 1
        path = self._load()
        state.reorder(attempt)
        self._log(
            f"warning: {what}: back to {path}, after {_where(state.done)}, and on with the images in another "
            f"order ({attempt} of {ATTEMPTS})"
        )


def saved_crop(folder: Path) -> Size | None:
    """The crops of the run in a folder; None if it is none, or from before there were any."""
    try:
        crop = json.loads((folder / "config.json").read_bytes()).get("crop")
    except (OSError, ValueError):
        return None
    return None if crop is None else (int(crop[0]), int(crop[1]))


def _name(state: TrainingState) -> str:
    """A checkpoint's name; "pretrain" sorts before "step"."""
    if state.phase.startswith("pretrain"):
        return f"pretrain-{state.done['pretrain_refiner'] + state.done['pretrain_discriminator']:08d}"
    return f"step-{state.step:08d}"


def _where(done: dict[str, int]) -> str:
    phase = next((phase for phase in reversed(PHASES) if done[phase]), "train")
    return f"iteration {done[phase]}" if phase == "train" else f"step {done[phase]} of {phase}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
