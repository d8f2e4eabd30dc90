"""How the benchmarks take time on CUDA: many calls between two events, on buffers in turn, waiting only at the ends."""

from __future__ import annotations

import pytest
import torch

from bench import limits

pytestmark = pytest.mark.pretend
CUDA = torch.device("cuda", 0)


@pytest.fixture
def pretend_device():
    return pytest.importorskip("pretend_device")


@pytest.fixture
def calls():
    """Three that do the same on buffers of their own, and the numbers of those that were made."""
    buffers = [torch.full((1000,), float(number), device=CUDA) for number in range(3)]
    made: list[int] = []

    def call(number: int) -> torch.Tensor:
        made.append(number)
        return buffers[number] + 1

    return [lambda number=number: call(number) for number in range(3)], made


def test_a_sample_is_many_calls_in_turn_and_waits_only_before_and_after(calls, pretend_device):
    three, made = calls
    timer = limits.Timer(three, CUDA)
    timer.rounds = 5
    made.clear()
    with pretend_device.counted() as found:
        assert timer.sample() > 0
    assert made == [0, 1, 2] * 5
    assert found["operators"] == 15
    assert found["syncs"] <= 3


def test_a_graph_holds_every_call_and_a_sample_is_replays(calls, pretend_device):
    three, made = calls
    timer = limits.Timer(three, CUDA, graph=True)
    timer.rounds = 5
    made.clear()
    with pretend_device.counted() as found:
        timer.sample()
    assert made == []
    assert found["graphs"] == 5 and found["syncs"] <= 3
    results = list(timer._turns._results)
    assert [float(result[0]) for result in results] == [1.0, 2.0, 3.0]
    assert len({result.data_ptr() for result in results}) == 3  # no call finds another one's result in the cache


def test_what_is_captured_in_inference_mode_is_replayed_outside():
    images = torch.ones(1000, device=CUDA)

    @torch.inference_mode()
    def refine() -> torch.Tensor:
        return (images + 1).relu_().mul_(3)

    timer = limits.Timer(refine, CUDA, graph=True)
    images.fill_(2)
    timer.sample()
    assert float(timer._turns._results[0][0]) == 9


def test_names_and_sizes_say_that_the_device_is_pretended():
    assert limits.device_name(CUDA).startswith("pretend ") and limits.SMALL
    assert limits.l2_bytes(CUDA) > 0
