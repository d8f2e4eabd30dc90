"""The refiner R: a fully convolutional residual network that keeps the image's size (paper §3.1, §3.2)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastsimgan.errors import InputError
from fastsimgan.ops.residual_block import residual_block

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
    input, that pass is all that it costs. Sums are float32, and the result is of the weights' type, as cuDNN's.
    """
    assert layer.bias is not None
    weight, bias, images = layer.weight.float(), layer.bias.float().view(1, -1, 1, 1), images.float()
    outputs, inputs, high, wide = weight.shape
    if high == wide == 1:
        sums = torch.cat([(images * weight[i].unsqueeze(0)).sum(1, keepdim=True) for i in range(outputs)], 1) + bias
        return sums.to(layer.weight.dtype)
    height, width = images.shape[2:]
    padded = F.pad(images, (wide // 2, wide // 2, high // 2, high // 2))
    total = bias
    for channel in range(inputs):
        for y in range(high):
            for x in range(wide):
                seen = padded[:, channel : channel + 1, y : y + height, x : x + width]
                total = total + seen * weight[:, channel, y, x].view(1, -1, 1, 1)
    return total.to(layer.weight.dtype)


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


Computes = Literal["change", "image"]
"""What R's last layer computes, see `Refiner`."""


class Refiner(nn.Module):
    """R: one k×k convolution, residual blocks, one 1×1 convolution; no stride, no pooling (paper §3.1, §3.2).

    What the last layer computes becomes the refined image in one of two ways:

    - "change": it is added to the image before the tanh, see `put_together`. The image goes round the network, so that
      features hold the change alone: 16 bits are enough for them, and R begins exactly as the identity, of any width
      and any number of channels, as the last layer begins at zero.
    - "image": it is the image, before the tanh, as in the paper. The image goes through the network, which must learn
      to hand it on.

    The paper's gaze refiner is ``Refiner(1, computes="image")`` (3×3 → 64, 4 blocks, 296 k parameters), its hand
    refiner ``Refiner(1, blocks=10, first_kernel=7, computes="image")``. Borders are padded with zeros.

    Args:
        channels: channels of the image, 1 (grey, depth) or more.
        width: feature maps inside.
        blocks: number of residual blocks.
        first_kernel: odd size of the first convolution.
        computes: "change" or "image".

    Attributes:
        recompute: whether backward computes each block's inner features again instead of keeping them from forward:
            less memory, a third more work, the same gradients.
        impl: which implementation of `ops.residual_block` the blocks take.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        width: int = 64,
        blocks: int = 4,
        first_kernel: int = 3,
        computes: Computes = "change",
    ) -> None:
        super().__init__()
        if first_kernel % 2 == 0:
            raise InputError(f"first_kernel must be odd, so that the image keeps its size, got {first_kernel}")
        if computes not in get_args(Computes):
            raise InputError(f"computes must be one of {', '.join(get_args(Computes))}, got {computes!r}")
        self.computes = computes
        self.first = nn.Conv2d(channels, width, first_kernel, padding=first_kernel // 2)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.last = nn.Conv2d(width, channels, 1)
        if computes == "change":
            self._begin()
        self.recompute = False
        self.impl = "auto"

    @torch.no_grad()
    def _begin(self) -> None:
        """First weights: the identity, with features about as large as the image.

        From PyTorch's own, which are smaller, it takes twice as many iterations to the same KID (docs/refiner.md).
        """
        nn.init.kaiming_normal_(self.first.weight)
        assert self.first.bias is not None
        nn.init.uniform_(self.first.bias, -1, 1)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            nn.init.kaiming_normal_(block.conv1.weight)
            for parameter in (block.conv1.bias, *block.conv2.parameters()):
                assert parameter is not None
                nn.init.zeros_(parameter)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Refine ``images`` ``[B, C, H, W]`` in [-1, 1]; the result has the same shape and range, float32.

        Under autocast, or with weights of 16 bits, all features are 16 bits wide.
        """
        features = F.relu(_small_layer(self.first, images.to(self.first.weight.dtype)))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # R draws nothing at random, so there is no generator's state to keep, which a CUDA graph forbids
                features = checkpoint(block, features, self.impl, use_reentrant=False, preserve_rng_state=False)
            else:
                features = block(features, self.impl)
        return put_together(images, _small_layer(self.last, features), self.computes)


CURVE = 0.8
"""s of `put_together`."""


def put_together(images: Tensor, computed: Tensor, computes: str) -> Tensor:
    """The refined images, at least float32, from the images and what R's last layer ``computed``, see `Refiner`.

    Of a change u it is ``tanh(atanh(s x) + u) / s``, held in [-1, 1], s = `CURVE`: u is added before the tanh, where
    the paper's network computes the image. A small u moves mid grey by 1.25 u, black and white by 0.45 u; with s = 1
    these could not move at all. A u of 0 leaves every bit of the image as it is: hence written as x and what is added
    to it, with t = tanh(u).
    """
    if computed.dtype in (torch.float16, torch.bfloat16):
        computed = computed.float()
    t = torch.tanh(computed)
    if computes == "image":
        return t
    near = CURVE * images
    return (images + t * (1 - near * near) / (CURVE + CURVE * (near * t))).clamp(-1, 1)
