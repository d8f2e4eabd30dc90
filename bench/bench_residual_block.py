"""residual_block against PyTorch's convolutions, eager and compiled: R's whole work but its first and last layer.

Forward and backward to all arguments: on a CPU in float32 ("cpp") and with products in bfloat16 ("amx" against PyTorch
under autocast); on CUDA with products in bfloat16 ("triton" against cuDNN and `torch.compile` under autocast), with
16-bit features between blocks, as R has them, and with float32 ones.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import limits
from fastsimgan.ops import residual_block as op

# [B, C, H, W]: the paper's eye refiner, and the quick presets'
SIZES = {"gaze": (32, 64, 35, 55), "quick": (32, 32, 35, 55), "hands": (16, 24, 48, 48)}
# features of 250 MB and more in float32: none fits into a cache
CUDA_SIZES = {"gaze": (512, 64, 35, 55), "quick": (1024, 32, 35, 55), "hands": (64, 64, 224, 224)}


def layers_of(maps: int, random: torch.Generator) -> list[Tensor]:
    return [
        (torch.randn(size, generator=random) / (3 * maps**0.5)).contiguous(
            memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format
        )
        for size in ((maps, maps, 3, 3), (maps,)) * 2
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("impl", ["cpp", "amx"])
def test_residual_block(race, size, passes, impl):
    if race.device.type != "cpu":
        pytest.skip("the C++ implementations are for CPUs")
    if op.implementations()[impl] is not None:
        pytest.skip(str(op.implementations()[impl]))
    shape = SIZES[size]
    if impl == "amx" and shape[1] % 32:
        pytest.skip("amx needs a multiple of 32 feature maps")
    maps = shape[1]
    random = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)
    arguments = [tensor.requires_grad_() for tensor in (features, *layers_of(maps, random))]
    compiled = torch.compile(lambda *tensors: op.reference(*tensors)[0], dynamic=False)

    def side(block):
        def call() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=impl == "amx"):
                return block(*arguments)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [call()]

        def both() -> list[Tensor]:
            out = call()
            return [out, *torch.autograd.grad(out, arguments, grad)]

        return forward if passes == "forward" else both

    sides = {
        "ours": side(lambda *tensors: op.residual_block(*tensors, impl)),
        "eager": side(lambda *tensors: op.reference(*tensors)[0]),
        "compiled": side(compiled),
    }
    doubles = [tensor.detach().double().requires_grad_() for tensor in arguments]
    out = op.reference(*doubles)[0]
    truth = [out.detach()] if passes == "forward" else [out.detach(), *torch.autograd.grad(out, doubles, grad.double())]
    errors = {
        name: max(float((f.detach() - t).norm() / t.norm()) for f, t in zip(call(), truth, strict=True))
        for name, call in sides.items()
    }
    # a value within rounding of 0 passes its gradient or not
    assert max(errors.values()) < (1e-2 if impl == "cpp" else 0.1), errors
    moved = (
        features.numel() * 4 * (2 if passes == "forward" else 4)
    )  # features and gradient in, result and gradient out
    race.run(f"residual_block {impl} {size} {list(shape)} {passes}", sides, errors, moved)


@pytest.mark.parametrize("size", CUDA_SIZES)
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("features", ["float32", "16 bits"])
def test_residual_block_on_cuda(race, size, passes, features):
    if race.device.type != "cuda":
        pytest.skip("no CUDA device")
    if op.implementations()["triton"] is not None:
        pytest.skip(str(op.implementations()["triton"]))
    shape = (2, *CUDA_SIZES[size][1:]) if race.disabled else CUDA_SIZES[size]
    if limits.SMALL:
        shape = (2, shape[1], 9, 11)
    dtype = torch.bfloat16 if features == "16 bits" else torch.float32
    random = torch.Generator(race.device).manual_seed(0)
    on_cpu = torch.Generator().manual_seed(0)

    def drawn(images: int) -> Tensor:
        image = torch.randn((images, *shape[1:]), generator=random, device=race.device, dtype=dtype)
        return image.contiguous(memory_format=torch.channels_last)

    layers = [layer.to(race.device).requires_grad_() for layer in layers_of(shape[1], on_cpu)]
    blocks = {
        "ours": lambda *tensors: op.residual_block(*tensors, "triton"),
        "cuDNN": lambda *tensors: op.reference(*tensors)[0],
        "compiled": torch.compile(lambda *tensors: op.reference(*tensors)[0], dynamic=False),
    }

    def side(block, image: Tensor, grad: Tensor):
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(passes == "both"):
                with torch.autocast("cuda", torch.bfloat16):
                    out = block(image, *layers)
                gradients = torch.autograd.grad(out, [image, *layers], grad) if passes == "both" else ()
            return [out.detach(), *gradients]

        return call

    # errors from two images: of 512 the truth in float64 would take longer than everything else
    few, few_grad = drawn(2).requires_grad_(), drawn(2)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (few, *layers)]
    out = op.reference(*doubles)[0]
    truth = [out.detach(), *(torch.autograd.grad(out, doubles, few_grad.double()) if passes == "both" else ())]
    errors = {
        name: max(
            float((found.double() - true).norm() / true.norm())
            for found, true in zip(side(block, few, few_grad)(), truth, strict=True)
        )
        for name, block in blocks.items()
    }
    assert max(errors.values()) < 0.2, errors  # a value within rounding of 0 passes its gradient or not
    image, grad = drawn(shape[0]).requires_grad_(), drawn(shape[0])
    sides = {name: side(block, image, grad) for name, block in blocks.items()}
    moved = image.numel() * dtype.itemsize * (2 if passes == "forward" else 4)
    race.run(f"residual_block triton {size} {features} {list(shape)} {passes}", sides, errors, moved)
