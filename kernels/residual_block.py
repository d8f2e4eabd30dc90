"""R's residual block as implicit matrix products: 3×3 convolutions whose biases, ReLUs, masks and skip ride along.

Features are walked as a matrix [pixels, maps] (channels_last). A program makes a tile of pixels × maps as the sum over
the nine taps of (pixels moved by the tap) × (that tap's weights): no patch matrix is ever stored. Operands are 16 bits
wide, sums float32. The data gradient is the same kernel with taps mirrored and the two map axes of the weights
exchanged, so both read one copy of the weights [out, row, column, in], channels_last's own order.

Weight gradients are not made here: cuDNN's kernels for them get 16-bit operands that `gate_kernel` prepares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.grad import conv2d_weight

BLOCK_PIXELS = 128  # two of Hopper's tiles of 64 rows
MOST_BLOCK_MAPS = 128
MOST_BLOCK_DEPTH = 64  # 128 bytes of 16-bit values: the widest swizzle of shared memory
GATE_PIXELS = 64
LAST = torch.channels_last


@triton.jit
def convolution_kernel(
    source,
    weight,
    bias,
    skip,
    gate,
    target,
    column_sums,
    pixels,
    height,
    width,
    MAPS: tl.constexpr,
    MIRRORED: tl.constexpr,
    RELU: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_MAPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """target = conv3x3(source, weight) + bias + skip, borders padded with zeros; each a matrix [pixels, MAPS].

    source: rounded to weight's type. weight: [MAPS, 3, 3, MAPS], 16 bits. bias, skip, gate, column_sums: or None.
    bias: [MAPS]. gate: where it is not positive the skip is left out, or without a skip the whole sum.
    column_sums: [programs along the pixels, MAPS] float32, the sums of a tile's columns, before target's rounding.
    MIRRORED: the transposed convolution, that is the data gradient. RELU: negative sums become 0.
    WIDEN: multiply the rounded operands as float32, for the interpreter, which takes bfloat16's bits for integers.
    """
    map_tiles: tl.constexpr = (MAPS + BLOCK_MAPS - 1) // BLOCK_MAPS
    program = tl.program_id(0)
    tile = program // map_tiles
    first_map = (program % map_tiles) * BLOCK_MAPS
    start = tile.to(tl.int64) * BLOCK_PIXELS
    local = tl.arange(0, BLOCK_PIXELS)
    present = local < tl.minimum(pixels - start, BLOCK_PIXELS).to(tl.int32)
    x = (start % width).to(tl.int32) + local
    y = ((start // width) % height).to(tl.int32) + x // width
    x = x % width
    y = y % height
    maps = first_map + tl.arange(0, BLOCK_MAPS)
    wanted = maps < MAPS
    depth = tl.arange(0, BLOCK_DEPTH)

    source += start * MAPS
    source_tile = source + (local[:, None] * MAPS + depth[None, :])
    if MIRRORED:  # weight[out = depth, tap, in = map]
        weight_tile = weight + (depth[:, None] * (9 * MAPS) + maps[None, :])
    else:
        weight_tile = weight + (depth[:, None] + maps[None, :] * (9 * MAPS))

    steps: tl.constexpr = MAPS // BLOCK_DEPTH
    total = tl.zeros((BLOCK_PIXELS, BLOCK_MAPS), tl.float32)
    for step in range(0, 9 * steps):
        tap = step // steps
        first_depth = (step % steps) * BLOCK_DEPTH
        down = tap // 3 - 1
        right = tap % 3 - 1
        inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width) & present
        moved = (down * width + right).to(tl.int64) * MAPS + first_depth
        values = tl.load(source_tile + moved, mask=inside[:, None], other=0.0)
        if MIRRORED:
            offset = first_depth * (9 * MAPS) + (8 - tap) * MAPS
        else:
            offset = first_depth + tap * MAPS
        weights = tl.load(weight_tile + offset, mask=wanted[None, :], other=0.0)
        values = values.to(weight.dtype.element_ty)
        if WIDEN:
            values = values.to(tl.float32)
            weights = weights.to(tl.float32)
        total = tl.dot(values, weights, total)

    place = start * MAPS + (local[:, None] * MAPS + maps[None, :])
    stored = present[:, None] & wanted[None, :]
    if bias is not None:
        total += tl.load(bias + maps, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if skip is not None:
        through = tl.load(skip + place, mask=stored, other=0.0).to(tl.float32)
        if gate is not None:
            through = tl.where(tl.load(gate + place, mask=stored, other=0.0) > 0, through, 0.0)
        total += through
    elif gate is not None:
        total = tl.where(tl.load(gate + place, mask=stored, other=0.0) > 0, total, 0.0)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # a maximum would lose NaN
    tl.store(target + place, total.to(target.dtype.element_ty), mask=stored)
    if column_sums is not None:
        # what lies beyond the last pixel is gated away
        tl.store(column_sums + tile.to(tl.int64) * MAPS + maps, tl.sum(total, axis=0), mask=wanted)


@triton.jit
def gate_kernel(
    grad,
    out,
    features,
    outer,
    operand,
    column_sums,
    pixels,
    MAPS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_MAPS: tl.constexpr,
):
    """outer = grad * (out > 0), rounded to outer's type, and its column sums; operand = features rounded, if given.

    Matrices [pixels, MAPS]; column_sums: [programs, MAPS] float32, of values before they are rounded.
    """
    tile = tl.program_id(0).to(tl.int64)
    start = tile * BLOCK_PIXELS
    local = tl.arange(0, BLOCK_PIXELS)
    maps = tl.arange(0, BLOCK_MAPS)
    count = tl.minimum(pixels - start, BLOCK_PIXELS).to(tl.int32)
    present = (local < count)[:, None] & (maps < MAPS)[None, :]
    place = start * MAPS + (local[:, None] * MAPS + maps[None, :])
    passed = tl.load(out + place, mask=present, other=0.0) > 0
    value = tl.where(passed, tl.load(grad + place, mask=present, other=0.0).to(tl.float32), 0.0)
    tl.store(outer + place, value.to(outer.dtype.element_ty), mask=present)
    if features is not None:
        rounded = tl.load(features + place, mask=present, other=0.0).to(operand.dtype.element_ty)
        tl.store(operand + place, rounded, mask=present)
    tl.store(column_sums + tile * MAPS + maps, tl.sum(value, axis=0), mask=maps < MAPS)


class Traffic(NamedTuple):
    """What a launch must move: every tensor once. Neighbours of a tile and taps behind the first come from caches."""

    launch: str
    read: float  # bytes a value of the features, small tensors (weights, biases) left out
    written: float


def traffic(features: torch.dtype, products: torch.dtype, backward: bool) -> list[Traffic]:
    """Bytes that each launch of ours moves for one value of one block, forward or (without weight gradients) backward.

    Column sums, 4 bytes for each 64 or 128 values, are left out too.
    """
    wide, half = features.itemsize, products.itemsize
    if not backward:
        return [Traffic("first", wide, half), Traffic("second", half + wide, wide)]
    if features == products:
        return [Traffic("gate", 2 * half, half), Traffic("inner", 2 * half, half), Traffic("outer", 2 * half, half)]
    return [
        Traffic("gate", 3 * wide, 2 * half),
        Traffic("inner", 2 * half, half),
        Traffic("outer", half + 2 * wide, wide),
    ]


def _convolve(
    source: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    column_sums: Tensor | None = None,
    mirrored: bool = False,
    relu: bool = False,
) -> None:
    images, maps, height, width = source.shape
    pixels = images * height * width
    block_maps = min(MOST_BLOCK_MAPS, triton.next_power_of_2(maps))
    block_depth = min(MOST_BLOCK_DEPTH, maps & -maps)  # a power of two that divides: no mask along the sums
    programs = triton.cdiv(pixels, BLOCK_PIXELS) * triton.cdiv(maps, block_maps)
    with torch.cuda.device_of(source):
        convolution_kernel[(programs,)](
            source,
            weight,
            bias,
            skip,
            gate,
            target,
            column_sums,
            pixels,
            height,
            width,
            MAPS=maps,
            MIRRORED=mirrored,
            RELU=relu,
            WIDEN=triton.knobs.runtime.interpret and weight.dtype == torch.bfloat16,
            BLOCK_PIXELS=BLOCK_PIXELS,
            BLOCK_MAPS=block_maps,
            BLOCK_DEPTH=block_depth,
            num_warps=8 if block_maps == MOST_BLOCK_MAPS else 4,
            num_stages=3,
        )


def forward(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``relu(features + conv2(hidden))`` in features' dtype, and ``hidden = relu(conv1(features))`` in ``products``.

    Both in channels_last. features: ``[B, C, H, W]``, float32 or ``products``; C a multiple of 16. products: the type
    that operands are rounded to, float16 or bfloat16; sums and biases are float32.
    """
    features = features.contiguous(memory_format=LAST)
    first, second = (weight.to(products).contiguous(memory_format=LAST) for weight in (weight1, weight2))
    hidden = torch.empty_like(features, dtype=products, memory_format=LAST)
    out = torch.empty_like(features, memory_format=LAST)
    _convolve(features, first, hidden, bias=bias1.contiguous(), relu=True)
    _convolve(hidden, second, out, bias=bias2.contiguous(), skip=features, relu=True)
    return out, hidden


def backward(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, weight1, bias1, weight2 and bias2.

    The first in features' dtype and channels_last, those of weights in the weights' dtype and layout, those of biases
    in float32. grad: of ``out``, in its dtype. Weight gradients are `torch`'s (cuDNN's) of 16-bit operands.
    """
    images, maps, height, width = features.shape
    products = hidden.dtype
    pixels = images * height * width
    grad, features, out = (tensor.contiguous(memory_format=LAST) for tensor in (grad, features, out))
    first, second = (weight.to(products).contiguous(memory_format=LAST) for weight in (weight1, weight2))

    outer, inner = torch.empty_like(hidden), torch.empty_like(hidden)
    operand = features if features.dtype == products else torch.empty_like(hidden)
    rounds = features.dtype != products
    tiles = triton.cdiv(pixels, GATE_PIXELS)
    sums2 = torch.empty((tiles, maps), dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        gate_kernel[(tiles,)](
            grad,
            out,
            features if rounds else None,
            outer,
            operand if rounds else None,
            sums2,
            pixels,
            MAPS=maps,
            BLOCK_PIXELS=GATE_PIXELS,
            BLOCK_MAPS=triton.next_power_of_2(maps),
        )
    sums1 = torch.empty((triton.cdiv(pixels, BLOCK_PIXELS), maps), dtype=torch.float32, device=features.device)
    _convolve(outer, second, inner, gate=hidden, column_sums=sums1, mirrored=True)
    grad_features = torch.empty_like(features)
    if rounds:  # what goes through the skip connection is not rounded
        _convolve(inner, first, grad_features, skip=grad, gate=out, mirrored=True)
    else:
        _convolve(inner, first, grad_features, skip=outer, mirrored=True)

    grad_weight1, grad_weight2 = torch.empty_like(weight1), torch.empty_like(weight2)  # as they lie in memory
    grad_weight1.copy_(conv2d_weight(operand, weight1.shape, inner, padding=1))
    grad_weight2.copy_(conv2d_weight(hidden, weight2.shape, outer, padding=1))
    return grad_features, grad_weight1, sums1.sum(0), grad_weight2, sums2.sum(0)
