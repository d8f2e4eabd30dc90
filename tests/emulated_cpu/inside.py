"""What a process on an emulated processor does for tests/ops/test_emulated_cpu.py.

``python -m tests.emulated_cpu.inside results FILE``: writes the bytes of the blocks' results and gradients.
``python -m tests.emulated_cpu.inside tiles``: exit code 0 if "amx" uses the matrix unit, "vnni" does not, and
both leave it as it was.
``python -m tests.emulated_cpu.inside has``: prints which implementations say that they can run.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from torch import Tensor

from tests.emulated_cpu import plugin

plugin.pretend_to_torch()

from fastsimgan.ops import residual_block, residual_block_int8  # noqa: E402


def features(shape: tuple[int, int, int, int]) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)


def floats(shape: tuple[int, int, int, int], impl: str) -> list[Tensor]:
    """Result and gradients of a block in float32 or bfloat16."""
    random = torch.Generator().manual_seed(1)
    maps = shape[1]
    layers = [torch.randn(size, generator=random) / size[-1] for size in ((maps, maps, 3, 3), (maps,)) * 2]
    given = [tensor.requires_grad_() for tensor in (features(shape), *layers)]
    out = residual_block.residual_block(*given, impl)
    return [out.detach(), *torch.autograd.grad(out, given, features(shape))]


def whole(shape: tuple[int, int, int, int], impl: str) -> Tensor:
    """Result of a block in 8 bits."""
    random = torch.Generator().manual_seed(2)
    maps = shape[1]
    layers: list[Tensor] = []
    for size in (1 / 1500, 1 / 9e5):
        layers += [torch.randint(-127, 128, (maps, maps, 3, 3), generator=random).to(torch.int8)]
        layers += [torch.randint(-20000, 20000, (maps,), generator=random).int()]
        layers += [(0.5 + torch.rand(maps, generator=random)) * size]
    return residual_block_int8.residual_block_int8(features(shape).relu(), torch.full((maps,), 75.0), *layers, impl)


def results(path: str) -> None:
    found = []
    for shape in [(2, 32, 17, 9), (1, 24, 5, 3), (1, 16, 1, 1), (2, 8, 9, 10)]:
        found += floats(shape, "cpp")
    if residual_block_int8.implementations()["vnni"] is None:
        found.append(whole((2, 64, 35, 55), "vnni"))
    with open(path, "wb") as file:
        for tensor in found:
            file.write(tensor.contiguous().numpy().tobytes())


def tiles() -> None:
    library = ctypes.CDLL(os.environ["EMULATED_CPU_LIBRARY"])
    torch.set_num_threads(1)
    theirs = bytes([1, 0]) + bytes(14) + bytes([20, 0, 8, 0]) + bytes(28) + bytes([3, 2]) + bytes(14)
    for config in (theirs, bytes(64)):  # another library's, and none
        for block, impl in ((floats, "amx"), (whole, "amx"), (whole, "vnni")):
            library.emulated_configure(config)
            before = library.emulated_products()
            block((2, 32, 9, 9), impl)
            if (library.emulated_products() > before) != (impl == "amx"):
                sys.exit(f"{block.__name__} by {impl}: {library.emulated_products() - before} products of tiles")
            after = ctypes.create_string_buffer(64)
            library.emulated_configuration(after)
            if after.raw != config:
                sys.exit(f"left as {after.raw!r}, was {config!r}")


def has() -> None:
    for module in (residual_block, residual_block_int8):
        print(*(name for name, reason in module.implementations().items() if reason is None))


if __name__ == "__main__":
    {"results": results, "tiles": tiles, "has": has}[sys.argv[1]](*sys.argv[2:])
