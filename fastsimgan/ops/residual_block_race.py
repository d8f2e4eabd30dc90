"""Which implementation of `residual_block` is fastest on a CUDA device: found by timing them there, at start-up.

Whether a kernel of ours beats cuDNN or what `torch.compile` makes of the reference depends on the GPU, the sizes and
their versions, so nothing is assumed: whatever is slower, does not compile, or does not agree with the reference loses,
and the reference is always there to win. The choice depends on timing: where two runs must be equal to the bit, name an
implementation instead of racing.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.hardware.cuda_graphs import Captured, capture
from fastsimgan.ops import residual_block as op

ROUNDS = 5
MILLISECONDS = 5.0
"""How long a round of one side takes at least, about: a call is replayed as often as that needs."""
_RESULTS = ("the result", *(f"the gradient of {name}" for name in ("features", "weight1", "bias1", "weight2", "bias2")))
_CLOSE, _FAR = 4, 32  # tolerances, in units of the products' precision

Stopwatch = Callable[[str, Callable[[], object]], Callable[[], float]]
"""Given a side's name and its call, prepares to time it; what it returns times the call once, in milliseconds."""


@dataclass(frozen=True)
class RaceResult:
    """What `race` found. ``str()`` is a line for people, with the winner, the times and who lost without one."""

    title: str
    winner: str
    """"triton", "compiled" (`torch.compile` of the reference) or "reference"."""
    milliseconds: dict[str, float]
    """The median time of each side that ran and agreed with the reference."""
    lost: dict[str, str] = field(default_factory=dict)
    """Why each other side lost."""

    @property
    def impl(self) -> str:
        """What to pass to `residual_block`: where "compiled" won, the reference, in a network that is compiled."""
        return "triton" if self.winner == "triton" else "reference"

    def __str__(self) -> str:
        times = [f"{name} {time:.3g} ms" for name, time in sorted(self.milliseconds.items(), key=lambda side: side[1])]
        reasons = [f"{name} lost: {reason}" for name, reason in self.lost.items()]
        return f"{self.title}: {self.winner} won ({'; '.join(times + reasons)})"


def race(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    device: torch.device,
    *,
    features: torch.dtype = torch.float32,
    compiled: bool = True,
    stopwatch: Stopwatch | None = None,
) -> RaceResult:
    """Time each implementation of one block on ``device``, in turn, and name the fastest.

    Args:
        shape: ``[B, C, H, W]`` of the features.
        dtype: what products are computed in: autocast's float16 or bfloat16, or float32 for no autocast.
        backward: whether to time forward and backward, or forward alone.
        device: a CUDA device.
        features: type of the features between blocks, float32 or ``dtype``.
        compiled: whether `torch.compile` takes part.
        stopwatch: for tests; by default replays of a CUDA graph between events, which is the device's own time.

    Weights are float32, and all is in channels_last. No generator of random numbers is disturbed. Needs the memory of a
    training step's block, and hands it back.

    Raises:
        InputError: ``device`` is not CUDA and no stopwatch is given.
    """
    if stopwatch is None:
        if device.type != "cuda":
            raise InputError(f"device must be a CUDA device, whose time is what a race compares, got {device}")
        stopwatch = _GraphedStopwatch(device)
    try:
        return _race(shape, dtype, backward, device, features, compiled, stopwatch)
    finally:
        if device.type == "cuda":
            gc.collect()  # captured graphs own their memory until they are collected
            torch.cuda.empty_cache()


def _race(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    device: torch.device,
    features: torch.dtype,
    compiled: bool,
    stopwatch: Stopwatch,
) -> RaceResult:
    direction = "forward and backward" if backward else "forward"
    name = str(dtype).removeprefix("torch.")
    title = f"residual_block {'x'.join(map(str, shape))} {name} {direction}"
    calls, fill = _sides(shape, dtype, backward, device, features, compiled)
    watches: dict[str, Callable[[], float]] = {}
    times: dict[str, list[float]] = {}
    lost: dict[str, str] = {}
    try:
        for signs in ("positive", "mixed"):
            fill(signs)
            expected = calls["reference"]()
            for side in [side for side in calls if side != "reference" and side not in lost]:
                try:
                    reason = _disagreement(calls[side](), expected, dtype, signs)
                except Exception as error:  # the compilers', cuDNN's and the allocator's have no common class
                    reason = _one_line(error)
                if reason is not None:
                    lost[side] = reason
            del expected
        for side in [side for side in calls if side not in lost]:
            try:
                watches[side] = stopwatch(side, calls[side])
            except Exception as error:
                lost[side] = _one_line(error)
        for _ in range(ROUNDS):
            for side in [side for side in watches if side not in lost]:
                try:
                    times.setdefault(side, []).append(watches[side]())
                except Exception as error:
                    lost[side] = _one_line(error)
    except Exception as error:  # the reference's own: there is nothing to agree with
        lost = dict.fromkeys(calls, f"the reference failed: {_one_line(error)}")
    milliseconds = {side: statistics.median(taken) for side, taken in times.items() if side not in lost}
    winner = min(milliseconds, key=lambda side: (milliseconds[side], side != "reference"), default="reference")
    return RaceResult(title, winner, milliseconds, lost)


def _sides(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    device: torch.device,
    features: torch.dtype,
    compiled: bool,
) -> tuple[dict[str, Callable[[], list[Tensor]]], Callable[[str], None]]:
    """Each side's call: the result, and behind it the gradients of all arguments; and what draws those.

    Drawn positive, every ReLU passes, so that sides differ by rounding alone. Drawn with mixed signs, they do what they
    are for, but values within rounding of 0 pass their gradient on one side and not on the other.
    """
    random = torch.Generator(device).manual_seed(0)
    maps, last = shape[1], torch.channels_last

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        layout = last if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=dtype, device=device, memory_format=layout)

    image = new(*shape, dtype=features)
    layers = new(maps, maps, 3, 3), new(maps), new(maps, maps, 3, 3), new(maps)
    given = [image, *layers]
    for tensor in given:
        tensor.requires_grad_(backward)
    grad = new(*shape, dtype=features)

    @torch.no_grad()
    def fill(signs: str) -> None:
        for tensor in given:
            tensor.normal_(generator=random)
            if signs == "positive":
                tensor.abs_()
        for weight, bias in (given[1:3], given[3:5]):
            weight.div_(3 * maps**0.5)
            bias.div_(5)
        grad.normal_(generator=random).div_(16)  # float16 holds the weights' gradients, sums over all pixels

    def ours() -> Tensor:
        return op.residual_block(image, *layers, "triton")

    def whole() -> Tensor:
        # Of one code object Dynamo keeps 8 variants, and each race is one; `fullgraph` has it say so at its limit.
        with torch._dynamo.config.patch(recompile_limit=1 << 16):
            found: Tensor = torch.compile(_reference, dynamic=False, fullgraph=True)(*given)
            return found

    def side(block: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    out = block()
                return [out.detach(), *(torch.autograd.grad(out, given, grad.to(out.dtype)) if backward else ())]

        return call

    blocks = {"triton": ours, "compiled": whole, "reference": lambda: _reference(image, *layers)}
    return {name: side(block) for name, block in blocks.items() if compiled or name != "compiled"}, fill


def _reference(features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return op.reference(features, weight1, bias1, weight2, bias2)[0]


def _disagreement(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, signs: str) -> str | None:
    """Why ``found`` is not what the reference gives; None if it is, up to rounding."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        name = _RESULTS[index]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{name} is {ours.dtype} {list(ours.shape)}, the reference's {theirs.dtype} {list(theirs.shape)}"
        precision = max(torch.finfo(dtype).eps, 2**-11)  # float32 may be TF32 on either side
        tolerance = (_FAR if index and signs == "mixed" else _CLOSE) * precision
        distance = float(torch.linalg.vector_norm((ours - theirs).float()))
        size = float(torch.linalg.vector_norm(theirs.float()))
        if not distance <= tolerance * size:
            return f"{name} is {distance / max(size, 1e-30):.2g} of its size off the reference, {tolerance:.2g} allowed"
    return None


def _one_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{f': {lines[0].strip()}' if lines else ''}"


class _GraphedStopwatch:
    """Times replays of a CUDA graph between events: no Python, no launch gaps; as engines run it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()  # one for all sides: no result is read again

    def __call__(self, name: str, call: Callable[[], object]) -> Callable[[], float]:
        def once() -> None:  # keeps no result, so that the sides' memory is shared
            call()

        graph = capture(once, self._device, warm_ups=3, pool=self._pool)
        replays = max(1, round(MILLISECONDS / max(self._time(graph, 2), 1e-3)))
        return lambda: self._time(graph, replays)

    def _time(self, graph: Captured[None], replays: int) -> float:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the first one also brings the clock and the caches up
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / replays
