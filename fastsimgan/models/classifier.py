"""A small convolutional classifier: the task network where labels are classes."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """3×3 → 32, 3×3 → 32, max-pool 2, 3×3 → 64, 3×3 → 64, mean over a 4×4 grid, 128, classes; ReLU between.

    Args:
        classes: number of classes.
        channels: channels of the images.
    """

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]

        self.layers = nn.Sequential(
            *conv(channels, 32),
            *conv(32, 32),
            nn.MaxPool2d(2),
            *conv(32, 64),
            *conv(64, 64),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` for ``images`` ``[B, C, H, W]`` in [-1, 1]."""
        logits: Tensor = self.layers[-1](self.hidden(images))
        return logits

    def hidden(self, images: Tensor) -> Tensor:
        """What the last layer sees, ``[B, 128]``."""
        values: Tensor = self.layers[:-1](images)
        return values
