"""An ablation's settings, what it takes out, and what it is measured on: eyes and gaze networks, or hands and poses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastsimgan.config import TrainConfig


@dataclass(frozen=True)
class Ablation:
    """What is taken out, and how both sides are called in a report."""

    title: str
    figure: str
    whole: str
    without: str


ABLATIONS = {
    "ablation-local": Ablation("Local or global adversarial loss?", "Fig. 8", "local", "global"),
    "ablation-history": Ablation("A history of refined images, or none?", "Fig. 9", "history", "no history"),
}


@dataclass(frozen=True)
class AblationConfig:
    """Settings of the experiment."""

    out: Path
    """Folder of the experiment."""
    data: Literal["eyes", "hands"] = "eyes"
    """What is refined; it decides about the networks, the task and the built-in images."""
    synthetic: Path | None = None
    """Synthetic images with `pitch_yaw` or `joints` (.npz). Left out with the others: the built-in ones."""
    real: Path | None = None
    """Real images (.npz or .npy); training the refiner reads no label of theirs."""
    validation: Path | None = None
    """Labelled real images to test the task networks on (.npz), none of them in --real."""
    seeds: int = 3
    """Refiners of each kind, and task networks trained on the images of each."""
    quick: bool = False
    """Preset quick, half of the gaze networks' steps, small hands: a look, not a result."""
    steps: int | None = None
    """Iterations of each refiner; default the preset's."""
    judge_steps: int | None = None
    """Steps of each task network; default as in the experiments gaze and hand."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""


@dataclass(frozen=True)
class Task:
    """Data and judge of one kind; ``score`` takes images for all of the synthetic labels and a seed; ``drift`` takes
    refined images and which of the synthetic ones they are, and gives pixels."""

    sets: dict[str, dict[str, Any]]
    hashes: dict[str, str]
    training: TrainConfig
    judge: Any
    score: Callable[[Any, int], dict[str, float]]
    drift: Callable[[Any, Any], float | None]


def eye_task(config: AblationConfig) -> Task:
    """The gaze experiment's data, training and judge."""
    import torch

    from fastsimgan.evaluation.task_network import summarise, train_and_predict
    from fastsimgan.experiments.gaze import gaze_settings, labelled_eyes, read_eyes
    from fastsimgan.hardware.device import choose_device
    from fastsimgan.metrics.label_drift import label_drift

    arrays, hashes = read_eyes(config)
    sets = labelled_eyes(arrays)
    training, judge = gaze_settings(config)
    validation = sets["validation"]

    def score(images: Any, seed: int) -> dict[str, float]:
        part = dataclasses.replace(sets["synthetic"], images=images)
        device: torch.device = choose_device(config.device)
        found = train_and_predict(part, validation.images, classes=0, seed=seed, judge=judge, device=device)
        return summarise("gaze", found, validation.labels)

    def drift(refined: Any, which: Any) -> float | None:
        found = label_drift(sets["synthetic"].images[which], refined)
        moved = found["pupil_px"] if found["pupil_found"] >= 0.5 else found["edges_px"]
        return None if moved is None else moved["median"]

    return Task(arrays, hashes, training, judge, score, drift)


def hand_task(config: AblationConfig) -> Task:
    """The hand experiment's."""
    import numpy as np

    from fastsimgan.evaluation.pose_network import train_and_find_joints
    from fastsimgan.experiments.hand import evaluated_joints, hand_settings, read_hands
    from fastsimgan.experiments.hand_report import PAPER_SIZE
    from fastsimgan.hardware.device import choose_device
    from fastsimgan.metrics.depth_edges import joint_edge_shifts
    from fastsimgan.metrics.joints import joint_errors, share_within

    sets, hashes = read_hands(config)
    joints = evaluated_joints(sets)
    training, judge = hand_settings(config, sets)
    tested = sets["validation"]["images"]
    unit = max(tested.shape[1:]) / PAPER_SIZE

    def score(images: Any, seed: int) -> dict[str, float]:
        device = choose_device(config.device)
        found = train_and_find_joints(images, joints["synthetic"], tested, seed=seed, judge=judge, device=device)
        errors = joint_errors(found, joints["validation"]) / unit
        return {"within_5px": float(share_within(errors, np.array([5.0]))[0]), "mean_px": float(errors.mean())}

    def drift(refined: Any, which: Any) -> float | None:
        moved = joint_edge_shifts(sets["synthetic"]["images"][which], refined, joints["synthetic"][which])
        known = moved[np.isfinite(moved)]
        return float(np.median(known)) if len(known) else None

    return Task(sets, hashes, training, judge, score, drift)


def without(name: str, training: TrainConfig, shape: tuple[int, ...]) -> TrainConfig:
    """``training`` without the part that this ablation takes out, for images of that stored ``shape``."""
    import torch

    from fastsimgan.models.discriminator import Discriminator

    if name == "ablation-history":
        return dataclasses.replace(training, history=0)
    channels = 1 if len(shape) == 3 else shape[3]
    with torch.device("meta"):
        logits = Discriminator(channels, kind=training.network)(torch.empty(1, channels, *shape[1:3]))
    # Both losses are sums over patches (§2.2): with λ over as many, one global answer weighs as all local ones did.
    return dataclasses.replace(training, local=False, lam=training.lam / logits[0, 0].numel())
