"""Adam for both networks, in a form that a CUDA graph can hold, and the schedule that its learning rates follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsimgan.config import TrainConfig


class Schedule:
    """Learning rates of R and D and the weight of R's moving average, each a scalar where updates read it.

    On CUDA all three are on the device, so that a captured update follows them; on a CPU the optimisers hold the rates.

    Args:
        config: settings of the run.
        device: where updates run.

    Attributes:
        tensor: float32 ``[3]`` on ``device``.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._rates = config.learning_rate_refiner, config.learning_rate_discriminator
        self.tensor = torch.tensor([*self._rates, 0.0], device=device)

    @property
    def ema_weight(self) -> Tensor:
        """How far the moving average goes towards R in this iteration."""
        return self.tensor[2]

    def adam(self, module: nn.Module, index: int) -> torch.optim.Adam:
        """An optimiser of ``module`` whose rate follows the schedule: R's with ``index`` 0, D's with 1.

        First moment 0.5: the usual choice for adversarial training, where gradients turn quickly.
        """
        graph = self._device.type == "cuda"
        rate = self.tensor[index] if graph else self._rates[index]
        optimiser = torch.optim.Adam(module.parameters(), rate, betas=(0.5, 0.999), fused=True, capturable=graph)
        for parameter in module.parameters():
            # As Adam would make it at its first step. Were that step captured in a CUDA graph, each replay would begin
            # with making it: at step 1, for ever.
            optimiser.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        return optimiser

    def set(self, step: int, optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]) -> None:
        """Write what holds in the iteration after ``step`` others."""
        scale = self._scale(step)
        rates = tuple(rate * scale for rate in self._rates)
        # The average starts short, so that it does not remember the identity, and lengthens to `ema`.
        weight = 1 - min(self._config.ema, step / (step + 10))
        on_cuda = self._device.type == "cuda"
        # pinned: one copy that the host does not wait for
        self.tensor.copy_(torch.tensor([*rates, weight], pin_memory=on_cuda), non_blocking=on_cuda)
        if not on_cuda:
            for optimiser, rate in zip(optimisers, rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate

    def _scale(self, step: int) -> float:
        """Linearly up over the first `warm_up` steps, 1, and with --decay linearly to zero over the second half."""
        up = min(1.0, (step + 1) / (self._config.warm_up + 1))
        return min(up, 2 * (1 - step / self._config.steps)) if self._config.decay else up


def load_moments(optimiser: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Take over an optimiser's flattened state, in place; ``saved`` is empty where it has made no step."""
    for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
        for field, own in optimiser.state[parameter].items():
            # each keeps its memory format: checkpoints are contiguous while weights are channels_last
            own.copy_(saved[f"{index}.{field}"]) if saved else own.zero_()
