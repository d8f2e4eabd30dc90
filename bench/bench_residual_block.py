"""residual_block against PyTorch's convolutions, eager and compiled: R's whole work but its first and last layer.

Forward and backward to all arguments on a CPU, in float32 ("cpp") and with products in bfloat16 ("amx" against PyTorch
under autocast). On a GPU there is nothing of ours to time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsimgan.ops import residual_block as op

# [B, C, H, W]: the paper's eye refiner, and the quick presets'
SIZES = {"gaze": (32, 64, 35, 55), "quick": (32, 32, 35, 55), "hands": (16, 24, 48, 48)}


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
    layers = [
        (torch.randn(size, generator=random) / (3 * maps**0.5)).contiguous(
            memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format
        )
        for size in ((maps, maps, 3, 3), (maps,)) * 2
    ]
    arguments = [tensor.requires_grad_() for tensor in (features, *layers)]
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
