"""An iteration of Algorithm 1 as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastsimgan.errors import UnavailableError
from fastsimgan.hardware.cuda_graphs import Captured, capture
from fastsimgan.training.simgan import Metrics, PackedMetrics, SimGAN
from fastsimgan.training.state import TrainingState

_ORDINARY = 3  # iterations before a graph is captured: cuDNN chooses and kernels are loaded in them


def why_no_graph(state: TrainingState) -> str:
    """Why an iteration cannot be one CUDA graph; "" where it can."""
    if state.device.type != "cuda":
        return "the device is a CPU"
    if state.group.size > 1:
        # of several ranks' graphs, one that fails to capture would leave the others waiting: not before it has been run
        return "several processes train together"
    if not state.batches.resident:
        return "the images are on the host"
    return "" if state.history is None else state.history.waits_for_host()


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
    ``log`` is told why, and all iterations from then on are ordinary ones, from the state as it was.

    Args:
        algorithm: on a CUDA device; `why_no_graph` must give "".
        log: called with each line meant for a person.
    """

    def __init__(self, algorithm: SimGAN, log: Callable[[str], None]) -> None:
        self._algorithm, self._state, self._log = algorithm, algorithm.state, log
        self._batches = batches = self._state.batches
        self._graphs: dict[int, _Graph] = {}  # by K_g
        self._ordinary: float = _ORDINARY  # iterations still to come that are no replay
        self._stream = torch.cuda.Stream(self._state.device)  # torch's own for captures may be on another device
        self._memory = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        # for the largest K_g at once: what draws read must not move under a graph
        batches.reserve(algorithm.images_drawn(self._state.config.k_g_max))

    def __call__(self) -> Metrics:
        """One iteration; its metrics are overwritten by the next."""
        algorithm, state, batches = self._algorithm, self._state, self._batches
        if self._ordinary > 0:
            self._ordinary -= 1
            with _beside(self._stream):
                return algorithm.iteration(batches.draw_synthetic, batches.draw_real)
        batches.reserve(algorithm.images_drawn())
        where = state.addresses() + batches.addresses()
        graph = self._graphs.get(state.k_g)
        if graph is None or graph.addresses != where:
            graph = self._capture(where)
        if graph is None or not self._replay(graph):
            return self()
        state.done["train"] += 1
        return graph.captured.result

    def _replay(self, graph: _Graph) -> bool:
        """The updates of an iteration; False, and nothing has changed, if the graph holds none."""
        self._algorithm.set_schedule()
        before = {} if graph.proved else self._batches.cursors()
        graph.captured.replay()
        if not graph.proved and self._batches.cursors() == before:
            self._give_up("what was captured does nothing")
            return False
        graph.proved = True
        self._batches.drawn_by_a_graph(graph.drawn)
        return True

    def _capture(self, where: tuple[int, ...]) -> _Graph | None:
        """Record an iteration, running nothing of it; None if that fails."""
        batches = self._batches
        before = batches.positions()
        reason = ""

        def updates() -> Metrics:
            return PackedMetrics(self._algorithm.updates(batches.draw_synthetic, batches.draw_real))

        try:
            captured = capture(updates, self._state.device, warm_ups=0, pool=self._memory)
        except UnavailableError as error:
            reason = str(error)
        drawn = {name: position - before[name] for name, position in batches.positions().items()}
        batches.drawn_by_a_graph({name: -images for name, images in drawn.items()})
        if reason:
            self._give_up(reason)
            return None
        self._graphs[self._state.k_g] = _Graph(captured, drawn, where)
        return self._graphs[self._state.k_g]

    def _give_up(self, reason: str) -> None:
        self._log(f"warning: no CUDA graph, so each iteration's kernels are launched one by one ({reason})")
        for network in (self._state.refiner, self._state.discriminator):
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
