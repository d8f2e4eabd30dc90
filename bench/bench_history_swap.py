"""history_swap against the ways a history is usually kept: tensors on the device, a list of images, NumPy on the host.

Ours chooses distinct slots, keeps uint8 and replaces at random. The others do less, as their users do: slots may repeat
within a draw, and the rings replace the oldest.
"""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import limits
from fastsimgan.ops import history_swap as op

# Image, n (half of the paper's batch of 512) and capacity on a GPU; n and capacity on a CPU.
SIZES = {
    "gaze": ((1, 35, 55), (256, 51_200), (256, 51_200)),
    "hand": ((1, 224, 224), (256, 10_240), (16, 1024)),
}


class TorchRing:
    """A tensor on the device; float32 as it comes, or uint8 converted by eager operations."""

    def __init__(self, images: Tensor, dtype: torch.dtype) -> None:
        self.images, self.next = op.encode(images, dtype), 0

    def swap(self, fresh: Tensor) -> Tensor:
        n, capacity = len(fresh), len(self.images)
        drawn = op.decode(self.images[torch.randint(capacity, (n,), device=fresh.device)], fresh.dtype)
        self.images[self.next : self.next + n] = op.encode(fresh, self.images.dtype)
        self.next = (self.next + n) % capacity
        return drawn


class ListPool:
    """The pool of the image-to-image packages: one image at a time, half of them exchanged, half passed through."""

    def __init__(self, images: Tensor) -> None:
        self.images = list(images.split(1))

    def swap(self, fresh: Tensor) -> Tensor:
        returned = []
        for image in fresh:
            image = torch.unsqueeze(image, 0)
            if random.random() > 0.5:
                place = random.randrange(len(self.images))
                returned.append(self.images[place].clone())
                self.images[place] = image.clone()
            else:
                returned.append(image)
        return torch.cat(returned)


class NumpyRing:
    """A float32 array in host memory."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.next = images.cpu().numpy().copy(), 0
        self.random = np.random.default_rng(0)

    def swap(self, fresh: Tensor) -> Tensor:
        n, capacity = len(fresh), len(self.images)
        drawn = torch.from_numpy(self.images[self.random.integers(capacity, size=n)]).to(fresh.device)
        self.images[self.next : self.next + n] = fresh.cpu().numpy()
        self.next = (self.next + n) % capacity
        return drawn


def grey(levels: Tensor, image: tuple[int, ...]) -> Tensor:
    """Images that each are of one of the 256 levels: what comes back is right if it is still so."""
    return op.decode((levels % 256).to(torch.uint8), torch.float32).reshape(-1, 1, 1, 1).repeat(1, *image)


@pytest.mark.parametrize("size", ["gaze", pytest.param("hand", marks=pytest.mark.large)])
def test_history_swap(race, size):
    image, on_gpu, on_cpu = SIZES[size]
    n, capacity = (8, 64) if limits.SMALL else on_gpu if race.device.type == "cuda" else on_cpu
    stored = grey(torch.arange(capacity, device=race.device), image)
    pixels = n * math.prod(image)
    # Fresh images in and drawn images out in float32; one read and one write of the storage, a byte a pixel each.
    bytes_moved = (4 + 4 + 1 + 1) * pixels
    # Slots differ from call to call, and the storage (98 MB and more) is no cache's; what comes in takes turns as well.
    sets = [
        grey(torch.arange(n, device=race.device) * 7 + number, image)
        for number in range(limits.copies(bytes_moved, race.device))
    ]

    storage, state = op.encode(stored, torch.uint8), op.new_state(capacity, 0, race.device)
    state[op.FILL] = capacity
    rings = {
        "torch ring float32": TorchRing(stored, torch.float32),
        "torch ring uint8": TorchRing(stored, torch.uint8),
        "list pool float32": ListPool(stored),
        "numpy ring float32": NumpyRing(stored),
    }
    sides = {"ours uint8": [partial(op.history_swap, storage, state, fresh, n) for fresh in sets]}
    sides |= {name: [partial(ring.swap, fresh) for fresh in sets] for name, ring in rings.items()}
    del stored

    def error(drawn: Tensor) -> float:
        levels = ((drawn[:, :1, :1, :1].double() + 1) * 127.5).round()
        return (drawn - (levels / 127.5 - 1)).abs().max().item()

    def check() -> dict[str, float]:
        errors = {name: error(side[0]()) for name, side in sides.items()}
        assert max(errors.values()) < 1e-6, errors
        return errors

    race.run(
        f"history_swap {size} n={n} of {capacity}",
        sides,
        check(),
        bytes_moved=bytes_moved,
        not_capturable=("list pool float32", "numpy ring float32"),
    )
    check()
    assert torch.equal(storage.flatten(1).amin(1), storage.flatten(1).amax(1)), "an image is mixed from several"
