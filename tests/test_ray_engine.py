"""Refinement through Ray: the same bytes as without it, also where a worker is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from fastsimgan.ray_engine import refine
from fastsimgan.verification import verify
from fastsimgan.workers import Job

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.data", reason="Ray Data is not installed")


class Invert:
    channels = 1

    def __init__(self, mark: Path | None = None) -> None:
        self.mark = mark

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        if self.mark is not None:
            try:
                self.mark.touch(exist_ok=False)  # the first worker to come here dies, in the middle of a block
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return 255 - images


def load_mortal(job: Job, worker: int, workers: int) -> Invert:
    return Invert(job.output.parent / "mark")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    here = os.path.dirname(__file__)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    paths = os.pathsep.join([here, os.path.dirname(here)])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


@pytest.mark.skipif("FASTSIMGAN_RAY" not in os.environ, reason="starts a Ray cluster: FASTSIMGAN_RAY=1 runs it")
def test_a_killed_workers_block_is_redone(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    images = np.random.default_rng(0).integers(0, 256, (60_000, 35, 55), dtype=np.uint8)
    np.save(tmp_path / "in.npy", images)
    for run in range(int(os.environ["FASTSIMGAN_RAY"])):
        output = tmp_path / f"out{run}.npy"
        (tmp_path / "mark").unlink(missing_ok=True)
        job = Job(tmp_path / "model", tmp_path / "in.npy", output)
        assert refine(job, workers=2, loader=load_mortal).images == len(images)
        assert (tmp_path / "mark").exists()
        assert np.array_equal(np.load(output), 255 - images)
        verify(output)
