"""Precision, compiling, CUDA graphs, placement of the data, K_g's band, profiles: faster must not mean different."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsimgan.config import TrainConfig
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError, TrainingError, UnavailableError
from fastsimgan.training import compilation
from fastsimgan.training.batches import open_batches
from fastsimgan.training.compilation import compile_networks
from fastsimgan.training.flops import iteration_flops
from fastsimgan.training.graphed_iterations import GraphedIterations
from fastsimgan.training.loop import fit
from fastsimgan.training.loss_scale import LossScale
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState

CPU = torch.device("cpu")
SMALL = TrainConfig(
    hidden_channels=20, blocks=1, batch_size=4, history=10, pretrain_discriminator=0, steps=8, k_g=2, device="cpu"
)  # fmt: skip


def images(count: int, seed: int, size: tuple[int, ...] = (16, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def quiet(_: str) -> None:
    pass


def losses(
    config: TrainConfig, device: torch.device = CPU, precision: str = "float32", compiled: str = "off", graph=False
):
    batches = open_batches(images(12, 0), images(9, 1), config, device, quiet)
    trainer = SimGAN(TrainingState(config, batches.image_shape, device, precision=precision, batches=batches))
    compile_networks(trainer.state, compiled, quiet)
    graphs = GraphedIterations(trainer, pytest.fail) if graph else None
    rows = []
    for _ in range(config.steps):
        metrics = graphs() if graphs else trainer.iteration(batches.draw_synthetic, batches.draw_real)
        rows.append([float(metrics["loss_refiner"]), float(metrics["loss_discriminator"])])
    return np.array(rows), trainer, batches


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_float32_and_keeps_float32_weights(precision):
    expected, *_ = losses(SMALL)
    found, trainer, _ = losses(SMALL, precision=precision)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert not np.array_equal(found, expected)
    assert all(p.dtype == torch.float32 for p in trainer.state.refiner.parameters())
    assert (len(trainer.state.scales) == 2) == (precision == "float16")


def test_loss_scale_leaves_an_overflowing_step_out_halves_and_is_in_the_state():
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([weight], 0.1, fused=True)
    scale = LossScale(CPU)
    scale.scaled((weight * float("inf")).sum()).backward()
    scale.unscale([weight.grad])
    scale.step(optimiser)
    assert torch.equal(weight, torch.ones(3)) and scale.state_dict()["factor"] == 32768
    assert scale.left_out_is_zero(torch.tensor(7.0)) == 0
    weight.grad = None
    scale.scaled((weight * 2).sum()).backward()
    scale.unscale([weight.grad])
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    scale.step(optimiser)
    assert (weight < 1).all() and scale.state_dict()["good_steps"] == 1
    other = LossScale(CPU)
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()


def test_a_nan_that_comes_again_is_no_overflow():
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([weight], 0.1, fused=True)
    scale = LossScale(CPU)
    told = []
    for _ in range(30):
        weight.grad = torch.full((3,), torch.nan)
        scale.unscale([weight.grad])
        scale.step(optimiser)
        told.append(scale.left_out_is_zero(weight.grad.norm()).item())
    assert told[:25] == [0] * 25 and np.isnan(told[26:]).all()
    assert torch.equal(weight, torch.ones(3))


def test_a_float16_run_whose_gradients_stay_nan_goes_back_and_then_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsimgan.training.loss_scale._SMALLEST", 2.0**14)  # two halvings
    unscale = LossScale.unscale

    def broken(self, gradients):
        gradients[0].fill_(torch.nan)
        unscale(self, gradients)

    monkeypatch.setattr(LossScale, "unscale", broken)
    config = dataclasses.replace(SMALL, precision="float16", out=tmp_path / "r", steps=40)
    with pytest.raises(TrainingError, match="after going back 3 times"):
        fit(images(12, 0), images(9, 1), config, log=quiet)


def test_float16_run_resumes_with_its_loss_scale(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, precision="float16", out=tmp_path / "r", checkpoint_every=3, steps=4)
    fit(images(12, 0), images(9, 1), config, log=quiet)
    from fastsimgan.storage.checkpoint import load_checkpoint

    tensors, _ = load_checkpoint(tmp_path / "r/checkpoints/step-00000004")
    assert {"refiner_scale.factor", "discriminator_scale.good_steps"} <= tensors.keys()
    assert tensors["refiner_scale.good_steps"] + tensors["refiner_scale.factor"] != 65536


def test_a_compiler_that_fails_is_said_or_refused(monkeypatch):
    def broken(_):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(compilation, "_try", broken)
    trainer = SimGAN(TrainingState(SMALL, (1, 16, 20), CPU))
    with pytest.raises(UnavailableError, match="--compile on: torch.compile failed: RuntimeError: no C"):
        compile_networks(trainer.state, "on", quiet)
    trainer.state.device = torch.device("cuda")  # where "auto" compiles
    said: list[str] = []
    compile_networks(trainer.state, "auto", said.append)
    assert len(said) == 1 and "run uncompiled (RuntimeError: no C++ compiler found)" in said[0]
    assert trainer.state.refiner._compiled_call_impl is None
    trainer.state.refiner(torch.zeros(1, 1, 16, 20))


@pytest.mark.parametrize(("k_g", "history", "histogram"), [(1, 10, "keep"), (2, 0, "equalise")])
def test_an_iteration_never_waits_for_the_host(k_g, history, histogram):
    """Whatever reads a value on the host (.item(), a branch on a tensor, nonzero) passes the dispatcher by name."""
    config = dataclasses.replace(SMALL, k_g=k_g, history=history, histogram=histogram)
    batches = open_batches(images(12, 0), images(9, 1), config, CPU, quiet)
    trainer = SimGAN(TrainingState(config, batches.image_shape, CPU, batches=batches))
    trainer.iteration(batches.draw_synthetic, batches.draw_real)
    batches.reserve(trainer.images_drawn())
    before = batches.positions()
    with NoReading():
        metrics = trainer.updates(batches.draw_synthetic, batches.draw_real)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(metrics["loss_refiner"])
    drawn = {name: position - before[name] for name, position in batches.positions().items()}
    assert drawn == trainer.images_drawn()


class NoReading(TorchDispatchMode):
    """Raises where a tensor's value would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


def test_reserved_draws_copy_nothing_from_the_host(monkeypatch):
    sampler = Sampler(10, 0)
    sampler.reserve(25)
    monkeypatch.setattr(torch, "from_numpy", None)
    drawn = torch.cat([sampler.draw(10), sampler.draw(15)])
    assert drawn.tolist() == sampler.indices(0, 25)


def test_ranks_share_one_stream_of_images():
    alone, pair = Sampler(10, 3), [Sampler(10, 3, rank=rank, ranks=2) for rank in range(2)]
    for batch in (4, 6, 12):
        whole = alone.draw(batch)
        parts = [sampler.draw(batch // 2) for sampler in pair]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    assert pair[0].position == alone.position == 22


@pytest.mark.parametrize("colour", [False, True])
def test_images_on_the_host_and_on_the_device_make_the_same_run(colour, tmp_path):
    size = (16, 20, 3) if colour else (16, 20)
    for name, count, seed in (("a", 12, 0), ("b", 9, 1)):
        np.save(tmp_path / f"{name}.npy", images(count, seed, size))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "ab"]
    config = dataclasses.replace(SMALL, steps=4, checkpoint_every=2, eval_every=2, keep=9)
    said: list[str] = []
    fit(*mapped, dataclasses.replace(config, data="host", out=tmp_path / "host"), log=said.append)
    fit(*mapped, dataclasses.replace(config, data="device", out=tmp_path / "device"), log=said.append)
    assert "stay memory-mapped and are read ahead (--data host)" in said[0]
    sums = [(tmp_path / side / "checkpoints/step-00000004/SHA256SUMS").read_text() for side in ("host", "device")]
    assert sums[0] == sums[1]
    # and a resumed one reads on from where it had been drawn to, not from where it had been read ahead to
    import shutil

    shutil.rmtree(tmp_path / "host/checkpoints/step-00000004")
    fit(*mapped, dataclasses.replace(config, data="host", out=tmp_path / "host", resume=True), log=quiet)
    assert (tmp_path / "host/checkpoints/step-00000004/SHA256SUMS").read_text() == sums[0]


def test_placement_is_chosen_by_free_memory_and_said(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", images(12, 0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    said: list[str] = []
    assert open_batches(mapped, mapped, SMALL, CPU, said.append).resident
    monkeypatch.setattr("fastsimgan.training.batches.available_memory", lambda: 10_000)
    assert not open_batches(mapped, mapped, SMALL, CPU, said.append).resident
    assert "they fit half of" in said[0] and "more than half of" in said[1]


def test_k_g_follows_the_discriminators_accuracy_within_its_band(tmp_path):
    trainer = SimGAN(TrainingState(dataclasses.replace(SMALL, k_g=1, k_g_max=3), (1, 16, 20), CPU))
    seen = []
    for accuracy in [0.9] * 60 + [0.7] * 20 + [0.5] * 60:
        trainer.adapt(accuracy)
        seen.append(trainer.state.k_g)
    assert seen[18:20] == [1, 2] and seen[39] == seen[79] == 3 and seen[99] == 2 and seen[-1] == 1
    fixed = SimGAN(TrainingState(SMALL, (1, 16, 20), CPU))
    for _ in range(40):
        fixed.adapt(1.0)
    assert fixed.state.k_g == 2
    with pytest.raises(InputError, match="--k-g-max must be 0 or at least --k-g"):
        dataclasses.replace(SMALL, k_g_max=1).validate()


def test_profile_says_where_the_time_goes_and_changes_nothing(tmp_path):
    config = dataclasses.replace(SMALL, steps=2, out=tmp_path / "plain")
    fit(images(12, 0), images(9, 1), config, log=quiet)
    said: list[str] = []
    fit(images(12, 0), images(9, 1), dataclasses.replace(config, out=tmp_path / "p", profile=2), log=said.append)
    table = (tmp_path / "p/profile.txt").read_text()
    assert table.rstrip("\n") in said
    for part in ("data", "R forward", "D forward", "history", "backward, R's step", "optimiser", "losses and the rest"):
        milliseconds = float(next(line for line in table.splitlines() if line.startswith(part))[24:36])
        assert milliseconds > 0, part
    assert (tmp_path / "p/trace.json.gz").stat().st_size > 1000
    sums = [(tmp_path / name / "checkpoints/step-00000002/SHA256SUMS").read_text() for name in ("plain", "p")]
    assert sums[0].splitlines()[0] == sums[1].splitlines()[0]


def test_flops_are_the_papers_networks():
    config = TrainConfig(hidden_channels=64, batch_size=512, k_g=2)
    trainer = SimGAN(TrainingState(config, (1, 35, 55), CPU))
    # by hand: R 1.14 GFLOP an image (3 of them in its step), D 0.02
    assert iteration_flops(trainer.state) == pytest.approx(
        512 * (2 * (3 * 1.14e9 + 2 * 0.02e9) + 1.14e9 / 2 + 0.12e9), rel=0.02
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graph_and_eager_losses_are_equal(precision):
    device = torch.device("cuda")
    config = dataclasses.replace(SMALL, steps=12)
    eager, first, _ = losses(config, device, precision)
    graph, second, batches = losses(config, device, precision, graph=True)
    np.testing.assert_allclose(graph, eager, rtol=1e-5 if precision == "float32" else 1e-2)
    assert second.state.step == first.state.step == 12
    assert batches.positions() == {"synthetic": 12 * 10, "real": 12 * 4}


@pytest.mark.gpu
def test_no_synchronisation_inside_an_iteration_on_the_gpu():
    device = torch.device("cuda")
    _, trainer, batches = losses(SMALL, device)
    batches.reserve(trainer.images_drawn())
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.updates(batches.draw_synthetic, batches.draw_real)
    finally:
        torch.cuda.set_sync_debug_mode("default")
