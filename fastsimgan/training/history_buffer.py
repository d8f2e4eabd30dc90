"""The history of refined images that steadies the discriminator (§2.3), kept on the training device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.ops.history_swap import (
    AGE_SUM,
    DRAWN,
    FILL,
    STORAGE_DTYPES,
    SWAPS,
    history_swap,
    implementations,
    new_state,
)


class HistoryBuffer:
    """A fixed number of earlier refined images, in ``capacity * image`` bytes on ``device``.

    (Beside them: 8 bytes a slot that say when it was written, and 56 bytes of counters.)

    Args:
        capacity: how many images it holds, at least 1.
        image_shape: ``(C, H, W)``.
        dtype: how images are kept: uint8 (a quarter of the memory, steps of 1/127.5), float16, bfloat16, float32.
        device: where; the images that go in must be there too.
        seed: of the random choice of slots. The same seed and the same calls give the same images back.
        impl: which implementation of :func:`fastsimgan.ops.history_swap.history_swap`.

    Raises:
        InputError: a capacity that holds no image, or an unknown dtype.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: Sequence[int] = (1, 35, 55),
        dtype: torch.dtype = torch.uint8,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        impl: str = "auto",
    ) -> None:
        if dtype not in STORAGE_DTYPES:
            raise InputError(f"history dtype must be uint8, float16, bfloat16 or float32, got {dtype}")
        image_bytes = math.prod(image_shape) * dtype.itemsize
        if capacity < 1:
            raise InputError(f"history must hold at least 1 image of {image_bytes} bytes, got capacity {capacity}")
        # zeros, not uninitialised memory: two equal runs have equal checkpoints before it is full
        self._storage = torch.zeros((capacity, *image_shape), dtype=dtype, device=device)
        self._state = new_state(capacity, seed, device)
        self._impl = impl

    @property
    def capacity(self) -> int:
        """How many images it holds when full."""
        return self._storage.shape[0]

    def swap(self, fresh: Tensor) -> Tensor:
        """Store ``fresh`` and return as many images drawn from the history: ``[n, C, H, W]`` in [-1, 1] to the same.

        The rule (append, draw, replace) is :func:`fastsimgan.ops.history_swap.history_swap`'s. Never waits for the
        device. Raises InputError where ``fresh`` does not match or n exceeds the capacity.
        """
        return history_swap(self._storage, self._state, fresh, fresh.shape[0], self._impl)

    def waits_for_host(self) -> str:
        """Why `swap` waits for the device, so that no CUDA graph can hold it; "" where it does not."""
        if self._impl == "reference":
            return "the history's reference reads its state on the host"
        reason = implementations()["cuda"]
        return f"the history takes the reference, which reads its state on the host: {reason}" if reason else ""

    def __len__(self) -> int:
        """How many images it holds now. Waits for the device."""
        return int(self._state[FILL])

    def counters(self) -> Tensor:
        """What `statistics` reads, int64 ``[AGE_SUM + 1]`` on the device: shared, the next swap changes it."""
        return self._state[: AGE_SUM + 1]

    def statistics(self, counters: Tensor | None = None) -> dict[str, float]:
        """Where the history stands, or stood when ``counters`` were copied. Waits for the device they are on, so ask
        when you report, not in every iteration.

        ``fill``: share of the capacity in use, 0 to 1. ``swaps``: calls of :meth:`swap` so far. ``mean_age``: of the
        images that the last swap drew, in swaps since they were stored (0: stored by that very swap).
        """
        header = (self.counters() if counters is None else counters).tolist()
        return {
            "fill": header[FILL] / self.capacity,
            "swaps": float(header[SWAPS]),
            "mean_age": header[AGE_SUM] / max(header[DRAWN], 1),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what comes next: two tensors, shared with the buffer (save or clone them)."""
        return {"storage": self._storage, "state": self._state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where :meth:`state_dict` was taken, on any device.

        Copies in place, so a CUDA graph that was captured with this buffer stays valid.

        Raises:
            InputError: an entry is missing or has another shape or dtype (another capacity, image or storage).
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state:
                raise InputError(f"history state must hold {', '.join(own)}, got {', '.join(state) or 'nothing'}")
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise InputError(
                    f"history {name} must be {tensor.dtype} {tuple(tensor.shape)}, "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
