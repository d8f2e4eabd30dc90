"""Random crops inside a replayed CUDA graph are those of the CPU, wherever training is in its stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsimgan.data.ragged import RaggedImages, pack
from fastsimgan.data.sampler import Sampler
from fastsimgan.ops import _extension
from fastsimgan.training.batches import TrainingBatches, open_batches
from fastsimgan.training.graphed_iterations import GraphedIterations
from fastsimgan.training.image_store import HostImages, ResidentCrops
from fastsimgan.training.loop import fit
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState
from tests.cuda.training_runs import CLOSE, CPU, CUDA, PRETEND, SMALL, equal_runs, losses


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `test_training`."""
    monkeypatch.setattr("fastsimgan.training.loop._SLOW", float("inf"))
    if PRETEND:
        monkeypatch.setattr(_extension, "BUILD_INFO", {"cuda": True, "torch": torch.__version__})
        monkeypatch.setattr(_extension, "NOT_LOADED", None)


def several(count: int, seed: int, dtype: str = "uint8", channels: int = 1) -> RaggedImages:
    draw = np.random.default_rng(seed)
    made = []
    for height, width in draw.integers(24, 34, (count, 2)).tolist():
        values = draw.integers(0, 65536, (height, width, channels)[: 2 if channels == 1 else 3], dtype=np.uint16)
        made.append({"uint8": values >> 8, "uint16": values, "float32": values / 65535}[dtype].astype(dtype))
    found = pack(made)
    assert isinstance(found, RaggedImages)
    return found


def make(device: torch.device, dtype: str = "uint8", k_g: int = 2) -> tuple[SimGAN, TrainingBatches]:
    config = dataclasses.replace(SMALL, k_g=k_g, crop=(23, 24))
    batches = open_batches(several(12, 0, dtype), several(9, 1, dtype), config, device, lambda _: None)
    return SimGAN(TrainingState(config, batches.image_shape, device, batches=batches)), batches


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_crops_of_every_type_are_the_cpus(dtype: str, channels: int) -> None:
    images = several(7, 0, dtype, channels)
    there = ResidentCrops(images, Sampler(7, 5, CUDA), CUDA, (20, 17)).draw(21)
    read_ahead = HostImages(images, Sampler(7, 5), CUDA, 6, (20, 17)).draw(21)
    here = ResidentCrops(images, Sampler(7, 5), CPU, (20, 17)).draw(21)
    assert torch.equal(there.cpu(), here) and torch.equal(read_ahead.cpu(), here)


def test_a_replay_cuts_anew_as_the_cpu_does() -> None:
    trainer, batches = make(CUDA)
    graphs = GraphedIterations(trainer, pytest.fail)
    found = [losses(graphs()) for _ in range(10)]
    trainer_there, there = make(CPU)
    expected = [losses(trainer_there.iteration(there.draw_synthetic, there.draw_real)) for _ in range(10)]
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert len(graphs._graphs) == 1 and trainer.state.step == 10
    assert batches.positions() == there.positions() == batches.cursors()


def test_a_captured_draw_follows_a_restart_and_another_attempt() -> None:
    """What decides about a crop is in the device's memory, not in the graph."""
    images = several(7, 0)
    pool, reference = (ResidentCrops(images, Sampler(7, 5, place), place, (20, 17)) for place in (CUDA, CPU))
    pool.draw(4)
    pool.sampler.reserve(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = pool.draw(4)
    where = pool.sampler.addresses()
    for position, attempt in ((0, 0), (23, 0), (4, 1), (2**33, 1)):
        for each in (pool, reference):
            each.sampler.restart(position, attempt)
        pool.sampler.reserve(4)
        graph.replay()
        pool.sampler.drawn_by_a_graph(4)
        assert torch.equal(drawn.cpu(), reference.draw(4))
        assert pool.sampler.cursor() == position + 4
    assert pool.sampler.addresses() == where


def test_a_run_on_several_sizes_is_the_cpus(tmp_path: Path) -> None:
    pair = several(12, 0), several(9, 1)
    config = dataclasses.replace(SMALL, crop=(23, 24), steps=6, eval_every=3)
    for device in ("cpu", "cuda"):
        fit(*pair, dataclasses.replace(config, device=device, out=tmp_path / device), log=lambda _: None)
    equal_runs(tmp_path / "cpu", tmp_path / "cuda")
