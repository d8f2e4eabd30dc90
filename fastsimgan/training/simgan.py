"""Algorithm 1 of the paper: one iteration of it on the state of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastsimgan.hardware.precision import autocast
from fastsimgan.training.loss_scale import LossScale
from fastsimgan.training.objectives import discriminator_objective, refiner_objective
from fastsimgan.training.state import TrainingState

Draw = Callable[[int], Tensor]
"""Asked for n, gives n images ``[n, C, H, W]`` in [-1, 1] on the device."""

Metrics = dict[str, Tensor]
"""Scalars on the device, by name; reading one synchronises."""


class PackedMetrics(Metrics):
    """Metrics whose values are the elements of ``tensor``, float32 ``[n]``."""

    def __init__(self, metrics: Metrics) -> None:
        self.tensor = torch.stack([value.detach().float() for value in metrics.values()])
        super().__init__(zip(metrics, self.tensor.unbind(), strict=True))


_BAND, _WINDOW = (0.65, 0.85), 20  # of D's accuracy, and the iterations it is averaged over; ours

Part = Callable[[str], AbstractContextManager[object]]
"""Given the name of a part of an iteration, is entered around it."""


def unmarked(_: str) -> AbstractContextManager[object]:
    """A `Part` that does nothing."""
    return nullcontext()


class SimGAN:
    """The updates of R and D, and the iteration that they make up.

    Args:
        state: what they read and change.
        part: entered around "R forward", "D forward", "history", "backward, R's step", "backward, D's step" and
            "optimiser", each time.
    """

    def __init__(self, state: TrainingState, part: Part = unmarked) -> None:
        self.state = state
        self._part = part

    def advance(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """The next step of the phase under way."""
        phase = self.state.phase
        if phase == "train":
            return self.iteration(draw_synthetic, draw_real)
        self.state.done[phase] += 1
        if phase == "pretrain_refiner":
            return self.pretrain_refiner(draw_synthetic(self.state.batch))
        return self.update_discriminator(draw_synthetic, draw_real)

    # -- the three kinds of update ------------------------------------------------------------------------------

    def pretrain_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R alone: self-regularisation towards the synthetic images themselves (Algorithm 1, line 1)."""

        def objective(images: Tensor) -> tuple[Tensor, Metrics]:
            refined = self._refiner(images)
            loss = (refined - images).abs().flatten(1).sum(1).mean()
            return loss, {"loss_refiner": loss, "change": _grey_levels(refined, images)}

        metrics = self._update("refiner", objective, synthetic)
        self._follow(1.0)
        return metrics

    def update_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R on Eq. 4 with D held fixed; ``synthetic`` is ``[b, C, H, W]`` in [-1, 1]."""
        state, config = self.state, self.state.config

        def objective(images: Tensor) -> tuple[Tensor, Metrics]:
            losses, refined = refiner_objective(
                self._refiner, self._discriminator, images, lam=config.lam, psi=config.psi, impl=config.impl
            )
            return losses.loss, {
                "loss_refiner": losses.loss,
                "adversarial": losses.adversarial.mean(),
                "self_regularisation": losses.self_regularisation.mean(),
                "change": _grey_levels(refined, images),
            }

        state.discriminator.requires_grad_(False)
        try:
            return self._update("refiner", objective, synthetic)
        finally:  # a capture that fails is gone on from
            state.discriminator.requires_grad_(True)

    def update_discriminator(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """One step of D on Eq. 2 with R held fixed, and one turn of the history (§2.3).

        D sees b refined images, b/2 of them from the current R and b/2 out of the history, and b real ones. The b/2
        fresh ones replace b/2 random entries of the history. Without a history all b come from the current R.
        """
        state = self.state
        with autocast(state.precision, state.device), torch.no_grad():
            if state.history is None:
                refined = self._refine(draw_synthetic(state.batch))
            else:
                fresh = self._refine(draw_synthetic(state.batch // 2))
                with self._part("history"):
                    older = state.history.swap(fresh)
                refined = torch.cat([fresh, older])

        def objective(refined: Tensor, real: Tensor) -> tuple[Tensor, Metrics]:
            losses = discriminator_objective(self._discriminator, refined, real, impl=state.config.impl)
            return losses.loss, {
                "loss_discriminator": losses.loss,
                "accuracy_refined": losses.refined_accuracy,
                "accuracy_real": losses.real_accuracy,
            }

        return self._update("discriminator", objective, refined, draw_real(state.batch))

    def _refiner(self, images: Tensor) -> Tensor:
        with self._part("R forward"):
            refined: Tensor = self.state.refiner(images)
        return refined

    def _discriminator(self, images: Tensor) -> Tensor:
        with self._part("D forward"):
            logits: Tensor = self.state.discriminator(images)
        return logits

    def _refine(self, images: Tensor) -> Tensor:
        parts = [self._refiner(part) for part in images.chunk(self.state.config.accumulate)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _update(self, name: str, objective: Callable[..., tuple[Tensor, Metrics]], *batch: Tensor) -> Metrics:
        """One step of a network's optimiser down the mean loss of a batch, taken in ``config.accumulate`` parts.

        Args:
            name: "refiner" or "discriminator".
            objective: from a part of each of ``batch``, equally large, to its mean loss and other means over it.
            batch: what the step is on.

        Returns:
            Those means over the whole batch, and the gradient's norm.
        """
        state, count = self.state, self.state.config.accumulate
        optimiser: torch.optim.Optimizer = getattr(state, f"{name}_optimiser")
        optimiser.zero_grad(set_to_none=True)
        seen: list[Metrics] = []
        for images in zip(*(whole.chunk(count) for whole in batch), strict=True):
            with autocast(state.precision, state.device):
                loss, metrics = objective(*images)
            self._backward(name, loss / count if count > 1 else loss)
            seen.append({key: value.detach() for key, value in metrics.items()})
        means = {key: torch.stack([each[key] for each in seen]).mean(0) for key in seen[0]} if count > 1 else seen[0]
        return means | {f"gradient_{name}": self._step(optimiser, state.scales.get(name))}

    def _backward(self, name: str, loss: Tensor) -> None:
        scale = self.state.scales.get(name)
        with self._part(f"backward, {name[0].upper()}'s step"):
            (scale.scaled(loss) if scale else loss).backward()

    def _step(self, optimiser: torch.optim.Optimizer, scale: LossScale | None) -> Tensor:
        """Move the weights by their gradients; gives the gradient's norm."""
        gradients = [p.grad for p in optimiser.param_groups[0]["params"] if p.grad is not None]
        self.state.group.mean_(gradients)
        if scale is not None:
            scale.unscale(gradients)
        with self._part("optimiser"):
            scale.step(optimiser) if scale else optimiser.step()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return scale.left_out_is_zero(norm) if scale else norm

    # -- Algorithm 1 ---------------------------------------------------------------------------------------------

    def iteration(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """K_g updates of R, then K_d updates of D; returns the metrics of the last of each."""
        self.set_schedule()
        metrics = self.updates(draw_synthetic, draw_real)
        self.state.done["train"] += 1
        return metrics

    def updates(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """The part of an iteration that needs nothing from the host: a CUDA graph can hold it."""
        state = self.state
        metrics: Metrics = {}
        for _ in range(state.k_g):
            metrics |= self.update_refiner(draw_synthetic(state.batch))
            self._follow()
        for _ in range(state.config.k_d):
            metrics |= self.update_discriminator(draw_synthetic, draw_real)
        return metrics

    def adapt(self, accuracy: float) -> None:
        """With --k-g-max: take in D's accuracy in an iteration, and after each 20 let K_g follow their mean."""
        state, config = self.state, self.state.config
        if not config.k_g_max:
            return
        state.accuracies.append(accuracy)
        if len(state.accuracies) < _WINDOW:
            return
        mean = sum(state.accuracies) / _WINDOW
        state.accuracies.clear()
        step = 1 if mean > _BAND[1] else -1 if mean < _BAND[0] else 0
        state.k_g = min(max(state.k_g + step, config.k_g), config.k_g_max)

    def decides(self, unread: int) -> bool:
        """With --k-g-max: whether K_g may change once ``unread`` more accuracies have gone to `adapt`."""
        return bool(self.state.config.k_g_max) and len(self.state.accuracies) + unread >= _WINDOW

    def images_drawn(self, k_g: int = 0) -> dict[str, int]:
        """How many synthetic and real images an iteration draws on this rank, with K_g as it is or as given."""
        state, k_d = self.state, self.state.config.k_d
        of_discriminator = state.batch // 2 if state.history is not None else state.batch
        return {
            "synthetic": (k_g or state.k_g) * state.batch + k_d * of_discriminator,
            "real": k_d * state.batch,
        }

    def set_schedule(self) -> None:
        """Write this iteration's learning rates and the moving average's weight where `updates` reads them."""
        state = self.state
        state.schedule.set(state.step, (state.refiner_optimiser, state.discriminator_optimiser))

    @torch.no_grad()
    def _follow(self, weight: float | None = None) -> None:
        """Move the average of R's weights towards R, by ``weight`` or by the schedule's."""
        ema: list[Tensor] = list(self.state.ema.parameters())
        refiner: list[Tensor] = list(self.state.refiner.parameters())
        if weight is not None:
            torch._foreach_lerp_(ema, refiner, weight)
        else:
            weights = [self.state.schedule.ema_weight] * len(ema)
            torch._foreach_lerp_(ema, refiner, weights)


def _grey_levels(refined: Tensor, synthetic: Tensor) -> Tensor:
    """Mean |R(x) - x| in 8-bit grey levels."""
    return (refined.detach() - synthetic).abs().mean() * 127.5
