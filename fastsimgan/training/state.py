"""All that training restores in one object: weights, optimisers, history, samplers, counters and the best refiner."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsimgan.config import TrainConfig
from fastsimgan.hardware.device import channels_last
from fastsimgan.models.discriminator import Discriminator
from fastsimgan.models.refiner import RefinerNetwork
from fastsimgan.storage.checkpoint import flatten, select
from fastsimgan.training.batches import TrainingBatches
from fastsimgan.training.data_parallel import DataParallelGroup
from fastsimgan.training.history_buffer import HistoryBuffer
from fastsimgan.training.loss_scale import LossScale
from fastsimgan.training.optimisers import Schedule, load_moments

PHASES = ("pretrain_refiner", "pretrain_discriminator", "train")
"""R alone, D alone, Algorithm 1."""

#: the optimisers, and the phase before "train" in which each takes steps
_FIRST_STEPPED = {"refiner_optimiser": "pretrain_refiner", "discriminator_optimiser": "pretrain_discriminator"}

#: the networks, under the names that checkpoints have for them
_NETWORKS = {"refiner": "refiner", "discriminator": "discriminator", "average": "ema"}


@dataclass(frozen=True)
class Facts:
    """What a checkpoint holds beside tensors, in the order of its file."""

    done: dict[str, int]
    """Steps of each of `PHASES` behind it."""
    k_g: int
    accuracies: list[float]
    """D's, since K_g was last thought about."""
    attempt: int
    """How often the run has been rolled back, which decides about the order of the images."""
    positions: dict[str, int]
    """How far each set of images has been drawn."""
    ranks: int
    """Processes that trained."""
    data: dict[str, str]
    """SHA-256 of each set of images."""
    best: dict[str, float] | None
    drifted: bool
    settings: dict[str, Any] = field(default_factory=dict)
    """`TrainConfig.decisive`: an edited ``config.json`` is found by it."""


@dataclass(frozen=True)
class StateDict:
    """What `TrainingState.state_dict` gives: tensors by flat names, and the rest."""

    tensors: dict[str, Tensor] = field(repr=False)
    facts: Facts

    def clone(self) -> StateDict:
        """A copy in memory of its own, which training does not touch."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return StateDict(tensors, copy.deepcopy(self.facts))


class TrainingState:
    """All that decides what comes next in a run, and how far it is. Nothing else is restored from a checkpoint.

    Args:
        config: validated settings.
        image_shape: (C, H, W) of the images trained on.
        device: where it all lives.
        group: the processes that share each batch; each keeps a history of its own, the rest is equal on all.
        precision: of the networks: "float32", "bfloat16" or "float16".
        batches: whose samplers' positions are part of the state; None where images come from elsewhere.

    Attributes:
        refiner, discriminator: R and D.
        ema: the moving average of R's weights, which is what is saved as the refiner.
        refiner_optimiser, discriminator_optimiser, schedule: what moves them.
        scales: loss scales of R and D by name, in float16 alone.
        history: of refined images, or None.
        done: steps of each of `PHASES` behind us.
        k_g: updates of R in an iteration.
        accuracies: D's, since K_g was last thought about.
        attempt: how often this run has been rolled back.
        best: ``step``, ``kid`` and ``drift_px`` of the best refiner so far; None before the first evaluation within
            --max-drift.
        best_refiner: it.
        drifted: whether an evaluation was beyond --max-drift, so that training is over.
    """

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, int, int],
        device: torch.device,
        group: DataParallelGroup | None = None,
        precision: str = "float32",
        batches: TrainingBatches | None = None,
    ) -> None:
        torch.manual_seed(config.seed)  # the weights are the only thing drawn from torch's global generator
        self.config, self.device, self.precision = config, device, precision
        self.group = group or DataParallelGroup()
        self.image_shape = image_shape
        self._batches = batches

        channels = image_shape[0]
        first_kernel = 7 if config.network == "hand" else 3
        refiner = RefinerNetwork(
            channels,
            hidden_channels=config.hidden_channels,
            blocks=config.blocks,
            first_kernel=first_kernel,
            computes=config.computes,
        )
        refiner.recompute, refiner.impl = config.recompute, config.impl
        self.refiner = channels_last(refiner, device)
        self.discriminator = channels_last(Discriminator(channels, kind=config.network, local=config.local), device)
        self.ema = copy.deepcopy(self.refiner).requires_grad_(False)

        self.schedule = Schedule(config, device)
        self.refiner_optimiser = self.schedule.adam(self.refiner, 0)
        self.discriminator_optimiser = self.schedule.adam(self.discriminator, 1)
        half = precision == "float16"
        self.scales = {name: LossScale(device) for name in ("refiner", "discriminator")} if half else {}
        self.history: HistoryBuffer | None = None
        if config.history:
            self.history = HistoryBuffer(
                capacity=config.history // self.group.size,
                image_shape=image_shape,
                dtype=torch.uint8,
                device=device,
                seed=self.group.seed(config.seed),
                impl=config.impl,
            )

        self.done = dict.fromkeys(PHASES, 0)
        self.k_g = config.k_g
        self.accuracies: list[float] = []
        self.attempt = 0
        self.best: dict[str, float] | None = None
        self.best_refiner: RefinerNetwork = self.ema
        self.drifted = False

    # -- how far it is -----------------------------------------------------------------------------------------------

    @property
    def batches(self) -> TrainingBatches:
        """The images that are trained on."""
        assert self._batches is not None, "this state was made without images"
        return self._batches

    @property
    def batch(self) -> int:
        """This process's share of a mini-batch."""
        return self.config.batch_size // self.group.size

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

    def positions(self) -> dict[str, int]:
        """How far each set of images has been drawn."""
        return self._batches.positions() if self._batches else {}

    # -- saved and restored ------------------------------------------------------------------------------------------

    def state_dict(self, *, gather: bool = True) -> StateDict:
        """All of it, sharing memory with what goes on: save or clone it.

        Args:
            gather: with the histories of all processes on the first, for which each must call it. Without, each has its
                own.
        """
        tensors: dict[str, Tensor] = {}
        for name, attribute in _NETWORKS.items():
            tensors |= flatten(name, getattr(self, attribute).state_dict())
        for name, phase in _FIRST_STEPPED.items():
            # The hyper-parameters beside the state follow from the config and the step. Before its first step it has
            # none: zeros.
            if self.done[phase] or self.done["train"]:
                tensors |= flatten(name, getattr(self, name).state_dict()["state"])
        for name, scale in self.scales.items():
            tensors |= flatten(f"{name}_scale", scale.state_dict())
        for name, tensor in self.history.state_dict().items() if self.history is not None else ():
            for rank, part in enumerate(self.group.gather(tensor)) if gather else [(self.group.rank, tensor)]:
                tensors[f"history.{rank}.{name}"] = part
        if self.best is not None:
            tensors |= flatten("best", self.best_refiner.state_dict())
        facts = Facts(
            done=self.done,
            k_g=self.k_g,
            accuracies=self.accuracies,
            attempt=self.attempt,
            positions=self.positions(),
            ranks=self.group.size,
            data=self._batches.hashes if self._batches else {},
            best=self.best,
            drifted=self.drifted,
            settings=self.config.decisive(),
        )
        return StateDict(tensors, facts)

    def load_state_dict(self, state: StateDict) -> None:
        """Take over what `state_dict` gave, in place, so that a CUDA graph of updates stays good (see `addresses`).

        ``ranks`` and ``data`` are not looked at: who restores has compared them.
        """
        tensors, facts = state.tensors, copy.deepcopy(state.facts)
        for name, attribute in _NETWORKS.items():
            module: nn.Module = getattr(self, attribute)
            module.load_state_dict(select(name, tensors))
        for name in _FIRST_STEPPED:
            load_moments(getattr(self, name), select(name, tensors))
        for name, scale in self.scales.items():
            scale.load_state_dict(select(f"{name}_scale", tensors))
        if self.history is not None:
            self.history.load_state_dict(select(f"history.{self.group.rank}", tensors))
        self.done, self.k_g, self.accuracies = facts.done, facts.k_g, facts.accuracies
        self.best, self.drifted = facts.best, facts.drifted
        if self.best is not None:
            self.best_refiner = copy.deepcopy(self.ema)
            self.best_refiner.load_state_dict(select("best", tensors))
        self.attempt = facts.attempt
        if self._batches:
            self._batches.restart(facts.positions, self.attempt)

    def reorder(self, attempt: int) -> None:
        """Go on with the images in the order number ``attempt``, from where they are."""
        self.attempt = attempt
        self.batches.restart(self.positions(), attempt)

    def copy(self) -> TrainingState:
        """The same state in memory of its own, where the images are shared: what it draws moves both."""
        other = TrainingState(self.config, self.image_shape, self.device, self.group, self.precision, self._batches)
        other.load_state_dict(self.state_dict(gather=False))
        return other

    def addresses(self) -> tuple[int, ...]:
        """Where all lives that updates read and change: a CUDA graph of them is good for as long as it stays."""
        tensors = [self.schedule.tensor]
        for module in (self.refiner, self.discriminator, self.ema):
            tensors += module.parameters()
        for optimiser in (self.refiner_optimiser, self.discriminator_optimiser):
            tensors.append(optimiser.param_groups[0]["lr"])
            tensors += [tensor for state in optimiser.state.values() for tensor in state.values()]
        for scale in self.scales.values():
            tensors += scale.state_dict().values()
        if self.history is not None:
            tensors += self.history.state_dict().values()
        return tuple(tensor.data_ptr() for tensor in tensors)
