"""The refiner R: a fully convolutional residual network that keeps the image's size (paper §3.1, §3.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastsimgan.errors import InputError
from fastsimgan.ops.residual_block import residual_block

# Thresholds of the piecewise-linear path that `identity_init_` lays through the network, as grey values in [-1, 1],
# and the value that white gets. atanh goes to infinity at both ends, and a steep line there would magnify every first
# step of training: with white at 0.999 the slope is 80, and three steps of Adam at 2e-4 took R 120 grey levels off.
_KNOTS = (-0.97, -0.92, -0.85, -0.7, -0.45, 0.0, 0.45, 0.7, 0.85, 0.92)
_WHITE = 0.98


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


_MOST_TAPS = 16  # of the first layer: with more of them cuDNN's convolution is better


def _small_layer(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """The first or the last layer: a convolution, or `_products` while R alone is compiled for a GPU.

    With gradients it stays a convolution: the weights' gradients would be one sum over all pixels for each tap.
    """
    if torch.compiler.is_compiling() and images.is_cuda and not torch.is_grad_enabled():
        outputs, inputs, high, wide = layer.weight.shape
        if inputs * high * wide <= _MOST_TAPS or (high == wide == 1 and outputs <= 4):
            return _products(layer, images)
    refined: Tensor = layer(images)
    return refined


def _products(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """A convolution of few products a value, written so that Inductor fuses it with what comes before and after.

    cuDNN's would be a pass over the features of its own: for the last layer, whose output is a sixty-fourth of its
    input, that pass is all that it costs.
    """
    assert layer.bias is not None
    weight, bias = layer.weight, layer.bias.view(1, -1, 1, 1)
    outputs, inputs, high, wide = weight.shape
    if high == wide == 1:
        return torch.cat([(images * weight[i].unsqueeze(0)).sum(1, keepdim=True) for i in range(outputs)], 1) + bias
    height, width = images.shape[2:]
    padded = F.pad(images, (wide // 2, wide // 2, high // 2, high // 2))
    total = bias
    for channel in range(inputs):
        for y in range(high):
            for x in range(wide):
                seen = padded[:, channel : channel + 1, y : y + height, x : x + width]
                total = total + seen * weight[:, channel, y, x].view(1, -1, 1, 1)
    return total


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions of equal width around a skip connection, ReLU after each (paper §3.1, Fig. 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor, impl: str = "auto") -> Tensor:
        """``[B, width, H, W]`` in and out; ``impl`` as in `ops.residual_block`."""
        first, second = self.conv1, self.conv2
        assert first.bias is not None and second.bias is not None
        return residual_block(features, first.weight, first.bias, second.weight, second.bias, impl)


class Refiner(nn.Module):
    """R of the paper: one k×k convolution, residual blocks, one 1×1 convolution, tanh; no stride, no pooling.

    The paper's gaze refiner is ``Refiner(1)`` (3×3 → 64, 4 blocks, 296 k parameters), its hand refiner
    ``Refiner(1, blocks=10, first_kernel=7)``. Borders are padded with zeros.

    Args:
        channels: channels of the image, 1 (grey, depth) or more.
        width: feature maps inside.
        blocks: number of residual blocks.
        first_kernel: odd size of the first convolution.

    Attributes:
        recompute: whether backward computes each block's inner features again instead of keeping them from forward:
            less memory, a third more work, the same gradients.
        impl: which implementation of `ops.residual_block` the blocks take.
    """

    def __init__(self, channels: int = 1, *, width: int = 64, blocks: int = 4, first_kernel: int = 3) -> None:
        super().__init__()
        if first_kernel % 2 == 0:
            raise InputError(f"first_kernel must be odd, so that the image keeps its size, got {first_kernel}")
        self.first = nn.Conv2d(channels, width, first_kernel, padding=first_kernel // 2)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.last = nn.Conv2d(width, channels, 1)
        self.recompute = False
        self.impl = "auto"

    def forward(self, images: Tensor) -> Tensor:
        """Refine ``images`` ``[B, C, H, W]`` in [-1, 1]; the result has the same shape and range."""
        # Under autocast only the residual branches, 99 % of the work, are in half precision: a refiner that began at
        # the identity carries the image as small differences of large features, and in bfloat16 throughout a trained
        # one was 3 grey levels off on average and 32 at most.
        with _no_autocast(images.device):
            features = F.relu(_small_layer(self.first, images))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # R draws nothing at random, so there is no generator's state to keep, which a CUDA graph forbids
                features = checkpoint(block, features, self.impl, use_reentrant=False, preserve_rng_state=False)
            else:
                features = block(features, self.impl)
        with _no_autocast(images.device):
            return torch.tanh(_small_layer(self.last, features))

    @torch.no_grad()
    def identity_init_(self) -> bool:
        """Start R near the identity, so that pre-training on self-regularisation alone takes steps, not minutes.

        The paper trains R alone for 1,000 steps "to learn the identity" (Algorithm 1). The same network can be
        *set* there: ten channels per image channel carry ``relu(x - t_k)`` through the skip connections, and the last
        layer sums them to the piecewise-linear ``atanh(x)`` that the tanh undoes. All other channels keep their random
        values, so everything can still be learnt. The second convolution of each block starts at zero.

        Returns:
            False, with nothing changed, where the network is too narrow for it (``width < 20 * channels``).
        """
        channels, width = self.last.out_channels, self.last.in_channels
        knots = torch.tensor(_KNOTS, dtype=torch.float64)
        if width < 2 * len(knots) * channels:
            return False
        # atanh at the knots, and of _WHITE at 1, joined by straight lines.
        heights = torch.atanh(torch.cat([knots, torch.tensor([_WHITE], dtype=torch.float64)]))
        slopes = heights.diff() / torch.cat([knots, torch.ones(1, dtype=torch.float64)]).diff()
        weights = torch.cat([slopes[:1], slopes.diff()])  # slope changes at each knot
        centre = self.first.kernel_size[0] // 2
        for channel in range(channels):
            lane = slice(channel * len(knots), (channel + 1) * len(knots))
            self.first.weight[lane] = 0
            self.first.weight[lane, channel, centre, centre] = 1
            self.first.bias[lane] = -knots.to(self.first.bias)  # type: ignore[index]
            self.last.weight[:, lane] = 0
            self.last.weight[channel, lane, 0, 0] = weights.to(self.last.weight)
            self.last.bias[channel] = float(heights[0])  # type: ignore[index]
        self.last.weight[:, channels * len(knots) :] = 0
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            for parameter in block.conv2.parameters():
                parameter.zero_()
        return True
