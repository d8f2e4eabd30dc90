"""Algorithm 1 of the paper: everything that training changes, and one iteration of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsimgan.config import TrainConfig
from fastsimgan.hardware.device import channels_last
from fastsimgan.hardware.precision import LossScale, autocast
from fastsimgan.models.discriminator import Discriminator
from fastsimgan.models.refiner import Refiner
from fastsimgan.storage.checkpoint import flatten, select
from fastsimgan.training.data_parallel import Ranks
from fastsimgan.training.history_buffer import HistoryBuffer
from fastsimgan.training.objectives import discriminator_objective, refiner_objective

Draw = Callable[[int], Tensor]
"""Asked for n, gives n images ``[n, C, H, W]`` in [-1, 1] on the device."""

Metrics = dict[str, Tensor]
"""Scalars on the device, by name; reading one synchronises."""


class OneTensor(Metrics):
    """Metrics whose values are the elements of ``tensor``, float32 ``[n]``."""

    def __init__(self, metrics: Metrics) -> None:
        self.tensor = torch.stack([value.detach().float() for value in metrics.values()])
        super().__init__(zip(metrics, self.tensor.unbind(), strict=True))


PHASES = ("pretrain_refiner", "pretrain_discriminator", "train")
"""R alone, D alone, Algorithm 1."""

#: the optimisers, and the phase before "train" in which each takes steps
_FIRST_STEPPED = {"refiner_optimiser": "pretrain_refiner", "discriminator_optimiser": "pretrain_discriminator"}

_BAND, _WINDOW = (0.65, 0.85), 20  # of D's accuracy, and the iterations it is averaged over; ours


class SimGAN:
    """Refiner, discriminator, their optimisers, the history and how far training is: the state of Algorithm 1.

    Args:
        config: validated settings.
        image_shape: (C, H, W) of the images trained on.
        device: where it all lives.
        ranks: the processes that share each batch; each keeps a history of its own, the rest is equal on all.
        precision: of the networks: "float32", "bfloat16" or "float16".
    """

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, int, int],
        device: torch.device,
        ranks: Ranks | None = None,
        precision: str = "float32",
    ) -> None:
        torch.manual_seed(config.seed)  # the weights are the only thing drawn from torch's global generator
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        self.precision = precision
        self.batch = config.batch_size // self.ranks.count  # this rank's share
        channels = image_shape[0]
        self.image_size = image_shape[1:]
        first_kernel = 7 if config.network == "hand" else 3
        refiner = Refiner(channels, width=config.width, blocks=config.blocks, first_kernel=first_kernel)
        refiner.recompute, refiner.impl = config.recompute, config.impl
        self.starts_at_identity = config.identity_init and refiner.identity_init_()
        self.refiner = channels_last(refiner, device)
        self.discriminator = channels_last(Discriminator(channels, kind=config.network, local=config.local), device)
        self.average = copy.deepcopy(self.refiner).requires_grad_(False)
        rates = config.learning_rate_refiner, config.learning_rate_discriminator
        # This iteration's learning rates of R and D (on CUDA) and weight of the average: a CUDA graph reads them here.
        self._schedule = torch.tensor([*rates, 0.0], device=device)
        self.refiner_optimiser = _adam(self.refiner, rates[0], self._schedule[0])
        self.discriminator_optimiser = _adam(self.discriminator, rates[1], self._schedule[1])
        half = precision == "float16"
        self.scales = {name: LossScale(device) for name in ("refiner", "discriminator")} if half else {}
        self.history = (
            HistoryBuffer(
                capacity=config.history // self.ranks.count,
                image_shape=image_shape,
                dtype=torch.uint8,
                device=device,
                seed=self.ranks.seed(config.seed),
                impl=config.impl,
            )
            if config.history
            else None
        )
        self.k_g = config.k_g
        self.accuracies: list[float] = []  # D's, since K_g was last thought about
        self.done = dict.fromkeys(PHASES, 0)  # steps of each phase behind us

    @property
    def step(self) -> int:
        """Iterations of Algorithm 1 done."""
        return self.done["train"]

    @property
    def phase(self) -> str:
        """The first of `PHASES` with a step left to do, or "" at the end."""
        return next((phase for phase in PHASES if self.done[phase] < self.length(phase)), "")

    def length(self, phase: str) -> int:
        """Steps of a phase, by the settings."""
        config = self.config
        lengths = (config.pretrain_refiner, config.pretrain_discriminator, config.steps)
        return dict(zip(PHASES, lengths, strict=True))[phase]

    def advance(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """The next step of the phase under way."""
        phase = self.phase
        if phase == "train":
            return self.iteration(draw_synthetic, draw_real)
        self.done[phase] += 1
        if phase == "pretrain_refiner":
            return self.pretrain_refiner(draw_synthetic(self.batch))
        return self.update_discriminator(draw_synthetic, draw_real)

    # -- the three kinds of update ------------------------------------------------------------------------------

    def pretrain_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R alone: self-regularisation towards the synthetic images themselves (Algorithm 1, line 1)."""

        def part(images: Tensor) -> tuple[Tensor, Metrics]:
            refined = self.refiner(images)
            loss = (refined - images).abs().flatten(1).sum(1).mean()
            return loss, {"loss_refiner": loss, "change": _grey_levels(refined, images)}

        metrics = self._update("refiner", part, synthetic)
        self._follow(1.0)
        return metrics

    def update_refiner(self, synthetic: Tensor) -> Metrics:
        """One step of R on Eq. 4 with D held fixed; ``synthetic`` is ``[b, C, H, W]`` in [-1, 1]."""

        def part(images: Tensor) -> tuple[Tensor, Metrics]:
            losses, refined = refiner_objective(
                self.refiner,
                self.discriminator,
                images,
                lam=self.config.lam,
                psi=self.config.psi,
                impl=self.config.impl,
            )
            return losses.loss, {
                "loss_refiner": losses.loss,
                "adversarial": losses.adversarial.mean(),
                "self_regularisation": losses.self_regularisation.mean(),
                "change": _grey_levels(refined, images),
            }

        self.discriminator.requires_grad_(False)
        try:
            return self._update("refiner", part, synthetic)
        finally:  # a capture that fails is gone on from
            self.discriminator.requires_grad_(True)

    def update_discriminator(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """One step of D on Eq. 2 with R held fixed, and one turn of the history (§2.3).

        D sees b refined images, b/2 of them from the current R and b/2 out of the history, and b real ones. The b/2
        fresh ones replace b/2 random entries of the history. Without a history all b come from the current R.
        """
        with autocast(self.precision, self.device), torch.no_grad():
            if self.history is None:
                refined = self._refine(draw_synthetic(self.batch))
            else:
                fresh = self._refine(draw_synthetic(self.batch // 2))
                refined = torch.cat([fresh, self.history.swap(fresh)])

        def part(refined: Tensor, real: Tensor) -> tuple[Tensor, Metrics]:
            losses = discriminator_objective(self.discriminator, refined, real, impl=self.config.impl)
            return losses.loss, {
                "loss_discriminator": losses.loss,
                "accuracy_refined": losses.refined_accuracy,
                "accuracy_real": losses.real_accuracy,
            }

        return self._update("discriminator", part, refined, draw_real(self.batch))

    def _refine(self, images: Tensor) -> Tensor:
        parts = [self.refiner(part) for part in images.chunk(self.config.accumulate)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _update(self, name: str, part: Callable[..., tuple[Tensor, Metrics]], *batch: Tensor) -> Metrics:
        """One step of a network's optimiser down the mean loss of a batch, taken in ``config.accumulate`` parts.

        Args:
            name: "refiner" or "discriminator".
            part: from a part of each of ``batch``, equally large, to its mean loss and other means over it.
            batch: what the step is on.

        Returns:
            Those means over the whole batch, and the gradient's norm.
        """
        optimiser: torch.optim.Optimizer = getattr(self, f"{name}_optimiser")
        optimiser.zero_grad(set_to_none=True)
        count = self.config.accumulate
        seen: list[Metrics] = []
        for images in zip(*(whole.chunk(count) for whole in batch), strict=True):
            with autocast(self.precision, self.device):
                loss, metrics = part(*images)
            self._backward(name, loss / count if count > 1 else loss)
            seen.append({key: value.detach() for key, value in metrics.items()})
        means = {key: torch.stack([each[key] for each in seen]).mean(0) for key in seen[0]} if count > 1 else seen[0]
        return means | {f"gradient_{name}": self._step(optimiser, self.scales.get(name))}

    def _backward(self, name: str, loss: Tensor) -> None:
        scale = self.scales.get(name)
        (scale.scaled(loss) if scale else loss).backward()

    def _step(self, optimiser: torch.optim.Optimizer, scale: LossScale | None) -> Tensor:
        """Move the weights by their gradients; gives the gradient's norm."""
        gradients = [p.grad for p in optimiser.param_groups[0]["params"] if p.grad is not None]
        self.ranks.mean_(gradients)
        if scale is None:
            optimiser.step()
        else:
            scale.unscale(gradients)
            scale.step(optimiser)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return scale.left_out_is_zero(norm) if scale else norm

    # -- Algorithm 1 ---------------------------------------------------------------------------------------------

    def iteration(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """K_g updates of R, then K_d updates of D; returns the metrics of the last of each."""
        self.set_schedule()
        metrics = self.updates(draw_synthetic, draw_real)
        self.done["train"] += 1
        return metrics

    def updates(self, draw_synthetic: Draw, draw_real: Draw) -> Metrics:
        """The part of an iteration that needs nothing from the host: a CUDA graph can hold it."""
        metrics: Metrics = {}
        for _ in range(self.k_g):
            metrics |= self.update_refiner(draw_synthetic(self.batch))
            self._follow()
        for _ in range(self.config.k_d):
            metrics |= self.update_discriminator(draw_synthetic, draw_real)
        return metrics

    def adapt(self, accuracy: float) -> None:
        """With --k-g-max: take in D's accuracy in an iteration, and after each 20 let K_g follow their mean."""
        if not self.config.k_g_max:
            return
        self.accuracies.append(accuracy)
        if len(self.accuracies) < _WINDOW:
            return
        mean = sum(self.accuracies) / _WINDOW
        self.accuracies.clear()
        step = 1 if mean > _BAND[1] else -1 if mean < _BAND[0] else 0
        self.k_g = min(max(self.k_g + step, self.config.k_g), self.config.k_g_max)

    def decides(self, unread: int) -> bool:
        """With --k-g-max: whether K_g may change once ``unread`` more accuracies have gone to `adapt`."""
        return bool(self.config.k_g_max) and len(self.accuracies) + unread >= _WINDOW

    def images_drawn(self, k_g: int = 0) -> dict[str, int]:
        """How many synthetic and real images an iteration draws on this rank, with K_g as it is or as given."""
        of_discriminator = self.batch // 2 if self.history is not None else self.batch
        return {
            "synthetic": (k_g or self.k_g) * self.batch + self.config.k_d * of_discriminator,
            "real": self.config.k_d * self.batch,
        }

    def set_schedule(self) -> None:
        """Write this iteration's learning rates and the average's weight where `updates` reads them."""
        scale = self._learning_rate_scale()
        rates = self.config.learning_rate_refiner * scale, self.config.learning_rate_discriminator * scale
        # The average starts short, so that it does not remember the identity, and lengthens to `ema`.
        weight = 1 - min(self.config.ema, self.step / (self.step + 10))
        on_cuda = self.device.type == "cuda"
        # pinned: one copy that the host does not wait for
        self._schedule.copy_(torch.tensor([*rates, weight], pin_memory=on_cuda), non_blocking=on_cuda)
        if not on_cuda:
            for optimiser, rate in zip((self.refiner_optimiser, self.discriminator_optimiser), rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate

    def _learning_rate_scale(self) -> float:
        """Linearly up over the first `warm_up` steps, 1, and with --decay linearly to zero over the second half."""
        up = min(1.0, (self.step + 1) / (self.config.warm_up + 1))
        return min(up, 2 * (1 - self.step / self.config.steps)) if self.config.decay else up

    @torch.no_grad()
    def _follow(self, weight: float | None = None) -> None:
        """Move the average of R's weights towards R, by ``weight`` or by the schedule's."""
        average: list[Tensor] = list(self.average.parameters())
        refiner: list[Tensor] = list(self.refiner.parameters())
        if weight is not None:
            torch._foreach_lerp_(average, refiner, weight)
        else:
            weights = [self._schedule[2]] * len(average)
            torch._foreach_lerp_(average, refiner, weights)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an iteration reads or writes, by flat names; the histories of all ranks on the first.

        Every rank must call it. Beside them ``done``, ``k_g``, ``accuracies`` and the samplers decide what comes next.
        """
        tensors: dict[str, Tensor] = {}
        for name in ("refiner", "discriminator", "average"):
            tensors |= flatten(name, getattr(self, name).state_dict())
        for name, phase in _FIRST_STEPPED.items():
            # The hyper-parameters beside the state follow from the config and the step. Before its first step it has
            # none: zeros.
            if self.done[phase] or self.done["train"]:
                tensors |= flatten(name, getattr(self, name).state_dict()["state"])
        for name, scale in self.scales.items():
            tensors |= flatten(f"{name}_scale", scale.state_dict())
        if self.history is not None:
            for name, tensor in self.history.state_dict().items():
                for rank, part in enumerate(self.ranks.gather(tensor)):
                    tensors[f"history.{rank}.{name}"] = part
        return tensors

    def load_state(self, tensors: dict[str, Tensor], done: dict[str, int]) -> None:
        """Take over what `state` gave when ``done`` steps of each phase were behind it.

        In place, so that a CUDA graph of `updates` stays good (see `addresses`).
        """
        for name in ("refiner", "discriminator", "average"):
            module: nn.Module = getattr(self, name)
            module.load_state_dict(select(name, tensors))
        for name in _FIRST_STEPPED:
            optimiser: torch.optim.Optimizer = getattr(self, name)
            saved = select(name, tensors)
            for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
                for field, own in optimiser.state[parameter].items():
                    # each keeps its memory format: checkpoints are contiguous while weights are channels_last
                    own.copy_(saved[f"{index}.{field}"]) if saved else own.zero_()
        for name, scale in self.scales.items():
            scale.load_state_dict(select(f"{name}_scale", tensors))
        if self.history is not None:
            self.history.load_state_dict(select(f"history.{self.ranks.rank}", tensors))
        self.done = dict(done)

    def addresses(self) -> tuple[int, ...]:
        """Where all lives that `updates` reads and changes: a CUDA graph of it is good for as long as they stay."""
        tensors = [self._schedule]
        for module in (self.refiner, self.discriminator, self.average):
            tensors += module.parameters()
        for optimiser in (self.refiner_optimiser, self.discriminator_optimiser):
            tensors.append(optimiser.param_groups[0]["lr"])
            tensors += [tensor for state in optimiser.state.values() for tensor in state.values()]
        for scale in self.scales.values():
            tensors += scale.state_dict().values()
        if self.history is not None:
            tensors += self.history.state_dict().values()
        return tuple(tensor.data_ptr() for tensor in tensors)


def _adam(module: nn.Module, rate: float, rate_on_cuda: Tensor) -> torch.optim.Adam:
    # First moment 0.5: the usual choice for adversarial training, where gradients turn quickly. A learning rate in a
    # tensor can change while a CUDA graph is replayed.
    graph = rate_on_cuda.is_cuda
    lr = rate_on_cuda if graph else rate
    optimiser = torch.optim.Adam(module.parameters(), lr, betas=(0.5, 0.999), fused=True, capturable=graph)
    for parameter in module.parameters():
        # As Adam would make it at its first step. Were that step captured in a CUDA graph, each replay would begin with
        # making it: at step 1, for ever.
        optimiser.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def _grey_levels(refined: Tensor, synthetic: Tensor) -> Tensor:
    """Mean |R(x) - x| in 8-bit grey levels."""
    return (refined.detach() - synthetic).abs().mean() * 127.5
