"""The race for `residual_block`, with its own stopwatch: captured graphs between events."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from fastsimgan.ops import residual_block as op
from fastsimgan.ops import residual_block_race as module
from fastsimgan.ops.residual_block_race import race

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"


@pytest.mark.skipif(op.implementations()["triton"] is not None, reason=str(op.implementations()["triton"]))
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_all_sides_run_agree_and_are_captured_and_memory_is_handed_back(monkeypatch, backward, features, device):
    if PRETEND:  # every replay is computed by Triton's interpreter, and no clock runs
        monkeypatch.setattr(module, "ROUNDS", 1)
        monkeypatch.setattr(module, "MILLISECONDS", 0.1)
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip(f"no {device}")
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    found = race((1, 16, 5, 7), torch.bfloat16, backward, torch.device(device), features=features)
    assert not found.lost and set(found.milliseconds) == {"triton", "compiled", "reference"}
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.current_device() == 0


def test_a_reference_that_does_not_fit_into_memory_still_wins(monkeypatch):
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(op, "reference", too_large)
    found = race((1, 16, 5, 7), torch.bfloat16, True, torch.device("cuda"), compiled=False)
    assert found.winner == "reference" and "out of memory" in str(found)


def test_a_side_that_cannot_be_captured_loses_and_leaves_nothing_behind(monkeypatch):
    """Its capture ends, for the allocator too: what is freed later would else be kept for it."""
    monkeypatch.setattr(module, "MILLISECONDS", 0.1)
    reference = op.reference

    def waits(*arguments):
        torch.cuda.synchronize()
        return reference(*arguments)

    gc.collect()
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(op, "reference", waits)
    found = race((1, 16, 5, 7), torch.bfloat16, True, torch.device("cuda"), compiled=False)
    assert "cannot be captured" in found.lost["reference"]
    assert torch.cuda.memory_allocated() == before and not torch.cuda.is_current_stream_capturing()
    monkeypatch.setattr(op, "reference", reference)
    found = race((1, 16, 5, 7), torch.bfloat16, True, torch.device("cuda"), compiled=False)
    assert "reference" in found.milliseconds
    assert torch.cuda.memory_allocated() == before
