"""The paper's gaze network (§3.1), the task network that judges refined eyes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsimgan.errors import InputError


class GazeNetwork(nn.Module):
    """From an eye image to a gaze vector: the network of §3.1, trained with a Euclidean loss.

    3×3 → 32, 3×3 → 32, 3×3 → 64, max-pool 3×3/2, 3×3 → 80, 3×3 → 192, max-pool 2×2/2, flatten, 1000, 3; ReLU after
    each but the last. Nothing is padded, so a 35×55 image reaches the flatten as 192×5×10 = 9,600 (the paper's FC9600).

    Args:
        height, width: size of the images in pixels, at least 23 each.
        channels: channels of the images.
    """

    def __init__(self, height: int = 35, width: int = 55, channels: int = 1) -> None:
        super().__init__()
        if min(height, width) < 23:
            raise InputError(f"images must be at least 23x23 pixels for the gaze network, got {height}x{width}")

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(channels, 32),
            *conv(32, 32),
            *conv(32, 64),
            nn.MaxPool2d(3, 2),
            *conv(64, 80),
            *conv(80, 192),
            nn.MaxPool2d(2, 2),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.features(torch.zeros(1, channels, height, width)).shape[1]
        self.head = nn.Sequential(nn.Linear(flat, 1000), nn.ReLU(), nn.Linear(1000, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Gaze vectors ``[B, 3]`` (camera space, not normalised) for ``images`` ``[B, C, H, W]`` in [-1, 1]."""
        vectors: Tensor = self.head[2](self.hidden(images))
        return vectors

    def hidden(self, images: Tensor) -> Tensor:
        """What the last layer sees, ``[B, 1000]``."""
        values: Tensor = self.head[:2](self.features(images))
        return values
