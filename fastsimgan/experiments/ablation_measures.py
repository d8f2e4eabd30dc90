"""What is measured of each refiner of an ablation, and what the numbers say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastsimgan.experiments.ablation_tasks import Ablation, Task

DRIFT_IMAGES = 1000


@dataclass(frozen=True)
class Measure:
    """A number of one refiner: its column, and which way is better (None: shown only)."""

    title: str
    digits: int = 2
    better: Literal["lower", "higher"] | None = "lower"


MEASURES = {
    "patches": Measure("patches told apart %", 1),
    "detail": Measure("fine detail / real's", 2, None),
    "detail_off": Measure("fine detail off, octaves"),
    "kid": Measure("KID", 4),
    "drift_px": Measure("label drift px"),
    "loss_spread": Measure("spread of D's loss", 3),
}
TASK_MEASURES = {
    "eyes": {"within_7deg": Measure("within 7° %", 1, "higher"), "mean_deg": Measure("mean error °")},
    "hands": {"within_5px": Measure("within 5 px %", 1, "higher"), "mean_px": Measure("mean error px")},
}


def measure(task: Task, images: Any, held: dict[str, Any], seed: int, losses: list[float] | None) -> dict[str, Any]:
    """The measures of one refiner's ``images``, in the order of the synthetic ones; without ``losses``, of those."""
    from fastsimgan.metrics.features import random_features
    from fastsimgan.metrics.realism import high_frequency_energy, kernel_distance
    from fastsimgan.metrics.two_sample import patch_test

    unseen, real = images[held["synthetic"]], task.sets["real"]["images"][held["real"]]
    unseen = unseen[: len(real)]
    detail = high_frequency_energy(unseen) / high_frequency_energy(real)
    found: dict[str, Any] = {
        "patches": patch_test(unseen, real, kind=task.training.network, seed=seed),
        "detail": detail,
        "detail_off": abs(math.log2(detail)) if detail > 0 else math.inf,
        "kid": kernel_distance(random_features(unseen), random_features(real)),
        "drift_px": None,
        "loss_spread": None,
    }
    if losses is not None:
        which = np.flatnonzero(held["synthetic"])[:DRIFT_IMAGES]
        found["drift_px"] = task.drift(images[which], which)
        late = np.array(losses[len(losses) // 2 :])
        found["loss_spread"] = float(late.std() / late.mean())
    return found | task.score(images, seed)


def discriminator_losses(metrics: Path) -> list[float]:
    """D's loss at each iteration of Algorithm 1."""
    rows = (json.loads(line) for line in metrics.read_text().splitlines())
    return [row["loss_discriminator"] for row in rows if row["phase"] == "train" and "loss_discriminator" in row]


def over_seeds(values: list[float | None]) -> dict[str, Any] | None:
    """Mean, deviation and each, as `comparison.statistics` has them; None where the measure has no sense."""
    from fastsimgan.evaluation.comparison import statistics

    known = [{"value": value} for value in values if value is not None]
    return statistics(known)["value"] if len(known) == len(values) else None


def findings(rows: dict[str, Any], measures: dict[str, Measure], ablation: Ablation) -> list[str]:
    """One sentence a measure: which side is better, and whether that is shown."""
    from fastsimgan.metrics.statistics import difference_interval

    said = []
    for key, measure in measures.items():
        whole, without = rows[ablation.whole][key], rows[ablation.without][key]
        if measure.better is None or whole is None or without is None:
            continue
        text = (
            f"{measure.title} ({measure.better} is better): {ablation.whole} {whole['mean']:.{measure.digits}f}, "
            f"{ablation.without} {without['mean']:.{measure.digits}f}"
        )
        if len(whole["each"]) < 2:
            said.append(f"{text}. One seed: nothing shown.")
            continue
        difference, low, high = difference_interval(whole["each"], without["each"])
        if low <= 0 <= high:
            verdict = "no difference shown"
        elif (difference < 0) == (measure.better == "lower"):
            verdict = f"{ablation.whole} is better, as in the paper's {ablation.figure}"
        else:
            verdict = f"{ablation.without} is better: the other way round than the paper's {ablation.figure}"
        said.append(
            f"{text}; difference {difference:+.{measure.digits}f}, 95 % interval {low:+.{measure.digits}f} to "
            f"{high:+.{measure.digits}f} (Welch). {verdict[0].upper()}{verdict[1:]}."
        )
    return said
