"""The folder of a training run: what is written there, going on from it, and going back in it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import to_float
from fastsimgan.data.ragged import Size
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.inference.refiner import BEST, FILE, Refiner, load_refiner, save_refiner
from fastsimgan.inference.torch_backend import prepare
from fastsimgan.models.refiner import Refiner as Network
from fastsimgan.reporting.contact_sheet import save_contact_sheet
from fastsimgan.storage.atomic import flush, remove_unfinished, write_atomically, writing
from fastsimgan.storage.checkpoint import STOPPED, list_checkpoints, newest_checkpoint, remove_old, save_checkpoint
from fastsimgan.training.batches import Pools
from fastsimgan.training.model_selection import Selection, seen
from fastsimgan.training.simgan import PHASES, SimGAN

ATTEMPTS = 3
"""How often a run goes back to a checkpoint after a number that is not finite."""

_SHOWN, _NEIGHBOURS = 8, 20_000  # images in a contact sheet, and real ones that the nearest is looked for among


@dataclasses.dataclass(frozen=True)
class State:
    """A checkpoint's name, what it holds (all that decides what comes next), and the refiners written with it."""

    name: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    refiners: dict[str, Network]


class RunFolder:
    """Writes ``config.json``, ``metrics.jsonl``, ``pictures/``, ``checkpoints/``, ``refiner.safetensors`` and
    ``best.safetensors``.

    Of several ranks only the first writes; each of them must make every call of `open`, `checkpoint` and `go_back`.

    Args:
        config: settings; ``config.out`` is the folder.
        trainer, pools: whose state is saved and restored.
        say: called with each line meant for a person.
    """

    def __init__(self, config: TrainConfig, trainer: SimGAN, pools: Pools, say: Callable[[str], None]) -> None:
        self.config = dataclasses.replace(config, resume=False)  # as it is written down: a resumed run is the same run
        self.resume, self.trainer, self.pools, self.say = config.resume, trainer, pools, say
        self.folder: Path = config.out
        self.writes = trainer.ranks.first
        self.selection = Selection(trainer, pools, config.max_drift)
        self.drifted = False  # whether a look was beyond --max-drift, so that training is over
        self.attempt = 0  # how often this run has gone back
        self._newest = ""  # name of the checkpoint that was written or loaded last, without `STOPPED`
        self.started = time.monotonic()

    # -- beginning ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folder with a checkpoint of the start in it, or take over the state of its newest whole one."""
        if self.resume:
            self._resume()
            return
        self.trainer.ranks.largest(0)  # none looks before all are here
        if self.folder.exists():
            raise InputError(f"{self.folder}: --out must not exist yet, or --resume goes on with it")
        # Filled under another name, so that the folder is never there without something to resume from.
        if not self.writes:
            self.checkpoint()
            return
        final = self.folder
        with writing(final) as self.folder:
            (self.folder / "pictures").mkdir(parents=True)
            self._write_config()
            self.checkpoint()
        self.folder = final

    def _resume(self) -> None:
        if self.writes:
            for folder in (self.folder, self.folder / "pictures", self.folder / "checkpoints"):
                remove_unfinished(folder)
        if (saved := saved_crop(self.folder)) is not None and saved != self.pools.crop:
            raise InputError(
                f"--crop must stay {saved[0]}x{saved[1]} when resuming {self.folder}, "
                f"got {self.pools.crop[0]}x{self.pools.crop[1]}"
            )
        path = self._load()
        if self.writes:
            self._write_config()
            # A run that was killed just after its last checkpoint has an older refiner and one checkpoint too many.
            self._save_refiners(self._refiners())
            if list_checkpoints(path.parent)[-1] == path:
                remove_old(path.parent, self.config.keep)
        done = self.trainer.done
        self.say(f"resumed from {path}, after {_where(done)}")
        if self.trainer.device.type == "cuda" and not self.config.deterministic:
            self.say("not to the bit as if it had never stopped: on CUDA that needs --deterministic from the start")

    def _load(self) -> Path:
        """Take over the newest whole checkpoint, and cut the metrics back to it."""
        path, tensors, facts, refused = newest_checkpoint(self.folder / "checkpoints")
        for reason in refused:
            self.say(f"passed over: {reason}")
        for name, found in self.pools.hashes.items():
            if found != facts["data"][name]:
                raise InputError(f"--{name} must be the images that {path} was trained on (sha256 differs)")
        if (here := self.trainer.ranks.count) != facts["ranks"]:
            raise InputError(f"{path} must go on with the {facts['ranks']} processes it was made by, got {here}")
        self.trainer.load_state(tensors, facts["done"])
        self.trainer.k_g, self.trainer.accuracies = facts["k_g"], facts["accuracies"]
        self.attempt = facts["attempt"]
        self.selection.load_state(tensors, facts)
        self.drifted = self.selection.drifted
        self.pools.restart(facts["positions"], self.attempt)
        if self.writes:
            self._cut_metrics(facts["done"])
        self._newest = path.name.removesuffix(STOPPED)
        return path

    def _write_config(self) -> None:
        write_atomically(self.folder / "config.json", self.config.to_json().encode())

    def _cut_metrics(self, done: dict[str, int]) -> None:
        """Drop the lines written after a checkpoint: they will be written again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        rows = [(line, json.loads(line)) for line in whole]
        kept = [line for line, row in rows if row["step"] <= done[row["phase"]]]
        write_atomically(path, "".join(kept).encode())

    # -- on the way --------------------------------------------------------------------------------------------------

    def record(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self.started, 3)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row | {name: round(value, 6) for name, value in metrics.items()}) + "\n")

    def look(self) -> dict[str, float]:
        """Have the refiner judged as it is (see `Selection`), on the first rank; the others get nothing."""
        looked = self.selection.look() if self.writes else {}
        self.drifted = bool(self.trainer.ranks.largest(int(self.selection.drifted)))
        return looked

    def picture(self) -> Path:
        """Draw the contact sheet of this moment; always the same images, so that pictures can be compared."""
        path = self.folder / "pictures" / f"{self.trainer.step:08d}.png"
        if self.writes:
            synthetic = self.pools.some("synthetic", _SHOWN)
            with torch.no_grad():
                refined = self.trainer.average(prepare(synthetic, self.pools.drawn_histogram))
            real = self.pools.some("real", _NEIGHBOURS)
            save_contact_sheet(path, to_float(synthetic), refined, to_float(real))
        return path

    def checkpoint(self, due: bool = True) -> None:
        """Write a checkpoint and the refiner as it now is; not ``due`` is one that only a stop asks for."""
        self.write(self._state(), due)

    def remember(self) -> State:
        """A copy of the state, in memory, that training does not touch; where there is one rank."""
        state = self._state()
        return State(
            state.name,
            {name: tensor.clone() for name, tensor in state.tensors.items()},
            copy.deepcopy(state.facts),
            copy.deepcopy(state.refiners),
        )

    def write(self, state: State, due: bool) -> None:
        """Write a state as a checkpoint, unless the newest is just that, and its refiners."""
        if self.writes and state.name != self._newest:  # to replace it would leave a moment without it
            flush(self.folder / "metrics.jsonl")
            name = state.name if due else state.name + STOPPED
            save_checkpoint(self.folder / "checkpoints", name, state.tensors, state.facts, keep=self.config.keep)
            self._save_refiners(state.refiners)
        self._newest = state.name

    def _state(self) -> State:
        # every rank must call it: the histories of all come to the first
        best, choice = self.selection.state()
        tensors = self.trainer.state() | best
        facts = {
            "done": self.trainer.done,
            "k_g": self.trainer.k_g,
            "accuracies": self.trainer.accuracies,
            "attempt": self.attempt,
            "positions": self.pools.positions(),
            "ranks": self.trainer.ranks.count,
            "data": self.pools.hashes,
            **choice,
        }
        return State(_name(self.trainer), tensors, facts, self._refiners())

    def _refiners(self) -> dict[str, Network]:
        """R as it is and, from the first look on, the best one; after a drift beyond the limit that is both."""
        last = self.selection.network if self.drifted else self.trainer.average
        return {FILE: last} | ({BEST: self.selection.network} if self.selection.best else {})

    def _save_refiners(self, refiners: dict[str, Network]) -> None:
        for name, network in refiners.items():
            save_refiner(self.folder / name, network, histogram=self.pools.histogram, training=self.config)

    def go_back(
        self, phase: str, step: int, metrics: dict[str, float], before: dict[str, int], after: dict[str, int]
    ) -> None:
        """After a number that is not finite: back to the newest checkpoint, and on from there in another order.

        Args:
            phase, step: that ``metrics`` are of; training may have gone beyond it.
            metrics: one of them is not finite.
            before, after: positions of the pools around that step.

        Raises:
            TrainingError: it has gone back `ATTEMPTS` times already. The step's images are named.
        """
        name, value = next((name, value) for name, value in metrics.items() if not math.isfinite(value))
        what = f"{name} must be finite, got {value} in {phase} step {step}"
        if self.attempt >= ATTEMPTS:
            batch = self.pools.drawn_between(before, after)
            path = self.folder / "not_finite.json"
            if self.writes:
                write_atomically(path, (json.dumps({"metrics": repr(metrics), **batch}) + "\n").encode())
            first = "; ".join(f"{len(taken)} {side} ({_few(taken)})" for side, taken in batch.items())
            raise TrainingError(
                f"{what}, after going back {ATTEMPTS} times. Its images by number: {first}; all in {path}. "
                "Try a lower --learning-rate-refiner and --learning-rate-discriminator"
            )
        attempt = self.attempt + 1
        path = self._load()
        self.attempt = attempt
        self.pools.restart(self.pools.positions(), attempt)
        self.say(
            f"warning: {what}: back to {path}, after {_where(self.trainer.done)}, and on with the images in another "
            f"order ({attempt} of {ATTEMPTS})"
        )

    # -- end ---------------------------------------------------------------------------------------------------------

    def finish(self) -> Refiner:
        """Draw the last contact sheet and load what was trained."""
        last = self.picture()
        if self.writes:
            write_atomically(self.folder / "contact_sheet.png", last.read_bytes())
            if self.drifted:
                self.say(
                    f"warning: stopped after iteration {self.trainer.step}: labels drift by more than --max-drift "
                    f"{self.config.max_drift:g} px; the refiner is the best look before"
                )
            self.say(f"refiner: {self.folder / FILE}")
            if (best := self.selection.best) is not None:
                self.say(f"best look: iteration {best['step']:.0f}, {seen(best)}: {self.folder / BEST}")
            self.say(f"contact sheet: {self.folder / 'contact_sheet.png'}")
        self.trainer.ranks.largest(0)  # the others read only what is finished
        return load_refiner(self.folder, str(self.trainer.device))


def saved_crop(folder: Path) -> Size | None:
    """The crops of the run in a folder; None if it is none, or from before there were any."""
    try:
        crop = json.loads((folder / "config.json").read_bytes()).get("crop")
    except (OSError, ValueError):
        return None
    return None if crop is None else (int(crop[0]), int(crop[1]))


def _name(trainer: SimGAN) -> str:
    """A checkpoint's name; "pretrain" sorts before "step"."""
    if trainer.phase.startswith("pretrain"):
        return f"pretrain-{trainer.done['pretrain_refiner'] + trainer.done['pretrain_discriminator']:08d}"
    return f"step-{trainer.step:08d}"


def _where(done: dict[str, int]) -> str:
    phase = next((phase for phase in reversed(PHASES) if done[phase]), "train")
    return f"iteration {done[phase]}" if phase == "train" else f"step {done[phase]} of {phase}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
