"""residual_block_int8: every implementation to the last bit, what it means against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops import residual_block_int8 as op
from fastsimgan.ops.residual_block_int8 import residual_block_int8

each_kernel = pytest.mark.parametrize(
    "impl",
    [
        pytest.param(impl, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for impl, reason in op.implementations().items()
        if impl != "reference"
    ],
)

# [B, C, H, W]: the paper's eye, several strips an image, maps that are no power of two, one row, one column, one pixel
SHAPES = [(2, 64, 35, 55), (1, 32, 224, 224), (2, 96, 47, 57), (1, 64, 1, 33), (2, 32, 300, 1), (3, 32, 1, 1)]


def arguments(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Features and layers whose rounded values fill [0, 255] and go beyond it on both sides."""
    random = torch.Generator().manual_seed(0)
    maps = shape[1]
    layers: list[Tensor] = []
    for size in (1 / 1500, 1 / 9e5):
        layers += [
            torch.randint(-127, 128, (maps, maps, 3, 3), generator=random).to(torch.int8),
            torch.randint(-20000, 20000, (maps,), generator=random).int(),
            (0.5 + torch.rand(maps, generator=random)) * size,
        ]
    features = torch.randn(shape, generator=random).relu().contiguous(memory_format=torch.channels_last)
    return [features, 60 + 30 * torch.rand(maps, generator=random), *layers]


def test_the_arguments_reach_both_ends() -> None:
    features, in_scale, weight1, bias1, scale1, *_ = arguments((2, 64, 35, 55))
    rounded = (features * in_scale[:, None, None]).round()
    sums = F.conv2d(rounded.clamp(0, 255).double(), weight1.double(), bias1.double(), padding=1)
    hidden = sums * scale1[:, None, None]
    assert rounded.max() > 255 and hidden.min() < -1 and hidden.max() > 256
    assert 0.1 < float(((hidden > 0.5) & (hidden < 254.5)).double().mean())


@each_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_all_give_the_references_bits(shape: tuple[int, int, int, int], impl: str) -> None:
    given = arguments(shape)
    expected = residual_block_int8(*given, impl="reference")
    found = residual_block_int8(*given, impl=impl)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected) and expected.std() > 0.1


def test_the_reference_is_the_block_of_the_rounded_numbers() -> None:
    """Against float64 of the same weights, features and hidden values are at most half a unit off."""
    features, in_scale, weight1, bias1, scale1, weight2, bias2, scale2 = arguments((2, 8, 12, 9))
    features = features.clamp_max(2)  # of 255 / in_scale
    scale1 = scale1 / 8  # so that no hidden value is above 255

    def layer(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return F.conv2d(x, weight.double(), bias.double(), padding=1) * scale[:, None, None].double()

    hidden = F.relu(layer(features.double() * in_scale[:, None, None], weight1, bias1, scale1))
    truth = F.relu(features + layer(hidden, weight2, bias2, scale2))
    off_hidden = 0.5 + 0.5 * weight1.double().abs().sum((1, 2, 3)) * scale1
    reach = (weight2.double().abs().sum((2, 3)) @ off_hidden) * scale2
    found = residual_block_int8(features, in_scale, weight1, bias1, scale1, weight2, bias2, scale2, impl="reference")
    off = (found - truth).abs().amax((0, 2, 3))
    assert bool((off <= reach + 1e-4).all()) and bool((off > 0).all())
    assert float((found - truth).norm() / (truth - features).norm()) < 0.02


def test_whole_numbers_that_fit_are_exact() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randint(0, 4, (2, 32, 9, 7), generator=random).float()
    weights = [torch.randint(-1, 2, (32, 32, 3, 3), generator=random) for _ in range(2)]
    biases = [torch.randint(-9, 10, (32,), generator=random) for _ in range(2)]
    hidden = F.relu(F.conv2d(features, weights[0].float(), biases[0].float(), padding=1))
    assert hidden.max() < 256
    truth = F.relu(features + F.conv2d(hidden, weights[1].float(), biases[1].float(), padding=1))
    ones = torch.ones(32)
    layers = [(weight.to(torch.int8), bias.int(), ones) for weight, bias in zip(weights, biases, strict=True)]
    for impl, reason in op.implementations().items():
        if reason is None:
            assert torch.equal(residual_block_int8(features, ones, *layers[0], *layers[1], impl=impl), truth), impl


@each_kernel
def test_the_largest_sums_do_not_overflow_and_sums_of_16_bits_do_not_saturate(impl: str) -> None:
    maps = 64
    features = torch.full((1, maps, 5, 5), 300.0)
    weight = torch.full((maps, maps, 3, 3), 127, dtype=torch.int8)
    weight[1::2] = -127
    bias, scale = torch.zeros(maps, dtype=torch.int32), torch.full((maps,), 2.0**-10)
    given = [features, torch.ones(maps), weight, bias, scale, weight.clone(), bias, scale]
    assert torch.equal(residual_block_int8(*given, impl=impl), residual_block_int8(*given, impl="reference"))


@each_kernel
def test_any_layout_any_memory_and_any_number_of_threads(impl: str) -> None:
    given = arguments((5, 64, 35, 55))
    expected = residual_block_int8(*given, impl=impl)
    assert torch.equal(residual_block_int8(given[0].contiguous(), *given[1:], impl=impl), expected)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) if x.dim() == 4 else x for x in given]
    turned[2] = turned[2].contiguous(memory_format=torch.channels_last)
    assert torch.equal(residual_block_int8(*turned, impl=impl), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            poison = [torch.full((size,), 255, dtype=torch.uint8) for size in (1 << 12, 1 << 16, 1 << 18, 1 << 20)]
            del poison
            assert torch.equal(residual_block_int8(*given, impl=impl), expected)
    finally:
        torch.set_num_threads(threads)


@each_kernel
def test_the_matrix_unit_is_left_as_it_was(impl: str) -> None:
    """PyTorch's own bfloat16 convolutions configure it once in a thread."""
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 32, 9, 9, generator=random).bfloat16()
    weight = torch.randn(32, 32, 3, 3, generator=random).bfloat16()
    before = F.conv2d(image, weight)
    residual_block_int8(*arguments((2, 32, 9, 9)), impl=impl)
    assert torch.equal(F.conv2d(image, weight), before)


def test_opcheck() -> None:
    given = arguments((1, 32, 5, 6))
    amx = op.implementations()["amx"] is None
    if op.implementations()["vnni"] is not None:
        pytest.skip(str(op.implementations()["vnni"]))
    torch.library.opcheck(torch.ops.fastsimgan.residual_block_int8.default, (*given, amx))


def test_what_cannot_be_served_is_said_and_auto_takes_the_reference() -> None:
    narrow = arguments((1, 12, 5, 5))
    assert torch.equal(residual_block_int8(*narrow), residual_block_int8(*narrow, impl="reference"))
    for impl in ("amx", "vnni"):
        with pytest.raises(UnavailableError, match=rf"residual_block_int8 impl='{impl}': .*"):
            residual_block_int8(*narrow, impl=impl)
    with pytest.raises(InputError, match="impl must be one of auto, amx, vnni, reference, got 'fast'"):
        residual_block_int8(*narrow, impl="fast")


@each_kernel
def test_kernels_name_what_they_need(impl: str) -> None:
    with pytest.raises(UnavailableError, match="multiple of 32 feature maps, got 24"):
        residual_block_int8(*arguments((1, 24, 5, 5)), impl=impl)
    given = arguments((1, 32, 5, 5))
    with pytest.raises(UnavailableError, match="empty"):
        residual_block_int8(given[0][:0], *given[1:], impl=impl)
    for index, wrong in ((1, given[1][:8]), (2, given[2][:8]), (3, given[3].long()), (4, given[4].double())):
        with pytest.raises(RuntimeError, match="C=32"):  # whoever calls the op itself
            numbers = (wrong if i == index else x for i, x in enumerate(given))
            torch.ops.fastsimgan.residual_block_int8(*numbers, impl == "amx")
    spread = [x.repeat_interleave(2, 0)[::2] if x.dim() == 1 else x for x in given]
    assert torch.equal(residual_block_int8(*spread, impl=impl), residual_block_int8(*given, impl=impl))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_arguments_are_named_with_what_they_must_be(impl: str) -> None:
    given = arguments((1, 32, 5, 5))
    for index, wrong, message in (
        (0, given[0].double(), r"features must be float32 \[B, C, H, W\], got torch.float64"),
        (0, given[0][0], r"features must be .* got torch.float32 \[32, 5, 5\]"),
        (0, given[0].clone().requires_grad_(), "features must not require a gradient"),
        (1, given[1][:8], r"in_scale must be torch.float32 \[32\], got torch.float32 \[8\]"),
        (2, given[2].float(), r"weight1 must be torch.int8 \[32, 32, 3, 3\], got torch.float32"),
        (6, given[6].long(), r"bias2 must be torch.int32 \[32\], got torch.int64"),
        (7, given[7][:1], "scale2 must be .* got"),
    ):
        with pytest.raises(InputError, match=message):
            residual_block_int8(*(wrong if i == index else x for i, x in enumerate(given)), impl=impl)
