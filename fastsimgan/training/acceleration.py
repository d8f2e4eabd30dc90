"""R's blocks by a race, `torch.compile` of both networks, and an iteration of Algorithm 1 as one CUDA graph."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastsimgan.errors import UnavailableError
from fastsimgan.hardware.cuda_graphs import Captured, capture, first_line
from fastsimgan.hardware.precision import DTYPES, autocast
from fastsimgan.ops import residual_block
from fastsimgan.ops._shared import INTERPRETED
from fastsimgan.ops.residual_block_race import race
from fastsimgan.training.batches import Pools
from fastsimgan.training.simgan import Metrics, OneTensor, SimGAN

MODE = "default"
"""`torch.compile`'s. Not "reduce-overhead": the whole iteration is one CUDA graph of ours."""

VARIANTS = 64
"""Of one network that `torch.compile` may keep: each batch size, with and without gradients. Its own limit, 8, is
passed by the third batch size in one process, and what is beyond it runs uncompiled."""

IMPLS = ("reference", "triton")
"""Of `residual_block`, that a race can name."""

_ORDINARY = 3  # iterations before a graph is captured: cuDNN chooses and kernels are loaded in them


def choose_blocks(trainer: SimGAN, say: Callable[[str], None]) -> None:
    """On CUDA, have R's residual blocks take the implementation that is fastest there, by a race at training's sizes.

    Not with --deterministic, since a race is decided by timing, nor with --impl reference, nor in float32, for which
    there is one implementation. Of several ranks the first one's answer holds for all.

    Args:
        trainer: its refiner's ``impl`` is changed.
        say: told the times and the winner.
    """
    config, device = trainer.config, trainer.device
    if device.type != "cuda" or config.impl != "auto" or config.deterministic or not config.blocks or INTERPRETED:
        return
    if trainer.precision == "float32" or residual_block.implementations()["triton"] is not None:
        return
    shape = trainer.batch // config.accumulate, config.width, *trainer.image_size
    result = race(shape, DTYPES[trainer.precision], True, device, compiled=config.compile != "off")
    trainer.refiner.impl = IMPLS[trainer.ranks.largest(IMPLS.index(result.impl) if trainer.ranks.first else 0)]
    say(str(result))


def compile_networks(trainer: SimGAN, choice: str, say: Callable[[str], None]) -> None:
    """Have R and D compiled, forward and backward, at the sizes that training uses.

    Args:
        trainer: its networks are changed in place; their weights and names stay.
        choice: "on"; "off"; or "auto": on CUDA where triton is installed. Not on a CPU: there the convolutions of both
            networks take nearly all the time, they are ours or oneDNN's either way, and compiling costs 10 to 20
            CPU-seconds.
        say: told why "auto" goes on without it, if compiling fails; and if, later on, there are more than `VARIANTS`.

    Raises:
        UnavailableError: "on" was asked for and compiling fails.
    """
    auto = trainer.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if choice == "off" or (choice == "auto" and not auto):
        return
    _have_variants(say)
    networks = (trainer.refiner, trainer.discriminator)
    for network in networks:
        network.compile(mode=MODE, dynamic=False)  # a handful of batch sizes, each compiled for itself
    try:
        _try(trainer)
    except Exception as error:  # Dynamo's, Inductor's, the C++ compiler's, Triton's: there is no common class
        for network in networks:
            network._compiled_call_impl = None  # what `Module.compile` sets
        reason = first_line(error)
        if choice == "on":
            raise UnavailableError(f"--compile on: torch.compile failed: {reason}") from error
        say(f"warning: torch.compile failed, so the networks run uncompiled ({reason})")
        return
    say(f'networks compiled (torch.compile, mode "{MODE}")')


def _try(trainer: SimGAN) -> None:
    """Forward and backward once through both networks; changes nothing."""
    channels = trainer.refiner.last.out_channels
    blank = torch.zeros(
        trainer.batch // trainer.config.accumulate, channels, *trainer.image_size, device=trainer.device
    )
    blank = blank.contiguous(memory_format=torch.channels_last)
    with autocast(trainer.precision, trainer.device):
        trainer.discriminator(trainer.refiner(blank)).float().sum().backward()
    trainer.refiner.zero_grad(set_to_none=True)
    trainer.discriminator.zero_grad(set_to_none=True)


def _have_variants(say: Callable[[str], None]) -> None:
    """Have Dynamo keep `VARIANTS` of a network, and say so where even that is not enough."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    log = logging.getLogger("torch._dynamo.convert_frame")
    for handler in log.handlers:
        if isinstance(handler, _LimitHit):
            log.removeHandler(handler)
    log.addHandler(_LimitHit(say))


class _LimitHit(logging.Handler):
    """Says what Dynamo only logs: that it compiles no more variants."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "recompile_limit" in text:
            self._say(f"warning: torch.compile goes on uncompiled: {' '.join(text.split())}")


def why_no_graph(trainer: SimGAN, pools: Pools) -> str:
    """Why an iteration of ``trainer`` cannot be one CUDA graph; "" where it can."""
    if trainer.device.type != "cuda":
        return "the device is a CPU"
    if trainer.ranks.count > 1:
        # of several ranks' graphs, one that fails to capture would leave the others waiting: not before it has been run
        return "several processes train together"
    if not pools.resident:
        return "the images are on the host"
    return "" if trainer.history is None else trainer.history.waits_for_host()


@dataclass
class _Graph:
    """An iteration with one K_g: the graph, which gives its metrics, what it draws, and where in memory it works."""

    captured: Captured[Metrics]
    drawn: dict[str, int]
    addresses: tuple[int, ...]
    proved: bool = False  # that a replay does something


class GraphedIterations:
    """Iterations of Algorithm 1 of which all updates, draws included, are one replay of a CUDA graph.

    The first few are ordinary ones. Nothing in a replay waits for the host: images are drawn by cursors on the device,
    the history counts there, and learning rates and the average's weight are in a tensor written before it. Where a
    tensor that a graph uses has moved, it is captured anew. Where that fails, or the graph turns out to hold nothing,
    ``say`` is told why, and all iterations from then on are ordinary ones, from the state as it was.

    Args:
        trainer: on a CUDA device; `why_no_graph` must give "".
        pools: resident on that device.
        say: called with each line meant for a person.
    """

    def __init__(self, trainer: SimGAN, pools: Pools, say: Callable[[str], None] = print) -> None:
        self._trainer, self._pools, self._say = trainer, pools, say
        self._graphs: dict[int, _Graph] = {}  # by K_g
        self._ordinary: float = _ORDINARY  # iterations still to come that are no replay
        self._stream = torch.cuda.Stream(trainer.device)  # torch's own for captures may be on another device
        self._memory = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        # for the largest K_g at once: what draws read must not move under a graph
        pools.reserve(trainer.images_drawn(trainer.config.k_g_max))

    def __call__(self) -> Metrics:
        """One iteration; its metrics are overwritten by the next."""
        trainer, pools = self._trainer, self._pools
        if self._ordinary > 0:
            self._ordinary -= 1
            with _beside(self._stream):
                return trainer.iteration(pools.draw_synthetic, pools.draw_real)
        pools.reserve(trainer.images_drawn())
        where = trainer.addresses() + pools.addresses()
        graph = self._graphs.get(trainer.k_g)
        if graph is None or graph.addresses != where:
            graph = self._capture(where)
        if graph is None or not self._replay(graph):
            return self()
        trainer.done["train"] += 1
        return graph.captured.result

    def _replay(self, graph: _Graph) -> bool:
        """The updates of an iteration; False, and nothing has changed, if the graph holds none."""
        self._trainer.set_schedule()
        before = {} if graph.proved else self._pools.cursors()
        graph.captured.replay()
        if not graph.proved and self._pools.cursors() == before:
            self._give_up("what was captured does nothing")
            return False
        graph.proved = True
        self._pools.drawn_by_a_graph(graph.drawn)
        return True

    def _capture(self, where: tuple[int, ...]) -> _Graph | None:
        """Record an iteration, running nothing of it; None if that fails."""
        pools = self._pools
        before = pools.positions()
        reason = ""

        def updates() -> Metrics:
            return OneTensor(self._trainer.updates(pools.draw_synthetic, pools.draw_real))

        try:
            captured = capture(updates, self._trainer.device, warm_ups=0, pool=self._memory)
        except UnavailableError as error:
            reason = str(error)
        drawn = {name: position - before[name] for name, position in pools.positions().items()}
        pools.drawn_by_a_graph({name: -images for name, images in drawn.items()})
        if reason:
            self._give_up(reason)
            return None
        self._graphs[self._trainer.k_g] = _Graph(captured, drawn, where)
        return self._graphs[self._trainer.k_g]

    def _give_up(self, reason: str) -> None:
        self._say(f"warning: no CUDA graph, so each iteration's kernels are launched one by one ({reason})")
        for network in (self._trainer.refiner, self._trainer.discriminator):
            network.zero_grad(set_to_none=True)  # what a capture left there was never computed
        self._graphs.clear()
        self._ordinary = float("inf")


@contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Where work is on ``stream``, after and before all that is on the current one."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)
