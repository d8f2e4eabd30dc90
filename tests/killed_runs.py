"""Kills training runs and resumes them until they end. A program of its own, so that it can fork.

``python -m tests.killed_runs FOLDER moments COUNT SEED`` kills COUNT times at random moments (as many runs as that
takes), ``... steps FROM STEP`` kills at every STEP-th call that changes the disk. ``... stops COUNT SEED`` sends
SIGTERM instead, once in each call of `STUCK` and COUNT times at random moments. With ``ragged`` behind it they are runs
on crops out of images of many sizes, with ``mapped`` out of a file that these are packed in. Each run that ended must
have left the files of the run that nobody killed. Prints one JSON object, and on standard error how far it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsimgan.config import TrainConfig
from fastsimgan.data.ragged import RaggedImages
from fastsimgan.errors import Stopped
from fastsimgan.inference.refiner import read_refiner
from fastsimgan.models.refiner import Refiner
from fastsimgan.storage import checkpoint
from fastsimgan.training import graceful_stop, loop, progress, simgan
from fastsimgan.training.history_buffer import HistoryBuffer
from fastsimgan.training.loop import fit
from fastsimgan.training.model_selection import ModelSelector
from fastsimgan.training.run_directory import RunDirectory

CONFIG = TrainConfig(
    out=Path("run"), steps=8, batch_size=4, hidden_channels=24, blocks=1, history=10, pretrain_refiner=1,
    pretrain_discriminator=2, eval_every=3, checkpoint_every=2, device="cpu",
)  # fmt: skip


STUCK: list[tuple[Any, str, int, str]] = [
    (loop, "compile_networks", 1, "pretrain-00000000"),
    (Refiner, "forward", 1, "pretrain-00000000"),
    (simgan.SimGAN, "_follow", 1, "pretrain-00000000"),
    (HistoryBuffer, "swap", 1, "pretrain-00000001"),
    (simgan.SimGAN, "_backward", 8, "step-00000002"),
    (simgan.SimGAN, "update_refiner", 4, "step-00000003"),
    (RunDirectory, "record", 7, "step-00000003"),
    (progress, "draw_picture", 1, "step-00000002"),
    (ModelSelector, "evaluate", 2, "step-00000005"),
]
"""Calls that never end: which of a run's calls of what, and the checkpoint that SIGTERM must leave there."""


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 20), dtype=np.uint8)


def several(count: int, seed: int, mapped: bool = False) -> RaggedImages:
    """Images of many sizes."""
    sizes = np.random.default_rng(seed).integers(24, 40, (count, 2))
    values = np.random.default_rng(seed).integers(0, 256, int(sizes.prod(1).sum()), dtype=np.uint8)
    if not mapped:
        return RaggedImages(values, sizes, 1)
    with tempfile.TemporaryFile() as file:
        values.tofile(file)
        return RaggedImages(np.memmap(file, np.uint8, "r+", shape=values.shape), sizes, 1)


def pair() -> tuple[Any, Any]:
    """Both sets of the runs."""
    if sys.argv[5:]:
        mapped = sys.argv[5] == "mapped"
        return several(12, 0, mapped), several(9, 1, mapped)
    return images(12, 0), images(9, 1)


def train(folder: Path, kill_at: int = 0, prepare: Callable[[], None] = lambda: None) -> int:
    """Train or resume in a forked child; gives its pid. The child kills itself before its ``kill_at``-th disk call."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(folder)
    prepare()
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, names in ((os, ("fsync", "replace", "rename", "unlink", "rmdir")), (Path, ("rename", "mkdir"))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    checkpoint.save = counted(checkpoint.save)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        data = "host" if sys.argv[5:] == ["mapped"] else CONFIG.data
        config = dataclasses.replace(CONFIG, data=data, resume=Path("run").exists())  # type: ignore[arg-type]
        try:
            fit(*pair(), config, log=lambda _: None)
        except Stopped as stopped:
            os._exit(stopped.exit_code)
        Path("calls").write_text(str(calls))
    os._exit(0)


def impatient() -> None:
    """Each step is taken for a slow one, and SIGTERM waits for none."""
    loop._SLOW = graceful_stop.PATIENCE = 0.0


def stuck(owner: Any, name: str, call: int) -> None:
    """The ``call``-th call of ``owner.name`` does its work, sends SIGTERM and then takes an hour."""
    impatient()
    function, left = getattr(owner, name), call

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        result = function(*arguments, **options)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3600)
        return result

    setattr(owner, name, called)


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a run; of metrics.jsonl without the seconds, which no two runs share."""
    found = {}
    for path in sorted((folder / "run").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                rows = [json.loads(line) for line in data.splitlines()]
                data = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def ended(pid: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code > 0 and code != 128 + signal.SIGTERM:
        raise SystemExit(f"a run failed with exit code {code}")
    return code == 0


def main() -> None:
    torch.set_num_threads(1)  # a process with threads cannot be forked
    fit(*pair(), dataclasses.replace(CONFIG, dry_run=True), log=lambda _: None)  # imports the rest
    root, mode, first, second = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def fresh(name: str) -> Path:
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    whole = fresh("whole")
    began = time.monotonic()
    assert ended(train(whole))
    seconds = time.monotonic() - began
    expected = files(whole)
    assert len(expected) > 10, expected

    kills = runs = saves = 0
    different = []

    def killed(in_a_save: bool) -> None:
        nonlocal kills, saves
        kills += 1
        saves += in_a_save
        if kills % 10 == 0:
            told = f"{kills} kills, {runs} runs, {len(different)} different, {time.monotonic() - began:.0f} s"
            print(told, file=sys.stderr, flush=True)

    def check(folder: Path) -> None:
        nonlocal runs
        runs += 1
        if (found := files(folder)) != expected:
            different.append(sorted(name for name in found | expected if found.get(name) != expected.get(name)))

    def unfinished(folder: Path) -> bool:
        return any(folder.rglob(".writing-*")) or any(folder.rglob(".removing-*"))

    if mode == "steps":
        for kill_at in range(first, int((whole / "calls").read_text()) + 1, second):
            folder = fresh("killed")
            assert not ended(train(folder, kill_at))
            killed(unfinished(folder))
            assert ended(train(folder))
            check(folder)
    if mode == "stops":
        for owner, name, call, last in STUCK:
            folder = fresh("killed")
            pid = train(folder, prepare=partial(stuck, owner, name, call))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == 128 + signal.SIGTERM, (name, code)
            path = checkpoint.list_checkpoints(folder / "run/checkpoints")[-1]
            assert path.name.removesuffix(checkpoint.STOPPED) == last, (name, path)
            tensors, _ = checkpoint.load_checkpoint(path)
            refiner = read_refiner(folder / "run/refiner.safetensors").module.state_dict()
            assert all(torch.equal(value, tensors[f"average.{key}"]) for key, value in refiner.items()), name
            killed(unfinished(folder))
            assert ended(train(folder))
            check(folder)
    if mode in ("moments", "stops"):
        moments = random.Random(second)
        number, prepare = (signal.SIGKILL, lambda: None) if mode == "moments" else (signal.SIGTERM, impatient)
        first += kills
        while kills < first:
            folder, over = fresh("killed"), False
            while not over:
                pid = train(folder, prepare=prepare)
                time.sleep(moments.uniform(0, seconds))
                os.kill(pid, number)  # a child that has ended is a zombie until it is waited for
                if not (over := ended(pid)):
                    killed(unfinished(folder))
            check(folder)
    print(json.dumps({"kills": kills, "in_saves": saves, "runs": runs, "files": len(expected), "different": different}))


if __name__ == "__main__":
    main()
