"""Refinement through Ray: the same bytes as without it, also where a worker is killed.

`make ray` kills one worker in each of ten runs; the ordinary tests in one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import Invert, content, load_invert, make_shards

from fastsimgan.errors import FastSimGANError, InputError, UnavailableError
from fastsimgan.refine import main
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.ray_workers import supervise
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.verification import verify

RUNS = int(os.environ.get("FASTSIMGAN_RAY_RUNS", "1"))  # `make ray` sets 10


class Mortal(Invert):
    """The process that first comes to its third batch is killed in the middle of a block, as if for memory."""

    def __init__(self, mark: Path) -> None:
        super().__init__(delay=0.02)
        self.mark = mark
        self.batches = 0

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        self.batches += 1
        if self.batches == 3:
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images, batch_size)


def load_mortal(job: Job, worker: int, workers: int) -> Mortal:
    return Mortal(job.output.parent / "mark")


def load_dead(job: Job, worker: int, workers: int) -> Invert:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_workers_blocks_are_redone(cluster: None, model: Path, tmp_path: Path) -> None:
    source = make_shards(tmp_path / "in", 400)  # 20 blocks
    whole = Job(model, source, tmp_path / "whole", batch_size=5)
    refine(whole, loader=load_invert)
    for run in range(RUNS):
        (tmp_path / "mark").unlink(missing_ok=True)
        job = Job(model, source, tmp_path / f"out{run}", batch_size=5)
        report = refine(job, workers=2, loader=load_mortal, supervise=supervise)
        assert (tmp_path / "mark").exists()  # one was killed
        assert (report.images, report.now) == (400, 400)
        assert content(job.output) == content(whole.output)
        assert verify(job.output).images == 400
    print(f"{RUNS} runs, a worker killed in each: the same bytes")


def test_a_workers_error_is_the_runs(cluster: None, model: Path, tmp_path: Path) -> None:
    source = make_shards(tmp_path / "in", 60)
    shard = source / "s00020.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"s00020\.tar: "):
        refine(Job(model, source, tmp_path / "out"), workers=2, loader=load_invert, supervise=supervise)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_that_keep_dying_are_given_up(cluster: None, model: Path, tmp_path: Path) -> None:
    job = Job(model, make_shards(tmp_path / "in", 20), tmp_path / "out")
    with pytest.raises(FastSimGANError, match="workers must not die: one did 4 times"):
        refine(job, workers=1, loader=load_dead, supervise=supervise)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    job = Job(model, make_shards(tmp_path / "in", 20), tmp_path / "out")
    with pytest.raises(UnavailableError, match=r"engine ray needs Ray: pip install fastsimgan\[ray\]"):
        refine(job, loader=load_invert, supervise=supervise)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "refiner.safetensors"]


def test_an_address_without_the_engine_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "in", 20)
    flags = ["--refiner", str(model), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main([*flags, "--address", "auto"]) == 2
    assert capsys.readouterr().err == "error: address must be given with --engine ray only, got auto\n"
