"""`torch.compile` of both networks, and an iteration of Algorithm 1 as one CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from fastsimgan.algorithm import Metrics, SimGAN
from fastsimgan.errors import UnavailableError
from fastsimgan.pools import Pools
from fastsimgan.precision import autocast

MODE = "default"
"""`torch.compile`'s. Not "reduce-overhead": the whole iteration is one CUDA graph of ours."""

_ORDINARY = 3  # iterations before a graph is captured: cuDNN chooses and kernels are loaded in them


def compile_networks(trainer: SimGAN, choice: str, say: Callable[[str], None]) -> None:
    """Have R and D compiled, forward and backward, at the sizes that training uses.

    Args:
        trainer: its networks are changed in place; their weights and names stay.
        choice: "on"; "off"; or "auto": on CUDA where triton is installed. Not on a CPU: there the convolutions of both
            networks take nearly all the time, they are ours or oneDNN's either way, and compiling costs 10 to 20
            CPU-seconds.
        say: told why "auto" goes on without it, if compiling fails.

    Raises:
        UnavailableError: "on" was asked for and compiling fails.
    """
    auto = trainer.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if choice == "off" or (choice == "auto" and not auto):
        return
    networks = (trainer.refiner, trainer.discriminator)
    for network in networks:
        network.compile(mode=MODE, dynamic=False)  # a handful of batch sizes, each compiled for itself
    try:
        _try(trainer)
    except Exception as error:  # Dynamo's, Inductor's, the C++ compiler's, Triton's: there is no common class
        for network in networks:
            network._compiled_call_impl = None  # what `Module.compile` sets
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
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


class GraphedIterations:
    """Iterations of Algorithm 1 of which all updates, draws included, are one replay of a CUDA graph.

    The first few are ordinary ones. Nothing in a replay waits for the host: images are drawn by cursors on the device,
    the history counts there, and learning rates and the average's weight are tensors written before it.

    Args:
        trainer: on a CUDA device.
        pools: resident on that device.
    """

    def __init__(self, trainer: SimGAN, pools: Pools) -> None:
        self._trainer, self._pools = trainer, pools
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Metrics, dict[str, int]]] = {}  # by K_g
        self._ordinary = 0
        self._stream = torch.cuda.Stream()

    def forget(self) -> None:
        """Capture anew: the optimisers' state has moved in memory (a checkpoint was loaded)."""
        self._graphs.clear()

    def __call__(self) -> Metrics:
        """One iteration."""
        trainer, pools = self._trainer, self._pools
        if self._ordinary < _ORDINARY:
            self._ordinary += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                metrics = trainer.iteration(pools.draw_synthetic, pools.draw_real)
            torch.cuda.current_stream().wait_stream(self._stream)
            return metrics
        pools.reserve(trainer.images_drawn())
        trainer.set_schedule()
        if trainer.k_g not in self._graphs:
            self._capture()
        graph, metrics, drawn = self._graphs[trainer.k_g]
        graph.replay()
        pools.drawn_by_a_graph(drawn)
        trainer.done["train"] += 1
        return metrics

    def _capture(self) -> None:
        before = self._pools.positions()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and runs nothing
            metrics = self._trainer.updates(self._pools.draw_synthetic, self._pools.draw_real)
        drawn = {name: position - before[name] for name, position in self._pools.positions().items()}
        self._pools.drawn_by_a_graph({name: -images for name, images in drawn.items()})
        self._graphs[self._trainer.k_g] = graph, metrics, drawn
