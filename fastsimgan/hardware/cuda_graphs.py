"""A call captured as a CUDA graph, on the device it is for; a capture that holds nothing is an error."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

from fastsimgan.errors import UnavailableError

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """A captured call. ``replay`` runs it again, on the current stream of its device, over the same memory.

    Attributes:
        result: what the call returned: tensors that every replay writes anew.
        nodes: kernels, copies and memsets in the graph, at least 1.
        pool: of its memory. A capture that is never replayed at the same time as this one may share it.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Result, nodes: int, pool: Any) -> None:
        self._graph = graph  # knows its device, and sets it while it is launched
        self.result = result
        self.nodes = nodes
        self.pool = pool

    def replay(self) -> None:
        """Queue the whole call again."""
        self._graph.replay()


def capture(
    call: Callable[[], Result], device: torch.device, *, warm_ups: int = 1, pool: Any = None
) -> Captured[Result]:
    """Capture ``call`` as a CUDA graph on ``device``, whichever device is current.

    Args:
        call: queues work on ``device``'s current stream and never waits for it. It must read and write memory that
            stays; what it allocates lives in the graph's pool. It runs ``warm_ups`` times for real; while it is
            captured it runs on the host alone.
        device: a CUDA device; without an index it is the current one.
        warm_ups: runs before the capture, on another stream, for whatever is chosen or allocated at first use; 0 where
            the caller has run it before.
        pool: an earlier capture's, to share its memory; None is a new one.

    Returns:
        The graph, ready for replays.

    Raises:
        UnavailableError: the call cannot be captured (it waits for the device, or queued nothing on it), or the graph's
            nodes cannot be counted. Nothing is left behind on the device: the call can go on eagerly.
    """
    if device.type != "cuda":
        raise UnavailableError(f"a CUDA graph needs a CUDA device, got {device}")
    with torch.cuda.device(device):  # capturing on another device records nothing, and every replay does nothing
        stream = torch.cuda.Stream()  # torch's own default for captures is of the device that captured first
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be counted
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        reason: Exception | None = None  # the end of a failed capture raises another error on top of it
        try:
            # In "thread_local" mode another thread (a loader that pins memory, NCCL's watchdog) cannot spoil a capture.
            # The outer context puts the stream back: `torch.cuda.graph` leaves its own set if the capture fails.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, "thread_local"):
                try:
                    result = call()
                except Exception as error:  # CUDA's, Triton's, autograd's: there is no common class
                    reason = error
                    raise
        except Exception as error:
            _abandon(pool)
            raise UnavailableError(f"it cannot be captured as a CUDA graph: {first_line(reason or error)}") from error
        nodes = count_nodes(graph)
        if nodes == 0:
            raise UnavailableError(f"its CUDA graph must hold at least 1 node, got 0: nothing was queued on {device}")
        graph.instantiate()
    return Captured(graph, result, nodes, pool)


def count_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Nodes of a graph made with ``keep_graph=True``. Raises UnavailableError where the runtime cannot be asked."""
    major = (torch.version.cuda or "").split(".")[0]
    for library in (None, f"libcudart.so.{major}"):  # torch's wheels load it for all; other builds for torch alone
        with suppress(OSError, AttributeError):
            function = ctypes.CDLL(library).cudaGraphGetNodes
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)]
            nodes = ctypes.c_size_t()
            if (code := function(graph.raw_cuda_graph(), None, ctypes.byref(nodes))) != 0:
                raise UnavailableError(f"a CUDA graph's nodes cannot be counted: cudaGraphGetNodes gave error {code}")
            return nodes.value
    raise UnavailableError(f"a CUDA graph's nodes cannot be counted: no cudaGraphGetNodes in libcudart.so.{major}")


def _abandon(pool: Any) -> None:
    """Tell the allocator that a capture which failed is over: torch does not, and blocks would wait for its end."""
    with suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


def first_line(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
