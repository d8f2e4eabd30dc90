"""What runs R, seen from `Refiner`, and the backend that is always there: PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.histogram import equalise
from fastsimgan.data.values import from_float, to_float
from fastsimgan.device import channels_last, images_channels_last, keep_some_freed_memory
from fastsimgan.errors import InputError
from fastsimgan.models import refiner as network
from fastsimgan.precision import autocast, cpu_has_bfloat16

Precision = Literal["float32", "float16", "bfloat16"]


class Backend(Protocol):
    """R on one device. Called with ``[B, C, H, W]`` of ``dtype`` on that device; returns the same."""

    name: str
    """``torch``, ``int8`` (our kernels), ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``, and what it computes in."""
    dtype: torch.dtype
    """uint8: stored images, everything is done inside. float32: prepared images in [-1, 1]."""
    largest_batch: int | None
    """Images that one call may have; None is any number."""

    def __call__(self, images: Tensor) -> Tensor: ...


def prepare(images: Tensor, histogram: str) -> Tensor:
    """Stored images ``[N, C, H, W]`` to what R sees: equalised if ``histogram`` is "equalise", then in [-1, 1]."""
    if histogram == "equalise":
        # equalisation counts grey values, so floats take 16 bits on the way in
        levels = from_float(to_float(images), torch.uint16) if images.is_floating_point() else images
        images = equalise(levels)
    return images_channels_last(to_float(images))


_IN_CACHE = 4 << 20  # bytes of features that a core has near it


def in_cache(call: Callable[[Tensor], Tensor], images: Tensor, width: int) -> Tensor:
    """``call(images)`` on a CPU, taken in parts of which its caches hold ``width`` feature maps, if they can hold any.

    A layer over a large batch sends all of it to memory and back, and the system hands the pages out anew each time.
    """
    fit = _IN_CACHE // (4 * width * images.shape[2] * images.shape[3]) * torch.get_num_threads()
    if not 0 < fit < len(images):
        return call(images)
    # of nearly equal sizes: PyTorch takes other paths, which round otherwise, for a last image alone
    return torch.cat([call(part) for part in images.tensor_split(-(-len(images) // fit))])


class TorchBackend:
    """The network itself, weights in channels_last; on CUDA a shape that comes back is replayed as a CUDA graph.

    float16 (CUDA) and bfloat16 (CPUs that compute in it) are the same mixture as in the exported graphs: the products
    of the residual branches in 16 bits, the first and the last layer and the sums along the skip connections in
    float32. TF32, which PyTorch allows in convolutions by default, is off for these: it rounds as float16 does.
    """

    dtype = torch.float32
    largest_batch: int | None = None

    def __init__(self, module: network.Refiner, device: torch.device, precision: Precision = "float32") -> None:
        if precision not in ("float32", "float16", "bfloat16"):
            raise InputError(f'precision must be "float32", "float16" or "bfloat16", got {precision!r}')
        if precision == "float16" and device.type != "cuda":
            raise InputError(
                f"precision float16 needs a CUDA device, got {device}: a CPU is slower in it, and no better"
            )
        if precision == "bfloat16" and not (device.type == "cpu" and cpu_has_bfloat16()):
            raise InputError(f"precision bfloat16 needs a CPU that computes in it (AMX, AVX512_BF16), got {device}")
        self.name = f"torch {precision}"
        self._module = channels_last(module, device).eval()
        for block in self._module.blocks if precision == "float16" else ():
            block.half()
        self._precision = precision
        self._call = Replay(self._forward) if device.type == "cuda" else self._forward
        if device.type == "cpu":
            keep_some_freed_memory()

    def __call__(self, images: Tensor) -> Tensor:
        return self._call(images)

    def _forward(self, images: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn  # `flags` sets all of them for the time being: the user's others stay
        with cudnn.flags(True, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            if self._precision != "float16":
                with autocast(self._precision, images.device):
                    if images.device.type == "cpu":
                        return in_cache(self._module, images, self._module.last.in_channels)
                    refined: Tensor = self._module(images)
                return refined
            x = F.relu(self._module.first(images))
            for block in self._module.blocks:
                assert isinstance(block, network.ResidualBlock)
                x = F.relu(x + block.conv2(F.relu(block.conv1(x.half()))).float())
            return torch.tanh(self._module.last(x))


class Replay:
    """``call`` as a CUDA graph for a shape that has come before; the last `KEPT` shapes are kept.

    Launching the dozens of kernels of a small batch takes longer than running them; a replay is one launch.
    """

    KEPT = 2

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self._call = call
        self._seen: torch.Size | None = None
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape not in self._graphs:
            if images.shape != self._seen:  # capturing costs a few calls: not for the one odd batch at the end
                self._seen = images.shape
                return self._call(images)
            self._capture(images)
        graph, inside, outside = self._graphs[images.shape]
        inside.copy_(images)
        graph.replay()
        return outside.clone()

    def _capture(self, images: Tensor) -> None:
        while len(self._graphs) >= self.KEPT:
            self._graphs.pop(next(iter(self._graphs)))
        inside = images.clone(memory_format=torch.preserve_format)
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            self._call(inside)  # whatever is chosen or allocated at first use
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outside = self._call(inside)
        self._graphs[images.shape] = graph, inside, outside
