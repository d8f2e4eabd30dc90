"""Kills training runs with SIGKILL and resumes them until they end. A program of its own, so that it can fork.

``python tests/killed_runs.py FOLDER moments COUNT SEED`` kills COUNT times at random moments (as many runs as that
takes), ``... steps FROM STEP`` kills at every STEP-th call that changes the disk. Each run that ended must have left
the files of the run that nobody killed. Prints one JSON object.
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
import time
from pathlib import Path

import numpy as np
import torch

from fastsimgan import checkpoint
from fastsimgan.config import TrainConfig
from fastsimgan.training import fit

CONFIG = TrainConfig(
    out=Path("run"), steps=8, batch_size=4, width=24, blocks=1, history=10, pretrain_refiner=1,
    pretrain_discriminator=2, picture_every=3, checkpoint_every=2, device="cpu",
)  # fmt: skip


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 20), dtype=np.uint8)


def train(folder: Path, kill_at: int = 0) -> int:
    """Train or resume in a forked child; gives its pid. The child kills itself before its ``kill_at``-th disk call."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(folder)
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
        config = CONFIG if not Path("run").exists() else dataclasses.replace(CONFIG, resume=True)
        fit(images(12, 0), images(9, 1), config, say=lambda _: None)
        Path("calls").write_text(str(calls))
    os._exit(0)


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
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise SystemExit(f"a run failed with exit code {os.waitstatus_to_exitcode(status)}")
    return not os.WIFSIGNALED(status)


def main() -> None:
    torch.set_num_threads(1)  # a process with threads cannot be forked
    fit(images(12, 0), images(9, 1), dataclasses.replace(CONFIG, dry_run=True), say=lambda _: None)  # imports the rest
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

    def check(folder: Path) -> None:
        nonlocal runs
        runs += 1
        if (found := files(folder)) != expected:
            different.append(sorted(name for name in found | expected if found.get(name) != expected.get(name)))

    def unfinished(folder: Path) -> bool:
        return any(folder.rglob(".writing-*")) or any(folder.rglob(".removing-*"))

    if mode == "moments":
        moments = random.Random(second)
        while kills < first:
            folder, over = fresh("killed"), False
            while not over:
                pid = train(folder)
                time.sleep(moments.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)  # a child that has ended is a zombie until it is waited for
                over = ended(pid)
                kills += not over
                saves += not over and unfinished(folder)
            check(folder)
    else:
        for kill_at in range(first, int((whole / "calls").read_text()) + 1, second):
            folder = fresh("killed")
            assert not ended(train(folder, kill_at))
            kills += 1
            saves += unfinished(folder)
            assert ended(train(folder))
            check(folder)
    print(json.dumps({"kills": kills, "in_saves": saves, "runs": runs, "files": len(expected), "different": different}))


if __name__ == "__main__":
    main()
