"""How much arithmetic an iteration is, and how much a GPU can do."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastsimgan.training.state import TrainingState

#: Dense bfloat16 matrix rates of the makers' data sheets, FLOP/s, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}


def iteration_flops(state: TrainingState) -> int:
    """Floating-point operations of one iteration of all ranks: the convolutions', which are nearly all of it.

    R's step: forward, and backward to the weights and to the layers below; D's forward and its backward to R only.
    D's step: R forward on half a batch (all of it without a history), D forward and backward on two batches.
    """
    config = state.config
    shape = (1, *state.image_shape)
    of_refiner, of_discriminator = (_forward_flops(n, shape) for n in (state.ema, state.discriminator))
    b = config.batch_size
    fresh = b // 2 if config.history else b
    return state.k_g * b * (3 * of_refiner + 2 * of_discriminator) + config.k_d * (
        fresh * of_refiner + 2 * b * 3 * of_discriminator
    )


def _forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    network = copy.deepcopy(network).to("meta")
    network._compiled_call_impl = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """The data sheet's bfloat16 matrix rate of a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
