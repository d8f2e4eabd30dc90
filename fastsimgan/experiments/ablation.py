"""`python -m fastsimgan.experiments ablation-local | ablation-history`: numbers where the paper has pictures.

Fig. 8 sets the local adversarial loss against a global one, Fig. 9 a history of refined images against none. Here both
sides are trained with several seeds and measured: on images that no refiner saw, and by the task networks they train.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsimgan import cli
from fastsimgan.experiments.ablation_tasks import AblationConfig
from fastsimgan.experiments.cached_step import (
    cached,
    check_counts,
    check_installed,
    check_sets,
    claim,
    refined_by,
    versions,
    write_report,
)

if TYPE_CHECKING:
    from fastsimgan.config import TrainConfig
    from fastsimgan.experiments.ablation_tasks import Task

    pass

HELD_OUT = 3  # one image in so many is kept from the refiners, for the tests that tell refined from real ones
DESCRIPTION = """Train refiners with and without one part of the method, several seeds each, measure their images, and
write report.html and report.json. The same command goes on after a kill: every finished piece is kept in --out, and
another experiment's pieces are refused."""


def main(argv: Sequence[str] | None, name: str) -> int:
    """Parse and run the ablation of that ``name``; return the exit code."""
    given = list(sys.argv[2:] if argv is None else argv)
    prog = f"python -m fastsimgan.experiments {name}"

    def command(config: AblationConfig) -> None:
        run(config, name, f"{prog} {shlex.join(given)}")

    return cli.run(command, AblationConfig, prog=prog, description=DESCRIPTION, argv=given)


def run(config: AblationConfig, name: str, command: str) -> dict[str, Any]:
    """The experiment on parsed settings.

    Args:
        config: settings.
        name: which of `ABLATIONS`.
        command: how it was called, for the report.

    Returns:
        What report.json holds.

    Raises:
        InputError: a setting or a file breaks a rule, or --out holds another experiment.
    """
    check_sets(config, config.data)
    check_counts(config, "seeds", "steps", "judge_steps")
    check_installed(config.seeds)
    from fastsimgan.experiments.ablation_measures import MEASURES, TASK_MEASURES, findings, over_seeds
    from fastsimgan.experiments.ablation_report import draw, page
    from fastsimgan.experiments.ablation_tasks import ABLATIONS, eye_task, hand_task, without

    ablation = ABLATIONS[name]
    task = eye_task(config) if config.data == "eyes" else hand_task(config)
    task.training.validate()
    variants = {
        ablation.whole: task.training,
        ablation.without: without(name, task.training, task.sets["synthetic"]["images"].shape),
    }
    identity = claim(
        config.out,
        {
            "experiment": name,
            "data": config.data,
            "data_sha256": task.hashes,
            "training": {each: dataclasses.asdict(one) | {"out": None} for each, one in variants.items()},
            "judge": dataclasses.asdict(task.judge),
            "seeds": config.seeds,
            "quick": config.quick,
        },
    )
    held = _held_out(task)
    results, first = _refine_and_measure(config, task, variants, held)
    measures = MEASURES | TASK_MEASURES[config.data]
    numbers = {
        "command": command,
        "versions": versions(),
        **identity,
        "counts": {each: len(part["images"]) for each, part in task.sets.items()},
        "rows": {
            each: {key: over_seeds([one[key] for one in ones]) for key in measures} for each, ones in results.items()
        },
    }
    numbers["findings"] = findings(numbers["rows"], measures, ablation)
    print("\n".join(numbers["findings"]))
    draw(config.out, task, {each: one.images for each, one in first.items()}, held)
    losses = {each: one.losses for each, one in first.items()}
    write_report(config.out, page(numbers, config, ablation, measures, losses, HELD_OUT), numbers)
    return numbers


@dataclass(frozen=True)
class _Refined:
    """One refiner's images, in the order of the synthetic ones, and its discriminator's losses."""

    images: Any
    losses: list[float]


def _held_out(task: Task) -> dict[str, Any]:
    """Which synthetic and which real images no refiner is trained on: bool ``[N]`` each."""
    import numpy as np

    rng = np.random.default_rng(0)
    held = {}
    for name in ("synthetic", "real"):
        images = task.sets[name]["images"]
        held[name] = np.zeros(len(images), bool)
        held[name][rng.permutation(len(images))[: len(images) // HELD_OUT]] = True
    return held


def _refine_and_measure(
    config: AblationConfig, task: Task, variants: dict[str, TrainConfig], held: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, _Refined]]:
    """Each refiner trained and measured, each kept: all measures by kind, and what seed 0 made of each."""
    from fastsimgan.experiments.ablation_measures import discriminator_losses, measure

    synthetic, real = task.sets["synthetic"]["images"], task.sets["real"]["images"]
    seen = synthetic[~held["synthetic"]], real[~held["real"]]
    results: dict[str, list[dict[str, Any]]] = {"synthetic": [], **{each: [] for each in variants}}
    first: dict[str, _Refined] = {}
    for seed in range(config.seeds):
        cli.LOG.info(f"seed {seed} of {config.seeds}: synthetic")
        work = partial(measure, task, synthetic, held, seed, None)
        results["synthetic"].append(cached(config.out, f"measured-synthetic-{seed}", work))
        for each, training in variants.items():
            cli.LOG.info(f"seed {seed} of {config.seeds}: {each}")
            label = f"{each}-{seed}".replace(" ", "-")
            images = refined_by(config.out, label, dataclasses.replace(training, seed=seed), *seen, synthetic)
            losses = discriminator_losses(config.out / f"refiner-{label}" / "metrics.jsonl")
            if seed == 0:
                first[each] = _Refined(images, losses)
            work = partial(measure, task, images, held, seed, losses)
            results[each].append(cached(config.out, f"measured-{label}", work))
    return results, first
