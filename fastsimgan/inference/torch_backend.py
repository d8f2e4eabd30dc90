"""What runs R, seen from `Refiner`, and the backend that is always there: PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, Literal, Protocol
from warnings import warn

import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.hardware.cuda_graphs import Captured, capture, first_line
from fastsimgan.hardware.device import channels_last, images_channels_last, keep_some_freed_memory
from fastsimgan.hardware.precision import DTYPES, autocast, cpu_has_bfloat16
from fastsimgan.models import refiner as network

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


MOST_COMPILED = 8
"""Shapes that one backend compiles R for, each of which takes tens of seconds."""

# Inductor stores what has been summed up after a few reads, and reads it again: in the middle of the first layer's sum
# over its taps (`models.refiner`), which would cost as much as a residual block's traffic.
_KEEP_SUMS_WHOLE = {"realize_acc_reads_threshold": 64, "realize_opcount_threshold": 256}


class TorchBackend:
    """The network itself, weights in channels_last; on CUDA a shape that comes back is replayed as a CUDA graph.

    In float16 (CUDA) and bfloat16 (CUDA, and CPUs that compute in it) all is 16 bits wide up to the last layer's
    output, and the image float32. TF32, which PyTorch allows in convolutions by default, is off: float32 means float32.

    Args:
        module: R; its weights are moved, and on CUDA changed to the precision.
        device: where it runs.
        precision: "float32", "float16" or "bfloat16".
        compiled: on CUDA, `torch.compile` R for each shape that is replayed, `MOST_COMPILED` at most, or (repeatable)
            for the shapes of `compile_for` alone.
        repeatable: on CUDA, choose nothing by timing, so that a batch becomes the same bytes in every process, whatever
            came before it. Otherwise cuDNN measures its algorithms for each shape that is replayed, and the first time
            and the later ones may differ by rounding.
        block: the implementation of `ops.residual_block`, as there.

    Raises:
        InputError: a precision that the device lacks, or ``compiled`` on a CPU.
        UnavailableError: ``compiled`` without triton.
    """

    dtype = torch.float32
    largest_batch: int | None = None

    def __init__(
        self,
        module: network.Refiner,
        device: torch.device,
        precision: Precision = "float32",
        *,
        compiled: bool = False,
        repeatable: bool = False,
        block: str = "auto",
    ) -> None:
        _check_precision(precision, device)
        if compiled and device.type != "cuda":
            raise InputError(f"compiled must be off on a CPU, where it gains nothing over our kernels, got {device}")
        if compiled and (missing := _cannot_compile()) is not None:
            raise UnavailableError(f"compiled was asked for, and {missing}")
        self.name = f"torch {precision}{', compiled' if compiled else ''}"
        self._module = channels_last(module, device).eval()
        if block != "auto":
            self._module.impl = block
        if precision != "float32" and device.type == "cuda":
            self._module.to(DTYPES[precision])
        if compiled:  # neighbouring threads write neighbouring maps: they read the first layer's taps side by side too
            first = self._module.first.weight
            first.data = first.data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        self._precision = precision
        self._compile = compiled
        self._repeatable = repeatable
        self._compiled: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        self._call = Replay(self._forward, device, self._to_replay) if device.type == "cuda" else self._forward
        if device.type == "cpu":
            keep_some_freed_memory()

    def __call__(self, images: Tensor) -> Tensor:
        return self._call(images)

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """From now on batches of exactly ``shape`` ``[B, C, H, W]`` go through compiled code; tens of seconds.

        Raises UnavailableError if compiling fails.
        """
        if self._compile and (size := torch.Size(shape)) not in self._compiled:
            function = _compile(self._module, self._repeatable)
            self._compiled[size] = function
            weight = self._module.last.weight
            images = images_channels_last(torch.zeros(shape, device=weight.device))
            try:
                with torch.cuda.device(weight.device), torch.inference_mode():
                    self._forward(images)
            except Exception as error:  # Dynamo's, Inductor's, the C++ compiler's, Triton's: there is no common class
                del self._compiled[size]
                raise UnavailableError(f"torch.compile failed for {list(shape)}: {first_line(error)}") from error

    def _to_replay(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """What is captured for batches like ``images``."""
        if self._repeatable:
            return self._forward
        if self._compile and images.shape not in self._compiled:
            if len(self._compiled) < MOST_COMPILED:
                self.compile_for(images.shape)
            else:
                most = f"{MOST_COMPILED} other shapes are compiled"
                warn(f"{self.name}: batches {list(images.shape)} run uncompiled: {most}", stacklevel=3)
        return partial(self._forward, replayed=True)

    def _forward(self, images: Tensor, replayed: bool = False) -> Tensor:
        cudnn = torch.backends.cudnn  # `flags` sets all of them for the time being: the user's others stay
        benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
        if self._repeatable and images.is_cuda:
            benchmark, deterministic = False, True
        elif replayed and not deterministic:
            benchmark = True
        with (
            cudnn.flags(True, benchmark, cudnn.benchmark_limit, deterministic, allow_tf32=False),
            autocast(self._precision, images.device),
        ):
            if images.device.type == "cpu":
                return in_cache(self._module, images, self._module.last.in_channels)
            return self._compiled.get(images.shape, self._module)(images)


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in ("float32", "float16", "bfloat16"):
        raise InputError(f'precision must be "float32", "float16" or "bfloat16", got {precision!r}')
    if precision == "float16" and device.type != "cuda":
        raise InputError(f"precision float16 needs a CUDA device, got {device}: a CPU is slower in it, and no better")
    if precision == "bfloat16":
        if device.type == "cuda":
            with torch.cuda.device(device):
                able = torch.cuda.is_bf16_supported(including_emulation=False)
            if not able:
                raise InputError(
                    f"precision bfloat16 needs a GPU that computes in it (sm_80 and later), got {device}: try float16"
                )
        elif not (device.type == "cpu" and cpu_has_bfloat16()):
            raise InputError(f"precision bfloat16 needs a CPU that computes in it (AMX, AVX512_BF16), got {device}")


def _cannot_compile() -> str | None:
    """Why `torch.compile` has no CUDA here; None if it has."""
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


def _compile(module: network.Refiner, repeatable: bool) -> Callable[[Tensor], Tensor]:
    """``module`` compiled for the one shape that it will be called with.

    Dynamo compiles 8 variants of a piece of code in a process and then, without a word, none: each shape of each
    refiner is a piece of its own. Nothing of it may run uncompiled (``fullgraph``).
    """

    def forward(images: Tensor) -> Tensor:
        refined: Tensor = module(images)
        return refined

    own = FunctionType(forward.__code__.replace(), globals(), "forward", closure=forward.__closure__)
    options: dict[str, Any] = {
        **_KEEP_SUMS_WHOLE,
        "deterministic": repeatable,
    }  # deterministic: no measuring in Inductor
    compiled: Callable[[Tensor], Tensor] = torch.compile(own, dynamic=False, fullgraph=True, options=options)
    return compiled


class Replay:
    """``call`` as a CUDA graph for a shape that has come before; the last `KEPT` shapes are kept.

    Launching the dozens of kernels of a small batch takes longer than running them; a replay is one launch. Where a
    capture fails, that is said in a warning, and ``call`` runs eagerly from then on.

    Args:
        call: ``[B, C, H, W]`` on ``device`` to the same. ``device`` is current while it runs.
        device: a CUDA device.
        to_capture: given a batch, what to capture for its shape; None is ``call``.
    """

    KEPT = 2

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        device: torch.device,
        to_capture: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._call = call
        self._device = device
        self._to_capture = to_capture or (lambda images: call)
        self._seen: torch.Size | None = None
        self._graphs: dict[torch.Size, tuple[Captured[Tensor], Tensor, object]] = {}
        self._pool: Any = None  # one for all: they never run at the same time, and what comes out is copied
        self._free: torch.cuda.Event | None = None  # recorded where the last replay was done with its memory
        self.eager: str | None = None
        """Why there are no graphs; None where there are."""

    def __call__(self, images: Tensor) -> Tensor:
        with torch.cuda.device(self._device):
            if images.shape not in self._graphs and (images.shape != self._seen or not self._capture(images)):
                self._seen = images.shape  # capturing costs a few calls: not for the one odd batch at the end
                return self._call(images)
            captured, inside, _ = self._graphs[images.shape]
            stream = torch.cuda.current_stream()
            if self._free is not None:
                stream.wait_event(self._free)  # the last caller's stream may be another
            inside.copy_(images)
            captured.replay()
            out = captured.result.clone()
            self._free = stream.record_event(self._free)
            return out

    def _capture(self, images: Tensor) -> bool:
        if self.eager is not None:
            return False
        while len(self._graphs) >= self.KEPT:
            self._graphs.pop(next(iter(self._graphs)))
        inside = images.clone(memory_format=torch.preserve_format)
        call = self._to_capture(images)
        try:
            captured = capture(lambda: call(inside), self._device, pool=self._pool if self._graphs else None)
        except UnavailableError as error:
            self.eager = str(error)
            warn(f"CUDA graphs are off, so that small batches take longer: {error}", stacklevel=3)
            return False
        self._pool = captured.pool
        self._graphs[images.shape] = captured, inside, call  # which may own memory that the graph works in
        return True
