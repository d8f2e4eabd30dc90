"""The race that chooses residual_block's implementation on CUDA: run on a CPU, under a clock that is told the times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsimgan.errors import InputError
from fastsimgan.ops import residual_block as op
from fastsimgan.ops import residual_block_race as module
from fastsimgan.ops.residual_block_race import race

needs_triton = pytest.mark.skipif(op.implementations()["triton"] is not None, reason="triton is not installed")
SHAPE, CPU = (1, 16, 5, 7), torch.device("cpu")


class Clock:
    """Says what it is told to; runs every call, as the real one does."""

    def __init__(self, **milliseconds: float | list[float]) -> None:
        self.milliseconds, self.order = milliseconds, list[str]()

    def __call__(self, name: str, call: Callable[[], object]) -> Callable[[], float]:
        call()
        times = self.milliseconds[name]
        each = iter(times if isinstance(times, list) else [times] * module.ROUNDS)

        def measure() -> float:
            self.order.append(name)
            return next(each)

        return measure


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [torch.float32, None], ids=["float32", "16 bits"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_the_fastest_wins_and_all_agree(dtype, features, backward):
    clock = Clock(triton=1.0, reference=2.0)
    found = race(SHAPE, dtype, backward, CPU, features=features or dtype, compiled=False, stopwatch=clock)
    assert (found.winner, found.impl, found.lost) == ("triton", "triton", {})
    assert found.milliseconds == {"triton": 1.0, "reference": 2.0}
    assert clock.order == ["triton", "reference"] * module.ROUNDS  # in turn: a slow moment is slow for all
    found = race(SHAPE, dtype, backward, CPU, compiled=False, stopwatch=Clock(triton=2.0, reference=1.0))
    assert (found.winner, found.impl) == ("reference", "reference")


@needs_triton
def test_a_tie_changes_nothing():
    found = race(SHAPE, torch.float16, False, CPU, compiled=False, stopwatch=Clock(triton=1.0, reference=1.0))
    assert found.winner == "reference"


@needs_triton
def test_one_slow_round_decides_nothing():
    slow = Clock(triton=[1.0, 1.0, 50.0, 1.0, 40.0], reference=2.0)
    assert race(SHAPE, torch.float16, False, CPU, compiled=False, stopwatch=slow).winner == "triton"


@needs_triton
def test_a_line_for_people():
    found = race(SHAPE, torch.float16, True, CPU, compiled=False, stopwatch=Clock(triton=1.25, reference=2.0))
    assert str(found) == (
        "residual_block 1x16x5x7 float16 forward and backward: triton won (triton 1.25 ms; reference 2 ms)"
    )


def test_compiled_takes_part(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Inductor needs a C++ compiler and minutes
    clock = Clock(triton=2.0, compiled=1.0, reference=3.0)
    found = race(SHAPE, torch.bfloat16, True, CPU, stopwatch=clock)
    assert (found.winner, found.impl) == ("compiled", "reference")  # the network is compiled with the reference in it


def test_what_cannot_be_compiled_loses_and_says_so(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nmore lines")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(op, "_triton_op", broken)
    found = race(SHAPE, torch.bfloat16, False, CPU, stopwatch=Clock(reference=3.0))
    assert found.winner == "reference" and found.milliseconds == {"reference": 3.0}
    assert found.lost["compiled"] == "RuntimeError: no compiler"
    assert "compiled lost: RuntimeError: no compiler" in str(found) and "triton" in found.lost


@needs_triton
@pytest.mark.parametrize("wrong", ["border", "bias", "nan", "gradient"])
def test_what_does_not_agree_loses_however_fast(monkeypatch, wrong):
    right = op.residual_block

    def damaged(features, weight1, bias1, weight2, bias2, impl):
        if wrong == "gradient":
            return right(features, weight1, bias1, weight2.detach() * 1.0 + weight2 * 0, bias2, impl)
        if wrong == "bias":
            return right(features, weight1, bias1, weight2, bias2 * 0, impl)
        out = right(features, weight1, bias1, weight2, bias2, impl)
        change = torch.zeros_like(out)
        if wrong == "nan":
            change[0, 0, 0, 0] = float("nan")
        else:
            change[..., 0] = -out.detach()[..., 0] / 2
        return out + change

    monkeypatch.setattr(op, "residual_block", damaged)
    found = race(SHAPE, torch.float16, True, CPU, compiled=False, stopwatch=Clock(triton=0.1, reference=9.0))
    assert found.winner == "reference" and "of its size off the reference" in found.lost["triton"]


def test_what_cannot_be_timed_loses(monkeypatch):
    clock = Clock(triton=1.0, reference=2.0)
    timed = clock.__call__

    def stopwatch(name, call):
        if name == "triton":
            raise RuntimeError("operation not permitted when stream is capturing")
        return timed(name, call)

    found = race(SHAPE, torch.float16, False, CPU, compiled=False, stopwatch=stopwatch)
    assert found.winner == "reference" and "triton" in found.lost


def test_the_reference_is_what_is_left_when_nothing_can_run(monkeypatch):
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(op, "reference", broken)
    found = race(SHAPE, torch.float16, False, CPU, compiled=False, stopwatch=Clock(triton=1.0, reference=1.0))
    assert found.winner == found.impl == "reference" and not found.milliseconds
    assert found.lost["reference"] == "the reference failed: OutOfMemoryError: CUDA out of memory."


def test_float32_has_no_triton():
    found = race(SHAPE, torch.float32, False, CPU, compiled=False, stopwatch=Clock(reference=1.0))
    assert found.winner == "reference" and found.lost["triton"].startswith("UnavailableError: residual_block impl=")


def test_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    race(SHAPE, torch.float16, False, CPU, compiled=False, stopwatch=Clock(triton=1.0, reference=1.0))
    assert torch.equal(before, torch.get_rng_state())


def test_there_is_no_race_without_cuda():
    with pytest.raises(InputError, match="device must be a CUDA device, .* got cpu"):
        race(SHAPE, torch.float16, False, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_on_the_device(backward):
    found = race((8, 32, 35, 55), torch.bfloat16, backward, torch.device("cuda"))
    print(found)
    assert not found.lost and set(found.milliseconds) == {"triton", "compiled", "reference"}
