"""The discriminator D: a small network that says of every patch whether it is real or refined (paper §2.2, §3)."""

from __future__ import annotations

from torch import Tensor, nn

from fastsimgan.errors import InputError


def _spatial(kind: str) -> tuple[tuple[int, int], ...]:
    """(kernel, stride) of the three spatial convolutions and, third, of the max-pool."""
    if kind == "gaze":
        return (3, 2), (3, 2), (3, 1), (3, 1)
    if kind == "hand":
        return (7, 4), (5, 2), (3, 2), (3, 2)
    raise InputError(f'kind must be "gaze" or "hand", got {kind!r}')


def receptive_field(kind: str) -> int:
    """Pixels each way that a patch's logits depend on: 23 of the gaze network, 71 of the hand network."""
    sees, step = 1, 1
    for kernel, stride in _spatial(kind):
        sees += (kernel - 1) * step
        step *= stride
    return sees


class Discriminator(nn.Module):
    """D of the paper; its last layer gives two logits a patch, class 0 = real, class 1 = refined, with no activation.

    ``kind="gaze"`` (§3.1): 3×3/2 → 96, 3×3/2 → 64, max-pool 3×3/1, 3×3/1 → 32, 1×1 → 32, 1×1 → 2.
    ``kind="hand"`` (§3.2): 7×7/4 → 96, 5×5/2 → 64, max-pool 3×3/2, 3×3/2 → 32, 1×1 → 32, 1×1 → 2.
    A ReLU follows every convolution but the last; the softmax belongs to the loss. Convolutions are padded by half
    their size, so that a 35×55 image gives 9×14 patches and a 224×224 image 7×7.

    Args:
        channels: channels of the image.
        kind: "gaze" or "hand".
        local: True for the paper's patch-wise loss (§2.2); False averages the map's features to one patch an image,
            the global loss that the paper compares it with (Fig. 8).
    """

    def __init__(self, channels: int = 1, *, kind: str = "gaze", local: bool = True) -> None:
        super().__init__()
        first, second, (_, pool_stride), third = _spatial(kind)

        def conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU()]

        self.layers = nn.Sequential(
            *conv(channels, 96, *first),
            *conv(96, 64, *second),
            nn.MaxPool2d(3, pool_stride, 1),
            *conv(64, 32, *third),
            *conv(32, 32, 1, 1),
            *([] if local else [nn.AdaptiveAvgPool2d(1)]),
            nn.Conv2d(32, 2, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 2, h, w]`` for ``images`` ``[B, C, H, W]`` in [-1, 1]; channel 0 = real, channel 1 = refined."""
        logits: Tensor = self.layers(images)
        return logits
