"""Batches of sizes that come again, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fastsimgan.errors import UnavailableError
from fastsimgan.hardware.cuda_graphs import Captured, capture


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
