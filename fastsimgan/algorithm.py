"""Algorithm 1 of the paper: everything that training changes, and one iteration of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsimgan.checkpoint import flatten, select
from fastsimgan.config import TrainConfig
from fastsimgan.device import channels_last
from fastsimgan.history import HistoryBuffer
from fastsimgan.losses import discriminator_objective, refiner_objective
from fastsimgan.models.discriminator import Discriminator
from fastsimgan.models.refiner import Refiner

Draw = Callable[[int], Tensor]
"""Asked for n, gives n images ``[n, C, H, W]`` in [-1, 1] on the device."""

Metrics = dict[str, Tensor]
"""Scalars on the device, by name; reading one synchronises."""


class SimGAN:
    """Refiner, discriminator, their optimisers, the history and the step count: the state of Algorithm 1.

    Args:
        config: validated settings.
        image_shape: (C, H, W) of the images trained on.
        device: where it all lives.
    """

    def __init__(self, config: TrainConfig, image_shape: tuple[int, int, int], device: torch.device) -> None:
        torch.manual_seed(config.seed)  # the weights are the only thing drawn from torch's global generator
        self.config = config
        channels = image_shape[0]
        first_kernel = 7 if config.network == "hand" else 3
        refiner = Refiner(channels, width=config.width, blocks=config.blocks, first_kernel=first_kernel)
        self.starts_at_identity = config.identity_init and refiner.identity_init_()
        self.refiner = channels_last(refiner, device)
        self.discriminator = channels_last(Discriminator(channels, kind=config.network, local=config.local), device)
        self.average = copy.deepcopy(self.refiner).requires_grad_(False)
        self.refiner_optimiser = _adam(self.refiner, config.learning_rate_refiner)
        self.discriminator_optimiser = _adam(self.discriminator, config.learning_rate_discriminator)
        self.history = (
            HistoryBuffer(
                capacity=config.history,
                image_shape=image_shape,
                dtype=torch.uint8,
                device=device,
                seed=config.seed,
                impl=config.impl,
            )
            if config.history
            else None
        )
        self.step = 0  # iterations of Algorithm 1 done

    # -- the three kinds of update ------------------------------------------------------------------------------

    def pretrain_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R alone: self-regularisation towards the synthetic images themselves (Algorithm 1, line 1)."""
        refined = self.refiner(synthetic)
        loss = (refined - synthetic).abs().flatten(1).sum(1).mean()
        _update(self.refiner_optimiser, loss)
        self._follow(0.0)
        return {"loss_refiner": loss.detach(), "change": _grey_levels(refined, synthetic)}

    def update_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R on Eq. 4 with D held fixed; ``synthetic`` is ``[b, C, H, W]`` in [-1, 1]."""
        self.discriminator.requires_grad_(False)
        losses, refined = refiner_objective(
            self.refiner,
            self.discriminator,
            synthetic,
            lam=self.config.lam,
            psi=self.config.psi,
            impl=self.config.impl,
        )
        _update(self.refiner_optimiser, losses.loss)
        self.discriminator.requires_grad_(True)
        return {
            "loss_refiner": losses.loss.detach(),
            "adversarial": losses.adversarial.detach().mean(),
            "self_regularisation": losses.self_regularisation.detach().mean(),
            "change": _grey_levels(refined, synthetic),
        }

    def update_discriminator(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """One step of D on Eq. 2 with R held fixed, and one turn of the history (§2.3).

        D sees b refined images, b/2 of them from the current R and b/2 out of the history, and b real ones. The b/2
        fresh ones replace b/2 random entries of the history. Without a history all b come from the current R.
        """
        batch = self.config.batch_size
        with torch.no_grad():
            if self.history is None:
                refined = self.refiner(draw_synthetic(batch))
            else:
                fresh = self.refiner(draw_synthetic(batch // 2))
                refined = torch.cat([fresh, self.history.swap(fresh)])
        losses = discriminator_objective(self.discriminator, refined, draw_real(batch), impl=self.config.impl)
        _update(self.discriminator_optimiser, losses.loss)
        return {
            "loss_discriminator": losses.loss.detach(),
            "accuracy_refined": losses.refined_accuracy.detach(),
            "accuracy_real": losses.real_accuracy.detach(),
        }

    # -- Algorithm 1 ---------------------------------------------------------------------------------------------

    def iteration(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """K_g updates of R, then K_d updates of D; returns the metrics of the last of each."""
        scale = self._learning_rate_scale()
        for optimiser, rate in (
            (self.refiner_optimiser, self.config.learning_rate_refiner),
            (self.discriminator_optimiser, self.config.learning_rate_discriminator),
        ):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        metrics: Metrics = {}
        for _ in range(self.config.k_g):
            metrics |= self.update_refiner(draw_synthetic(self.config.batch_size))
            # The average starts short, so that it does not remember the identity, and lengthens to `ema`.
            self._follow(min(self.config.ema, self.step / (self.step + 10)))
        for _ in range(self.config.k_d):
            metrics |= self.update_discriminator(draw_synthetic, draw_real)
        self.step += 1
        return metrics

    def _learning_rate_scale(self) -> float:
        """Linearly up over the first `warm_up` steps, 1, and with --decay linearly to zero over the second half."""
        up = min(1.0, (self.step + 1) / (self.config.warm_up + 1))
        return min(up, 2 * (1 - self.step / self.config.steps)) if self.config.decay else up

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        """Move the average of R's weights towards R."""
        torch._foreach_lerp_(list(self.average.parameters()), list(self.refiner.parameters()), 1 - decay)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that an iteration reads or writes, by flat names; samplers and step count apart."""
        tensors: dict[str, Tensor] = {}
        for name in ("refiner", "discriminator", "average"):
            tensors |= flatten(name, getattr(self, name).state_dict())
        for name in ("refiner_optimiser", "discriminator_optimiser"):
            # the hyper-parameters beside the state follow from the config and the step
            tensors |= flatten(name, getattr(self, name).state_dict()["state"])
        if self.history is not None:
            tensors |= flatten("history", self.history.state_dict())
        return tensors

    def load_state(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what `state` gave after iteration ``step``."""
        for name in ("refiner", "discriminator", "average"):
            module: nn.Module = getattr(self, name)
            module.load_state_dict(select(name, tensors))
        for name in ("refiner_optimiser", "discriminator_optimiser"):
            optimiser: torch.optim.Optimizer = getattr(self, name)
            parameters = optimiser.param_groups[0]["params"]
            state: dict[int, dict[str, Any]] = {}
            for key, value in select(name, tensors).items():
                index, _, field = key.partition(".")
                like = parameters[int(index)]
                # A copy, since the optimiser works in place, and in the parameter's own memory format: the fused
                # update walks both as flat memory, and checkpoints are contiguous while weights are channels_last.
                own = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value)
                state.setdefault(int(index), {})[field] = own.copy_(value)
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        if self.history is not None:
            self.history.load_state_dict(select("history", tensors))
        self.step = step


def _adam(module: nn.Module, rate: float) -> torch.optim.Adam:
    # first moment 0.5: the usual choice for adversarial training, where gradients turn quickly
    return torch.optim.Adam(module.parameters(), rate, betas=(0.5, 0.999), fused=True)


def _update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _grey_levels(refined: Tensor, synthetic: Tensor) -> Tensor:
    """Mean |R(x) - x| in 8-bit grey levels."""
    return (refined.detach() - synthetic).abs().mean() * 127.5
