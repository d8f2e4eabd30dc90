"""residual_block_int8 against the block in bfloat16 and float32 by PyTorch, eager and compiled. On CPUs alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsimgan.hardware.precision import choose_precision
from fastsimgan.ops import residual_block as float_op
from fastsimgan.ops import residual_block_int8 as op

# [B, C, H, W]: the paper's eye refiner, and the quick presets'
SIZES = {"gaze": (32, 64, 35, 55), "quick": (32, 32, 35, 55)}


def quantised(features: Tensor, layers: list[Tensor]) -> list[Tensor]:
    """Arguments of `residual_block_int8` for float features and layers (weight and bias, twice), peaks at 224."""
    weight1, bias1, weight2, bias2 = layers
    hidden = torch.relu(torch.nn.functional.conv2d(features, weight1, bias1, padding=1))
    units = [values.amax((0, 2, 3)) / 224 for values in (features, hidden)]
    arguments = [1 / units[0]]
    outs = units[1], torch.ones_like(units[1])
    for weight, bias, unit, out in ((weight1, bias1, units[0], outs[0]), (weight2, bias2, units[1], outs[1])):
        exact = weight * unit[:, None, None] / out[:, None, None, None]
        scale = exact.abs().amax((1, 2, 3)) / 127
        rounded = (exact / scale[:, None, None, None]).round().to(torch.int8)
        arguments += [rounded, (bias / out / scale).round().int(), scale]
    return arguments


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", ["amx", "vnni"])
def test_residual_block_int8(race, size, impl):
    if race.device.type != "cpu":
        pytest.skip("residual_block_int8 is for CPUs")
    if op.implementations()[impl] is not None:
        pytest.skip(str(op.implementations()[impl]))
    shape = SIZES[size]
    maps = shape[1]
    random = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=random).relu().contiguous(memory_format=torch.channels_last)
    layers = [torch.randn(size, generator=random) for size in ((maps, maps, 3, 3), (maps,)) * 2]
    layers = [(x / (3 * maps**0.5)).contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in layers]
    arguments = quantised(features, layers)

    @torch.inference_mode()
    def ours() -> Tensor:
        return op.residual_block_int8(features, *arguments, impl=impl)

    def plain(block, dtype):
        def call() -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                return block(features, *layers)[0]

        return call

    sides = {"ours": ours, "eager float32": plain(float_op.reference, torch.float32)}
    if choose_precision("auto", race.device)[0] == "bfloat16":
        sides["eager bfloat16"] = plain(float_op.reference, torch.bfloat16)
        sides["compiled bfloat16"] = plain(torch.compile(float_op.reference, dynamic=False), torch.bfloat16)
    truth = float_op.reference(*(tensor.double() for tensor in (features, *layers)))[0]
    errors = {name: float((call() - truth).norm() / truth.norm()) for name, call in sides.items()}
    assert max(errors.values()) < 0.02, errors
    race.run(f"residual_block_int8 {impl} {size} {list(shape)}", sides, errors, features.numel() * 8)
