"""What happens to runs of training while nobody looks: edited settings, two processes on one run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError
from fastsimgan.storage.lock import FolderLock
from fastsimgan.train import main
from fastsimgan.training.loop import fit

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16, 20), dtype=np.uint8)
SMALL = {"hidden_channels": 8, "blocks": 1, "batch_size": 4, "history": 4, "pretrain_discriminator": 1, "device": "cpu"}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def run(tmp_path: Path) -> TrainConfig:
    """A run that ended after two of its four iterations, as far as its checkpoints know."""
    config = TrainConfig(**SMALL, out=tmp_path / "run", steps=2, checkpoint_every=1)
    fit(IMAGES, IMAGES[:9], config, log=quiet)
    return config


@pytest.mark.parametrize("name, value", [("seed", 1), ("lam", 0.5), ("steps", 9), ("batch_size", 8), ("k_d", 2)])
@pytest.mark.parametrize("how", ["config.json", "fit"])
def test_edited_settings_are_refused_by_name(how: str, name: str, value: float, run: TrainConfig, capsys) -> None:
    before = getattr(run, name)
    if how == "fit":
        with pytest.raises(InputError) as caught:
            fit(IMAGES, IMAGES[:9], dataclasses.replace(run, resume=True, **{name: value}), log=quiet)
        said = str(caught.value)
    else:
        np.save(run.out.parent / "a.npy", IMAGES)
        np.save(run.out.parent / "b.npy", IMAGES[:9])
        file = run.out / "config.json"
        settings = json.loads(file.read_text()) | {name: value}
        paths = {"synthetic": str(run.out.parent / "a.npy"), "real": str(run.out.parent / "b.npy")}
        file.write_text(json.dumps(settings | paths))
        kept = file.read_bytes()
        assert main(["--resume", "--out", str(run.out)]) == 2
        said = capsys.readouterr().err
        assert file.read_bytes() == kept
    assert f"config.json: {name} must stay {before!r}, as when " in said and f", got {value!r}: put it back" in said


def test_what_decides_about_nothing_may_change(run: TrainConfig) -> None:
    fit(IMAGES, IMAGES[:9], dataclasses.replace(run, resume=True, eval_every=1, keep=5), log=quiet)


def test_two_processes_do_not_resume_one_run(run: TrainConfig) -> None:
    lock = FolderLock()
    lock.take(run.out, quiet)
    files = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"run: must be left to process {os.getpid()}, which trains in it"):
        fit(IMAGES, IMAGES[:9], dataclasses.replace(run, resume=True), log=quiet)
    assert files == {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    lock.release()
    fit(IMAGES, IMAGES[:9], dataclasses.replace(run, resume=True), log=quiet)


def test_a_run_is_locked_from_its_first_moment_and_a_killed_ones_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, time, numpy as np\n"
        "from fastsimgan.config import TrainConfig\n"
        "from fastsimgan.training import loop\n"
        "images = np.zeros((12, 16, 20), np.uint8)\n"
        "def stop(*_):\n    print('training', flush=True)\n    time.sleep(100)\n"
        "loop._train = stop\n"
        f"loop.fit(images, images, TrainConfig(**{SMALL!r}, out=sys.argv[1], steps=2))\n"
    )
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    while "training" not in process.stdout.readline():
        assert process.poll() is None
    lock = FolderLock()
    try:
        with pytest.raises(InputError, match=f"must be left to process {process.pid}, which"):
            lock.take(out, quiet)
    finally:
        process.kill()
        process.wait()
    lock.take(out, quiet)
    lock.release()
