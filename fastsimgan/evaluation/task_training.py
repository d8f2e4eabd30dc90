"""How every task network is trained, gaze and hand alike, so that two sets differ in their images alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def train_task_network(
    network: AnyModule, loss: Callable[[], Tensor], *, steps: int, learning_rate: float, ema_decay: float,
    progress: Callable[[], None] = lambda: None,
) -> AnyModule:  # fmt: skip
    """Adam, its rate rising over 20 steps and falling to zero by a half cosine.

    Args:
        network: trained in place.
        loss: draws the next batch and gives the network's loss on it.
        steps: how many.
        learning_rate: the highest.
        ema_decay: of the exponential moving average of the weights.
        progress: called after each step.

    Returns:
        The moving average of the network over the steps, batch norm's statistics too, ready to be asked.
    """
    mean = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    values, means = (_averaged(module) for module in (network, mean))
    for step in range(steps):
        warm, turn = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * warm * turn
        result = loss()
        optimiser.zero_grad(set_to_none=True)
        result.backward()
        optimiser.step()
        with torch.no_grad():
            decay = min(ema_decay, step / (step + 10))
            torch._foreach_lerp_(means, values, 1 - decay)
        progress()
    return mean.eval()


def _averaged(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.is_floating_point())]
