"""`python -m fastsimgan.experiments gaze`: gaze networks trained on rendered and on refined eyes (§3.1.3)."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsimgan import cli
from fastsimgan.errors import InputError
from fastsimgan.experiments.cached_step import (
    SETS,
    cached,
    cached_array,
    check_counts,
    check_installed,
    check_sets,
    claim,
    hash_sets,
    read_sets,
    refined_by,
    versions,
    write_report,
)

if TYPE_CHECKING:
    from fastsimgan.config import TrainConfig
    from fastsimgan.evaluation.task_network import Judge, Labelled

DESCRIPTION = """Train refiners, refine the synthetic eyes, train gaze networks on synthetic, equalised and refined
eyes, test them on labelled real ones, and write report.html and report.json. The same command goes on after a kill:
every finished piece is kept in --out, and another experiment's pieces are refused."""

REFINERS = 4  # of the x4 row, as the paper's x4 is four times the data
DRIFT_IMAGES = 1000


@dataclass(frozen=True)
class GazeConfig:
    """Settings of the experiment."""

    out: Path
    """Folder of the experiment."""
    synthetic: Path | None = None
    """Synthetic eyes with `pitch_yaw` (.npz). Left out with the others: the built-in eyes."""
    real: Path | None = None
    """Real eyes (.npz or .npy); training the refiner reads no label of theirs."""
    validation: Path | None = None
    """Labelled real eyes to test on (.npz), none of them in --real."""
    seeds: int = 5
    """Gaze networks trained on each set."""
    quick: bool = False
    """Preset quick, half of the gaze networks' steps, one refiner, no supervised ceiling: a look, not a result."""
    steps: int | None = None
    """Iterations of each refiner; default the preset's."""
    judge_steps: int | None = None
    """Steps of each gaze network; default 600, with --quick 300."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code."""
    given = list(sys.argv[2:] if argv is None else argv)
    prog = "python -m fastsimgan.experiments gaze"

    def command(config: GazeConfig) -> None:
        run(config, f"{prog} {shlex.join(given)}")

    return cli.run(command, GazeConfig, prog=prog, description=DESCRIPTION, argv=given)


def run(config: GazeConfig, command: str) -> dict[str, Any]:
    """The experiment on parsed settings.

    Args:
        config: settings.
        command: how it was called, for the report.

    Returns:
        What report.json holds.

    Raises:
        InputError: a setting or a file breaks a rule, or --out holds another experiment.
    """
    check_sets(config, "eyes")
    check_counts(config, "seeds", "steps", "judge_steps")
    check_installed(config.seeds)
    from fastsimgan.experiments.gaze_report import page

    arrays, hashes = read_eyes(config)
    sets = labelled_eyes(arrays)
    training, judge = gaze_settings(config)
    training.validate()
    identity = claim(
        config.out,
        {
            "experiment": "gaze",
            "data_sha256": hashes,
            "training": dataclasses.asdict(training) | {"out": None},
            "judge": dataclasses.asdict(judge),
            "seeds": config.seeds,
            "quick": config.quick,
        },
    )

    synthetic, real = sets["synthetic"], arrays["real"]["images"]
    refined = [
        refined_by(config.out, str(seed), dataclasses.replace(training, seed=seed), synthetic.images, real)
        for seed in range(1 if config.quick else REFINERS)
    ]  # each [N, H, W]
    trained = _sets(synthetic, refined, arrays["real"], config.quick)
    result = cached(config.out, "comparison", lambda: _compare(trained, sets["validation"], config, judge))
    drift = cached(config.out, "drift", lambda: _drift(config.out, synthetic, refined[0], judge))
    realism = cached(config.out, "realism", lambda: _realism(synthetic.images, refined[0], real))

    numbers = {
        "command": command,
        "versions": versions(),
        **identity,
        "counts": {name: len(part["images"]) for name, part in arrays.items()},
        "comparison": result,
        "drift": drift,
        "realism": realism,
    }
    write_report(config.out, page(numbers, config.out, config.synthetic is None), numbers)
    return numbers


def read_eyes(config: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The three sets as arrays, and the SHA-256 of each: of its file, or of the built-in arrays' bytes."""
    from fastsimgan.data.simulators.builtin import builtin_pair, builtin_validation

    if config.synthetic is not None:
        return read_sets(config)
    parts = dict(zip(SETS, (*builtin_pair(0), builtin_validation(0)), strict=True))
    return parts, hash_sets(parts, "images", "pitch_yaw")


def gaze_settings(config: Any) -> tuple[TrainConfig, Judge]:
    """How the refiners and the gaze networks are trained; ``config`` is this experiment's or an ablation's."""
    from fastsimgan.config import preset
    from fastsimgan.evaluation.task_network import Judge

    training = preset("quick" if config.quick or config.synthetic is None else "gaze", device=config.device)
    if config.steps is not None:
        training = dataclasses.replace(training, steps=config.steps)
    return training, Judge(steps=config.judge_steps or (300 if config.quick else Judge.steps))


def labelled_eyes(arrays: dict[str, dict[str, Any]]) -> dict[str, Labelled]:
    """The synthetic set and the validation set; InputError if one has no gaze."""
    from fastsimgan.evaluation.task_network import Labelled

    sets = {name: Labelled.from_arrays(arrays[name], name) for name in ("synthetic", "validation")}
    for name, part in sets.items():
        if part.task != "gaze":
            raise InputError(f"{name}: must hold pitch_yaw, got {part.task} labels")
    return sets


def _sets(synthetic: Labelled, refined: list[Any], real: dict[str, Any], quick: bool) -> dict[str, Labelled]:
    """What gaze networks are trained on, by name."""
    import numpy as np

    from fastsimgan.evaluation.comparison import equalised
    from fastsimgan.evaluation.task_network import Labelled

    sets = {"synthetic": synthetic}
    if synthetic.images.ndim == 3 and synthetic.images.dtype != np.float32:
        sets["equalised"] = equalised(synthetic)
    sets["refined"] = dataclasses.replace(synthetic, images=refined[0])
    if len(refined) > 1:
        images, labels = np.concatenate(refined), np.tile(synthetic.labels, (len(refined), 1))
        several = dataclasses.replace(synthetic, images=images, labels=labels)
        sets[f"refined ×{len(refined)}"] = several
        if "equalised" in sets:  # another cheap step towards the real look, whose errors differ from a refiner's
            together = [(part.images, part.labels) for part in (several, sets["equalised"])]
            images, labels = (np.concatenate(each) for each in zip(*together, strict=True))
            sets[f"refined ×{len(refined)} equalised"] = dataclasses.replace(synthetic, images=images, labels=labels)
    if "pitch_yaw" in real and not quick:
        sets["supervised"] = Labelled.from_arrays(real, "real")
    return sets


def _compare(sets: dict[str, Labelled], real: Labelled, config: GazeConfig, judge: Any) -> dict[str, Any]:
    import numpy as np

    from fastsimgan.data.gaze_angles import pitch_yaw
    from fastsimgan.evaluation.comparison import compare
    from fastsimgan.evaluation.tables import table
    from fastsimgan.metrics.gaze_error import angular_errors

    def keep(name: str, work: Callable[[], Any]) -> Any:
        return cached_array(config.out, f"predicted-{name}", work)

    result, predictions = compare(sets, real, seeds=config.seeds, judge=judge, device=config.device, keep=keep)
    print(table(result))
    degrees = np.linspace(0, 25, 101)
    result["degrees"] = degrees.tolist()
    result["within"] = {
        name: ((angular_errors(pitch_yaw(each), real.labels)[:, None] <= degrees).mean(0) * 100).tolist()
        for name, each in predictions.items()
    }
    return result


def _drift(out: Path, synthetic: Labelled, refined: Any, judge: Any) -> dict[str, Any]:
    """How far some of the images moved, by themselves and to a gaze network that saw all; moved_most.png shows it."""
    import numpy as np

    from fastsimgan.data.pixel_values import from_float, to_float
    from fastsimgan.evaluation.gaze_drift import gaze_drift
    from fastsimgan.metrics.label_drift import describe, label_drift
    from fastsimgan.reporting.contact_sheet import save_rows

    chosen = np.sort(np.random.default_rng(0).permutation(len(refined))[:DRIFT_IMAGES])
    pairs = {"synthetic": synthetic.images[chosen], "refined": refined[chosen]}
    drift = label_drift(*pairs.values())
    moved = gaze_drift(synthetic, *pairs.values(), judge=judge)
    drift["gaze_deg"] = {"median": float(np.median(moved)), "p90": float(np.quantile(moved, 0.9))}
    drift["text"] = describe(drift)
    rows = {name: from_float(to_float(each[drift["worst"]]), "uint8") for name, each in pairs.items()}
    save_rows(out / "moved_most.png", rows)
    return drift


def _realism(synthetic: Any, refined: Any, real: Any) -> dict[str, Any]:
    from fastsimgan.metrics.realism import realism

    sets = {"synthetic": synthetic, "refined": refined}
    return {name: dataclasses.asdict(realism(images, real)) for name, images in sets.items()}
