"""HistoryBuffer: capacity, statistics, and a state that restores mid-run exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsimgan.errors import InputError
from fastsimgan.training.history_buffer import HistoryBuffer

SHAPE = (1, 5, 7)


def images(call: int, n: int = 4) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(call)) * 2 - 1


def test_fills_then_stays_full_and_older_images_come_back() -> None:
    buffer = HistoryBuffer(capacity=18, image_shape=SHAPE, dtype=torch.float32)
    pushed: dict[bytes, int] = {}
    ages = []
    for call in range(30):
        fresh = images(call)
        pushed |= {image.numpy().tobytes(): call for image in fresh}
        drawn = buffer.swap(fresh)
        ages += [call - pushed[image.numpy().tobytes()] for image in drawn]
        assert len(buffer) == min(18, 4 * (call + 1))
        assert buffer.statistics() == {
            "fill": len(buffer) / 18,
            "swaps": call + 1.0,
            "mean_age": sum(ages[-4:]) / 4,
        }
    # Full, 4 of 18 are replaced at a time: an image is drawn at 18 / 4 swaps of age, on average.
    assert max(ages) > 10
    assert 3.5 < sum(ages[40:]) / len(ages[40:]) < 5.5


def test_memory_is_capacity_times_image_and_8_bytes_a_slot() -> None:
    buffer = HistoryBuffer(capacity=512, image_shape=(1, 35, 55), dtype=torch.uint8)
    state = buffer.state_dict()
    assert state["storage"].untyped_storage().nbytes() == 512 * 35 * 55
    assert state["state"].untyped_storage().nbytes() == 512 * 8 + 56


@pytest.mark.parametrize("after", [2, 9])  # while filling; when full
def test_state_restores_mid_run_exactly(after: int, tmp_path: Path) -> None:
    run = HistoryBuffer(capacity=18, image_shape=SHAPE, seed=5)
    for call in range(after):
        run.swap(images(call))
    save_file(run.state_dict(), tmp_path / "history.safetensors")
    resumed = HistoryBuffer(capacity=18, image_shape=SHAPE, seed=99)  # the seed is part of the state
    resumed.load_state_dict(load_file(tmp_path / "history.safetensors"))
    for call in range(after, after + 12):
        assert torch.equal(run.swap(images(call)), resumed.swap(images(call)))
        assert run.statistics() == resumed.statistics()


def test_seeds_differ_and_repeat() -> None:
    def drawn(seed: int) -> torch.Tensor:
        buffer = HistoryBuffer(capacity=18, image_shape=SHAPE, seed=seed)
        return torch.stack([buffer.swap(images(call)) for call in range(9)])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_wrong_states_are_refused_and_nothing_is_changed() -> None:
    buffer = HistoryBuffer(capacity=18, image_shape=SHAPE)
    buffer.swap(images(0))
    before = {name: tensor.clone() for name, tensor in buffer.state_dict().items()}
    other = HistoryBuffer(capacity=19, image_shape=SHAPE).state_dict()
    floats = HistoryBuffer(capacity=18, image_shape=SHAPE, dtype=torch.float32).state_dict()
    for state, message in [
        ({}, "history state must hold storage, state, got nothing"),
        ({"storage": before["storage"]}, "history state must hold storage, state, got storage"),
        (other, r"history storage must be torch.uint8 \(18, 1, 5, 7\), got torch.uint8 \(19, 1, 5, 7\)"),
        (before | {"state": other["state"]}, r"history state must be torch.int64 \(25,\), got torch.int64 \(26,\)"),
        (floats, "history storage must be torch.uint8 .* got torch.float32"),
    ]:
        with pytest.raises(InputError, match=message):
            buffer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in buffer.state_dict().items())


def test_wrong_arguments_are_named() -> None:
    for arguments, message in [
        ({"capacity": 0}, "history must hold at least 1 image of 35 bytes, got capacity 0"),
        ({"capacity": 3, "dtype": torch.int64}, "history dtype must be uint8, .* got torch.int64"),
    ]:
        with pytest.raises(InputError, match=message):
            HistoryBuffer(image_shape=SHAPE, **arguments)
    with pytest.raises(InputError, match="capacity must be at least n=4 and n at least 1, got capacity 3"):
        HistoryBuffer(capacity=3, image_shape=SHAPE).swap(images(0))


@pytest.mark.gpu
def test_gpu_state_moves_between_devices() -> None:
    on_gpu = HistoryBuffer(capacity=18, image_shape=SHAPE, device="cuda")
    for call in range(7):
        on_gpu.swap(images(call).cuda())
    on_cpu = HistoryBuffer(capacity=18, image_shape=SHAPE)
    on_cpu.load_state_dict(on_gpu.state_dict())
    for call in range(7, 12):
        assert torch.equal(on_gpu.swap(images(call).cuda()).cpu(), on_cpu.swap(images(call)))
