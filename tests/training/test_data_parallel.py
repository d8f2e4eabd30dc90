"""Several processes on one batch: equal to one process, and what happens when one of them dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.storage.checkpoint import list_checkpoints, load_checkpoint
from fastsimgan.training import data_parallel
from fastsimgan.training.batches import open_batches
from fastsimgan.training.data_parallel import TIMEOUT, DataParallelGroup, join_group
from fastsimgan.training.history_buffer import HistoryBuffer
from fastsimgan.training.loop import _check_shares
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState

ROOT = Path(__file__).resolve().parents[2]
COMPARED, STEPS = 20, 60
FLAGS = [
    "--synthetic", "a.npy", "--real", "b.npy", "--device", "cpu", "--precision", "float32", "--hidden-channels", "20",
    "--blocks", "1", "--batch-size", "8", "--history", "12", "--pretrain-discriminator", "0", "--eval-every", "1000",
    "--checkpoint-every", "10", "--keep", "10", "--steps", str(STEPS),
]  # fmt: skip


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 20), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, count, seed in (("a", 13, 0), ("b", 9, 1)):
        np.save(folder / f"{name}.npy", images(count, seed))
    return folder


def start(folder: Path, out: str, *flags: str) -> subprocess.Popen[str]:
    """Two gloo processes under torchrun."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "fastsimgan.train", "--out", out, *FLAGS, *flags),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class TwoHistories:
    """Both ranks' histories in one process: rank r has every other image of the batch, from the r-th on."""

    def __init__(self, capacity: int, seed: int) -> None:
        shape = (1, 16, 20)
        self.parts = [
            HistoryBuffer(capacity // 2, shape, seed=DataParallelGroup(rank, 2).seed(seed)) for rank in range(2)
        ]

    def swap(self, fresh: Tensor) -> Tensor:
        drawn = [part.swap(fresh[rank::2]) for rank, part in enumerate(self.parts)]
        return torch.stack(drawn, 1).flatten(0, 1)


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """A whole run of two processes."""
    process = start(folder, "two")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return folder / "two"


def test_two_processes_equal_one_with_the_same_batch(two, folder):
    config = TrainConfig(hidden_channels=20, blocks=1, batch_size=8, history=12, steps=STEPS, device="cpu")
    batches = open_batches(images(13, 0), images(9, 1), config, torch.device("cpu"), lambda _: None)
    trainer = SimGAN(TrainingState(config, batches.image_shape, torch.device("cpu"), batches=batches))
    trainer.state.history = TwoHistories(config.history, config.seed)
    for _ in range(COMPARED):
        trainer.iteration(batches.draw_synthetic, batches.draw_real)
    tensors, facts = load_checkpoint(two / "checkpoints" / f"step-{COMPARED:08d}")
    assert facts["ranks"] == 2 and facts["positions"] == batches.positions()
    here = trainer.state
    for name, network in (("refiner", here.refiner), ("discriminator", here.discriminator), ("average", here.ema)):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(tensors[f"{name}.{key}"], value, rtol=0, atol=1e-5)
    histories = [tensors[f"history.{rank}.storage"] for rank in range(2)]
    assert not torch.equal(*histories)
    for rank, part in enumerate(trainer.state.history.parts):
        assert (tensors[f"history.{rank}.state"] == part.state_dict()["state"]).all()


@pytest.mark.slow
def test_one_killed_ends_the_job_with_a_message_and_it_resumes_exactly(two, folder):
    process = start(folder, "killed")
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    metrics = folder / "killed/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 11):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    ranks = [int(pid) for pid in Path(children).read_text().split()]
    killed = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "lost another rank" in output or "Signal 9" in output or "exitcode  : -9" in output, output
    assert TIMEOUT < 60  # what a rank waits for one that does not answer
    print(f"the job ended {time.monotonic() - killed:.1f} s after the kill")
    assert not (folder / "killed/checkpoints/step-00000060").exists()
    again = start(folder, "killed", "--resume")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and "resumed from" in output, output
    sums = [(folder / out / "checkpoints/step-00000060/SHA256SUMS").read_text() for out in ("two", "killed")]
    assert sums[0] == sums[1]


@pytest.mark.slow
def test_sigterm_stops_all_after_the_same_step_and_the_job_resumes_exactly(two, folder):
    process = start(folder, "stopped")
    metrics = folder / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 11):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)  # which torchrun passes on
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "lost another rank" not in output, output
    last = list_checkpoints(folder / "stopped/checkpoints")[-1]
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert last.name.removesuffix("-stopped") == f"step-{done:08d}" and done < STEPS
    again = start(folder, "stopped", "--resume")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and f"resumed from stopped/checkpoints/{last.name}" in output, output
    for name in (path.name for path in list_checkpoints(folder / "two/checkpoints")):
        sums = [(folder / out / "checkpoints" / name / "SHA256SUMS").read_text() for out in ("two", "stopped")]
        assert sums[0] == sums[1], name


def test_each_rank_has_its_own_history_and_all_the_rest_in_common():
    assert DataParallelGroup(0, 2).seed(5) == 5 != DataParallelGroup(1, 2).seed(5) != DataParallelGroup(2, 3).seed(5)
    assert DataParallelGroup(1, 2).seed(5) == DataParallelGroup(1, 4).seed(5)


class Never:
    """A device's event behind gradients that do not come."""

    asked = 0

    def query(self) -> bool:
        self.asked += 1
        assert self.asked < 10_000, "it is waited for without end"
        return False

    def synchronize(self) -> None:
        pass


def test_gradients_that_do_not_come_are_told_by_our_message():
    DataParallelGroup(0, 1, patience=0.01).wait(Never())  # alone: the device's own matter
    with pytest.raises(
        TrainingError, match=r"rank 1 of 2 lost another rank \(none of its gradients in 0.01 s\).*--resume"
    ):
        DataParallelGroup(1, 2, patience=0.01).wait(Never())


def test_on_cuda_gradients_go_through_nccl_by_device_and_agreement_through_gloo(monkeypatch):
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(data_parallel, "_control_group", data_parallel._control_group.__wrapped__)
    for name in ("init_process_group", "new_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(
            data_parallel.dist,
            name,
            lambda *args, name=name, **kwargs: (calls.append((name, args, kwargs)), "control")[1],
        )
    monkeypatch.setattr(data_parallel.dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(data_parallel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(data_parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(data_parallel.atexit, "register", lambda function: calls.append(("at exit", function)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    joined, device = join_group("cuda")
    (_, chosen), (_, backends, options), (_, leave), (_, _, control) = calls
    assert device == chosen == "cuda:1" and backends == ("nccl",) and control["backend"] == "gloo"
    assert options["device_id"] == torch.device("cuda:1")
    # a rank that still compiles is not gone, and NCCL's watchdog is later than our message
    assert options["timeout"] > control["timeout"] > timedelta(seconds=TIMEOUT)
    joined.largest(3)
    name, (shared, _), where = calls[-1]
    assert name == "all_reduce" and not shared.is_cuda and where == {"group": "control"}
    leave()
    assert calls[-1][0] == "destroy_process_group"


def test_shares_must_be_even():
    config = TrainConfig(batch_size=8, history=12)
    _check_shares(config, DataParallelGroup(0, 2))
    with pytest.raises(InputError, match="multiple of twice the 3 processes, got 8"):
        _check_shares(config, DataParallelGroup(0, 3))
    with pytest.raises(InputError, match="--history must hold half a batch in each process, got 3"):
        _check_shares(dataclasses.replace(config, history=3), DataParallelGroup(0, 2))
