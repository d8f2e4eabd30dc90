"""Runs that are killed, stopped, damaged or go wrong, and what they end with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsimgan.errors import InputError, Stopped, TrainingError
from fastsimgan.inference.refiner_file import read_refiner
from fastsimgan.storage.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fastsimgan.training.batches import open_batches
from fastsimgan.training.loop import fit
from fastsimgan.training.run_directory import ATTEMPTS, RunDirectory
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState
from tests.killed_runs import CONFIG, files, images

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("FASTSIMGAN_KILLS", "5"))


@pytest.fixture
def pair():
    return images(12, 0), images(9, 1)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Puts a whole run into a folder, and the process too; each is made once and copied."""
    made: dict[tuple, Path] = {}

    def finish(folder: Path, monkeypatch, **settings) -> Path:
        folder.mkdir()
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            monkeypatch.chdir(made[key])
            fit(images(12, 0), images(9, 1), dataclasses.replace(CONFIG, **settings), log=quiet)
        shutil.copytree(made[key] / "run", folder / "run")
        monkeypatch.chdir(folder)
        return folder

    return finish


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("moments", KILLS, 0), id="random moments"),
        pytest.param(("steps", 1, 1) if KILLS >= 100 else ("steps", 3, 29), id="inside saves"),
        pytest.param(("stops", KILLS, 0), id="sigterm"),
        pytest.param(("moments", KILLS, 1, "ragged"), id="crops of many sizes"),
        pytest.param(("moments", KILLS, 2, "mapped"), id="crops out of a file"),
    ],
)
def test_resume_after_kill_9_or_sigterm_ends_with_the_same_files(how, tmp_path):
    """FASTSIMGAN_KILLS=100 makes the long proof of it: 100 random moments, and every call that changes the disk."""
    command = [sys.executable, "-m", "tests.killed_runs", str(tmp_path), *map(str, how)]
    # With a CUDA device in sight (or a pretend one, which is preloaded) autograd has threads, so nothing can fork.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    print(report)
    assert report["different"] == [] and report["kills"] >= min(KILLS, 5)
    if how[0] == "steps":
        assert report["in_saves"] > 0


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 5), (signal.SIGINT, 7)])
def test_resume_after_a_signal_goes_on_from_the_very_step(number, at, pair, tmp_path, monkeypatch, finished):
    expected = files(finished(tmp_path / "whole", monkeypatch))
    folder = tmp_path / "stopped"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fastsimgan.training.graceful_stop.PATIENCE", 600.0)  # the machine may be busy
    record, handler = RunDirectory.record, signal.getsignal(number)

    def send(self, phase, step, metrics):
        record(self, phase, step, metrics)
        if self._state.step == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "record", send)
        with pytest.raises(Stopped, match=f"train step {at}") as stop:
            fit(*pair, CONFIG, log=quiet)
    assert stop.value.exit_code == 128 + number
    assert list_checkpoints(folder / "run/checkpoints")[-1].name == f"step-{at:08d}-stopped"
    assert signal.getsignal(number) == handler
    fit(*pair, dataclasses.replace(CONFIG, resume=True), log=quiet)
    assert files(folder) == expected


def test_a_stop_right_after_a_checkpoint_does_not_write_it_again(pair, tmp_path, monkeypatch):
    """It would be gone for a moment."""
    monkeypatch.chdir(tmp_path)
    fit(*pair, dataclasses.replace(CONFIG, steps=2), log=quiet)
    path = Path("run/checkpoints/step-00000002")
    before = path.stat().st_ino
    config = dataclasses.replace(CONFIG, steps=2, resume=True)
    batches = open_batches(*pair, config, torch.device("cpu"), quiet)
    state = TrainingState(config, batches.image_shape, torch.device("cpu"), batches=batches)
    run = RunDirectory(config, state, quiet)
    run.open()
    run.write(run.snapshot(), due=False)
    assert path.stat().st_ino == before and list_checkpoints(path.parent)[-1] == path


def test_resume_after_sigterm_to_the_command(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    for name, array in zip("ab", (images(12, 0), images(9, 1)), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    small = [
        "--synthetic",
        "a.npy",
        "--real",
        "b.npy",
        "--steps",
        "100000",
        "--batch-size",
        "4",
        "--hidden-channels",
        "20",
        "--blocks",
        "1",
        "--history",
        "8",
    ]
    command = [sys.executable, "-m", "fastsimgan.train", *small, "--pretrain-discriminator", "0", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "a checkpoint is written, --resume goes on" in error.splitlines()[-1]
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1].name.removesuffix("-stopped") == f"step-{last:08d}"


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_resume_refuses_a_damaged_checkpoint_takes_the_one_before_and_says_so(
    file, damage, pair, tmp_path, monkeypatch, finished
):
    folder = finished(tmp_path / "whole", monkeypatch, eval_every=8)
    expected = files(folder)
    path = folder / "run/checkpoints/step-00000008" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-2])
    else:
        path.unlink()
    said: list[str] = []
    fit(*pair, dataclasses.replace(CONFIG, eval_every=8, resume=True), log=said.append)
    said = [line for line in said if not line.startswith("precision")]  # on a CPU that has bfloat16
    assert "passed over" in said[0] and "step-00000008" in said[0]
    assert "damaged" in said[0] or "not a whole checkpoint" in said[0]
    assert "step-00000006, after iteration 6" in said[1]
    assert files(folder) == expected


def test_resume_after_half_a_line_of_metrics(pair, tmp_path, monkeypatch, finished):
    folder = finished(tmp_path / "whole", monkeypatch, eval_every=8)
    expected = files(folder)
    shutil.rmtree(folder / "run/checkpoints/step-00000008")
    with (folder / "run/metrics.jsonl").open("r+") as file:
        file.truncate(len(file.read()) - 9)
    fit(*pair, dataclasses.replace(CONFIG, eval_every=8, resume=True), log=quiet)
    assert files(folder) == expected


def test_resume_with_no_whole_checkpoint_is_refused(pair, tmp_path, monkeypatch, finished):
    folder = finished(tmp_path / "whole", monkeypatch)
    for path in list_checkpoints(folder / "run/checkpoints"):
        (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint"):
        fit(*pair, dataclasses.replace(CONFIG, resume=True), log=quiet)


def poison(monkeypatch, at: int, times: int, where: str) -> None:
    """The loss or a gradient of R is NaN ``times`` times, in what would be iteration ``at``."""
    left = times
    backward = SimGAN._backward

    def poisoned(self, name, loss):
        nonlocal left
        if name == "refiner" and self.state.step == at - 1 and left:
            left -= 1
            if where == "loss":
                return backward(self, name, loss * float("nan"))
            weight = self.state.refiner.last.weight
            handle = weight.register_hook(lambda gradient: gradient * float("nan"))
            backward(self, name, loss)
            handle.remove()
            return None
        return backward(self, name, loss)

    monkeypatch.setattr(SimGAN, "_backward", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_resume_from_a_checkpoint_after_nan_within_a_step(where, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poison(monkeypatch, at=6, times=2, where=where)
    said: list[str] = []
    fit(*pair, CONFIG, log=said.append)
    warnings = [line for line in said if "must be finite" in line]
    assert len(warnings) == 2
    assert all("in train step 6" in line and "step-00000004, after iteration 4" in line for line in warnings)
    assert "(2 of 3)" in warnings[1]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "train"] == list(range(1, 9))
    fit_again(pair)
    assert all(torch.isfinite(p).all() for p in read_refiner(Path("run/refiner.safetensors")).module.parameters())


def fit_again(pair):
    """A finished run, resumed: nothing is left to do."""
    return fit(*pair, dataclasses.replace(CONFIG, resume=True), log=quiet)


def test_nan_again_and_again_stops_and_names_the_batch(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poison(monkeypatch, at=6, times=99, where="loss")
    said: list[str] = []
    with pytest.raises(TrainingError, match="after going back 3 times.*6 synthetic .*; 4 real") as stop:
        fit(*pair, CONFIG, log=said.append)
    assert stop.value.exit_code == 4 and "\n" not in str(stop.value)
    assert sum("must be finite" in line for line in said) == ATTEMPTS
    batch = json.loads(Path("run/not_finite.json").read_text())
    assert len(batch["synthetic"]) == 6 and set(batch["synthetic"]) <= set(range(12))  # 4 of R's step, 2 of D's
    assert len(batch["real"]) == 4
    assert list_checkpoints(Path("run/checkpoints"))[-1].name == "step-00000004"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_resume_needs_the_rest_of_the_state(precision, pair, tmp_path, monkeypatch):
    """As below, for what only some runs have: a K_g that moves, a way back from NaN, float16's loss scales."""
    monkeypatch.setattr("fastsimgan.training.simgan._WINDOW", 4)
    monkeypatch.setattr("fastsimgan.training.simgan._BAND", (-1.0, -0.5))  # K_g rises after every fourth iteration
    config = dataclasses.replace(CONFIG, steps=10, keep=10, k_g_max=4, precision=precision, eval_every=100)
    with monkeypatch.context() as patch:
        poison(patch, at=3, times=1, where="loss")
        (tmp_path / "whole").mkdir()
        patch.chdir(tmp_path / "whole")
        fit(*pair, config, log=quiet)
    expected = files(tmp_path / "whole")
    tensors, facts = load_checkpoint(tmp_path / "whole/run/checkpoints/step-00000006")
    assert facts["k_g"] == 2 and len(facts["accuracies"]) == 2
    empty: dict[str, object] = {"k_g": 1, "accuracies": []}
    if precision == "float32":  # in float16 the loss scale takes the NaN for an overflow and leaves that update out
        assert facts["attempt"] == 1
        empty["attempt"] = 0
    scales = {name.split(".")[0] for name in tensors if "_scale" in name}
    assert scales == ({"refiner_scale", "discriminator_scale"} if precision == "float16" else set())
    for part in ["nothing", *empty, *sorted(scales)]:
        folder = tmp_path / part
        shutil.copytree(tmp_path / "whole", folder)
        for number in (6, 8, 10):
            shutil.rmtree(folder / f"run/checkpoints/step-{number:08d}")
        less = {n: torch.ones_like(t) if n.startswith(part + ".") else t for n, t in tensors.items()}
        other = facts | ({part: empty[part]} if part in empty else {})
        save_checkpoint(folder / "run/checkpoints", "step-00000006", less, other, keep=10)
        monkeypatch.chdir(folder)
        fit(*pair, dataclasses.replace(config, resume=True), log=quiet)
        assert (files(folder) == expected) == (part == "nothing"), part


def test_resume_needs_every_part_of_the_state(pair, tmp_path, monkeypatch, finished):
    """Take one part of a checkpoint away, and the run ends with other files."""
    finished(tmp_path / "whole", monkeypatch)
    expected = files(tmp_path / "whole")
    folder = finished(tmp_path / "part", monkeypatch, steps=8)
    shutil.rmtree(folder / "run/checkpoints/step-00000008")
    tensors, facts = load_checkpoint(folder / "run/checkpoints/step-00000006")
    shutil.copytree(folder, tmp_path / "original")
    parts = sorted({name.split(".")[0] for name in tensors})
    networks = ["discriminator", "discriminator_optimiser", "history", "refiner", "refiner_optimiser"]
    assert parts == ["average", "best", *networks]
    for part in ["nothing", *parts, "positions", "done", "best look"]:
        shutil.rmtree(folder / "run")
        shutil.copytree(tmp_path / "original/run", folder / "run")
        less = {n: torch.zeros_like(t) if n.startswith(part + ".") else t for n, t in tensors.items()}
        other = dict(facts)
        if part == "positions":
            other["positions"] = {"synthetic": 0, "real": 0}
        if part == "done":
            other["done"] = facts["done"] | {"train": 5}
        if part == "best look":
            other["best"] = None
        save_checkpoint(folder / "run/checkpoints", "step-00000006", less, other, keep=2)
        fit(*pair, dataclasses.replace(CONFIG, resume=True), log=quiet)
        assert (files(folder) == expected) == (part == "nothing"), part
