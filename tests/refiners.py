"""Refiners that do something, as after training: a fresh one is the identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastsimgan.models.refiner import Refiner


@torch.no_grad()
def trained(channels: int = 1, *, amount: float = 0.3, seed: int = 0, **shape: Any) -> Refiner:
    """A refiner whose change is ``amount`` of the way to black or white in a typical pixel, on noise.

    Args:
        channels, shape: as `Refiner` has them.
        amount: of the change.
        seed: of its weights; torch's global generator is left seeded.
    """
    torch.manual_seed(seed)
    refiner = Refiner(channels, **shape)
    for block in refiner.blocks:  # PyTorch's own start lets each branch add next to nothing
        for layer in (block.conv1, block.conv2):
            torch.nn.init.kaiming_normal_(layer.weight)
            layer.weight *= 0.7
    refiner.last.weight.normal_()
    images = torch.rand(4, channels, 24, 24) * 2 - 1
    computed: list[torch.Tensor] = []
    with refiner.last.register_forward_hook(lambda layer, given, out: computed.append(out)):
        refiner(images)
    refiner.last.weight *= amount / computed[0].std()
    refiner.last.bias.copy_(-computed[0].mean((0, 2, 3)) * amount / computed[0].std())
    return refiner


def before_computes(folder: Path, *, identity_init: bool, width: int = 8, blocks: int = 1) -> Path:
    """The folder of a run as versions before ``--computes`` wrote its refiner: no such setting in the header."""
    torch.manual_seed(0)
    refiner = Refiner(1, width=width, blocks=blocks, computes="image")
    settings = {"channels": 1, "width": width, "blocks": blocks, "first_kernel": 3, "histogram": "keep"}
    training = json.dumps({"lam": 0.2, "identity_init": identity_init})
    header = {"format": "fastsimgan.refiner/1", "settings": json.dumps(settings), "training": training}
    folder.mkdir()
    save_file(refiner.state_dict(), folder / "refiner.safetensors", header)
    return folder
