"""Loss scaling for float16, on the device throughout."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 2.0**-10  # loss scale that no overflow calls for: gradients would have to pass 6e7


class LossScale:
    """Keeps float16 gradients out of the subnormals: the loss is multiplied by a factor that is as large as it can be.

    A step whose gradients overflow is left out and halves the factor; 2,000 good ones double it. All of it happens on
    the device, so that nothing waits and a CUDA graph can hold it (`torch.amp.GradScaler` reads its state on the host).
    """

    def __init__(self, device: torch.device) -> None:
        self._factor = torch.full((), 65536.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._overflow = torch.zeros((), device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """``loss`` times the factor, to run backward from."""
        return loss * self._factor

    def unscale(self, gradients: list[Tensor]) -> None:
        """Take the factor out of the gradients, in place, and note whether one of them overflowed."""
        self._overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._overflow, self._factor.reciprocal())

    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """The optimiser's step, left out if a gradient overflowed; then adapt the factor."""
        optimiser.grad_scale, optimiser.found_inf = None, self._overflow  # type: ignore[attr-defined]
        optimiser.step()
        torch._amp_update_scale_(self._factor, self._good_steps, self._overflow, 2.0, 0.5, 2000)

    def left_out_is_zero(self, value: Tensor) -> Tensor:
        """``value``, or 0 where the step was left out for an overflow.

        From a factor of 2⁻¹⁰ down, 26 halvings, it is no overflow but a NaN that comes again: ``value`` is given.
        """
        left_out = (self._overflow > 0) & (self._factor > _SMALLEST)
        return torch.where(left_out, torch.zeros_like(value), value)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` goes on from."""
        return {"factor": self._factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, in place."""
        self._factor.copy_(state["factor"])
        self._good_steps.copy_(state["good_steps"])
