"""The stacked hourglass (Newell, Yang, Deng 2016, arXiv 1603.06937), the task network that judges refined hands."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastsimgan.errors import InputError


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 around a skip connection, batch norm and ReLU before each: Newell's residual module."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()

        def conv(before: int, after: int, kernel: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, after, kernel, padding=kernel // 2)]

        half = outputs // 2
        self.branch = nn.Sequential(*conv(inputs, half, 1), *conv(half, half, 3), *conv(half, outputs, 1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` in, ``[B, outputs, H, W]`` out."""
        out: Tensor = self.skip(features) + self.branch(features)
        return out


class HourglassModule(nn.Module):
    """Down ``depth`` times by a max-pool of 2 and up again by repetition, with a skip branch at every size."""

    def __init__(self, features: int, depth: int) -> None:
        super().__init__()
        self.beside = Bottleneck(features, features)
        self.down = Bottleneck(features, features)
        self.inner = HourglassModule(features, depth - 1) if depth > 1 else Bottleneck(features, features)
        self.up = Bottleneck(features, features)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, features, H, W]`` in and out, H and W at least ``2**depth``."""
        low = self.up(self.inner(self.down(F.max_pool2d(features, 2))))
        out: Tensor = self.beside(features) + F.interpolate(low, size=features.shape[2:])  # an odd size comes back
        return out


class StackedHourglass(nn.Module):
    """One heat map a joint from each of ``modules`` hourglasses; each but the last feeds the next (§3.2).

    The defaults are Newell's: 7×7/2 → 64, a residual module to 128, max-pool of 2, two more to 256 features, and
    modules that go down four times; 256×256 images give 64×64 heat maps. The loss is put on every module's maps
    (intermediate supervision); the last module's are the answer.

    Args:
        joints: heat maps.
        channels: channels of the image.
        modules: hourglasses, one after the other.
        features: feature maps in them, a multiple of 4.
        depth: how often each goes down.
        stride: pixels of the image a cell of the heat maps: 4, or for small images 2 (without the max-pool).
    """

    def __init__(
        self, joints: int, channels: int = 1, *, modules: int = 2, features: int = 256, depth: int = 4, stride: int = 4
    ) -> None:
        super().__init__()
        if features < 4 or features % 4:
            raise InputError(f"features must be a multiple of 4, got {features}")
        if stride not in (2, 4):
            raise InputError(f"stride must be 2 or 4, got {stride}")
        for name, value in {"joints": joints, "modules": modules, "depth": depth}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.smallest = stride * 2**depth
        self.stem = nn.Sequential(
            nn.Conv2d(channels, features // 4, 7, 2, 3),
            nn.BatchNorm2d(features // 4),
            nn.ReLU(),
            Bottleneck(features // 4, features // 2),
            *([nn.MaxPool2d(2)] if stride == 4 else []),
            Bottleneck(features // 2, features // 2),
            Bottleneck(features // 2, features),
        )
        self.hourglasses = nn.ModuleList(
            nn.Sequential(
                HourglassModule(features, depth),
                Bottleneck(features, features),
                nn.Conv2d(features, features, 1),
                nn.BatchNorm2d(features),
                nn.ReLU(),
            )
            for _ in range(modules)
        )
        self.heat_maps = nn.ModuleList(nn.Conv2d(features, joints, 1) for _ in range(modules))
        self.features_on = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(modules - 1))
        self.maps_on = nn.ModuleList(nn.Conv2d(joints, features, 1) for _ in range(modules - 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Each module's heat maps ``[B, joints, H / stride, W / stride]`` for ``images`` ``[B, C, H, W]`` in [-1, 1].

        H and W are multiples of ``stride`` and at least ``stride * 2**depth``.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.smallest:
            raise InputError(f"images must be at least {self.smallest} pixels each way here, got {height}x{width}")
        features = self.stem(images)
        found: list[Tensor] = []
        for number, hourglass in enumerate(self.hourglasses):
            seen = hourglass(features)
            found.append(self.heat_maps[number](seen))
            if number < len(self.features_on):
                features = features + self.features_on[number](seen) + self.maps_on[number](found[-1])
        return found
