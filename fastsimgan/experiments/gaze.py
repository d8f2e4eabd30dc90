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
    array_piece,
    check_counts,
    check_sets,
    claim,
    hash_sets,
    piece,
    read_sets,
    refined_by,
    versions,
    write_report,
)

if TYPE_CHECKING:
    from fastsimgan.evaluation.task_network import Labelled
    from fastsimgan.reporting.html_report import Report

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
    import numpy as np

    from fastsimgan.config import preset
    from fastsimgan.evaluation.task_network import Judge, Labelled

    arrays, hashes = read_eyes(config)
    sets = {name: Labelled.from_arrays(arrays[name], name) for name in ("synthetic", "validation")}
    for name, part in sets.items():
        if part.task != "gaze":
            raise InputError(f"{name}: must hold pitch_yaw, got {part.task} labels")
    builtin = config.synthetic is None
    training = preset("quick" if config.quick or builtin else "gaze", device=config.device)
    if config.steps is not None:
        training = dataclasses.replace(training, steps=config.steps)
    training.validate()
    judge = Judge(steps=config.judge_steps or (300 if config.quick else Judge.steps))
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
    result = piece(config.out, "comparison", lambda: _compare(trained, sets["validation"], config, judge))
    chosen = np.sort(np.random.default_rng(0).permutation(len(refined[0]))[:DRIFT_IMAGES])
    some = dataclasses.replace(synthetic, images=synthetic.images[chosen], labels=synthetic.labels[chosen])
    drift = piece(config.out, "drift", lambda: _drift(config.out, synthetic, some, refined[0][chosen], judge))
    realism = piece(config.out, "realism", lambda: _realism(synthetic.images, refined[0], real))

    numbers = {
        "command": command,
        "versions": versions(),
        **identity,
        "counts": {name: len(part["images"]) for name, part in arrays.items()},
        "comparison": result,
        "drift": drift,
        "realism": realism,
    }
    write_report(config.out, _page(numbers, config.out, builtin), numbers)
    return numbers


def read_eyes(config: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The three sets as arrays, and the SHA-256 of each: of its file, or of the built-in arrays' bytes."""
    from fastsimgan.data.simulators.builtin import builtin_pair, builtin_validation

    if config.synthetic is not None:
        return read_sets(config)
    parts = dict(zip(SETS, (*builtin_pair(0), builtin_validation(0)), strict=True))
    return parts, hash_sets(parts, "images", "pitch_yaw")


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
        return array_piece(config.out, f"predicted-{name}", work)

    result, predictions = compare(sets, real, seeds=config.seeds, judge=judge, device=config.device, keep=keep)
    print(table(result))
    degrees = np.linspace(0, 25, 101)
    result["degrees"] = degrees.tolist()
    result["within"] = {
        name: ((angular_errors(pitch_yaw(each), real.labels)[:, None] <= degrees).mean(0) * 100).tolist()
        for name, each in predictions.items()
    }
    return result


def _drift(out: Path, synthetic: Labelled, some: Labelled, refined: Any, judge: Any) -> dict[str, Any]:
    import numpy as np

    from fastsimgan.data.pixel_values import from_float, to_float
    from fastsimgan.evaluation.gaze_drift import gaze_drift
    from fastsimgan.metrics.label_drift import describe, label_drift
    from fastsimgan.reporting.contact_sheet import save_rows

    drift = label_drift(some.images, refined)
    moved = gaze_drift(synthetic, some.images, refined, judge=judge)
    drift["gaze_deg"] = {"median": float(np.median(moved)), "p90": float(np.quantile(moved, 0.9))}
    drift["text"] = describe(drift)
    pairs = {"synthetic": some.images, "refined": refined}
    rows = {name: from_float(to_float(each[drift["worst"]]), "uint8") for name, each in pairs.items()}
    save_rows(out / "moved_most.png", rows)
    return drift


def _realism(synthetic: Any, refined: Any, real: Any) -> dict[str, Any]:
    from fastsimgan.metrics.realism import realism

    return {name: realism(images, real) for name, images in (("synthetic", synthetic), ("refined", refined))}


def _page(numbers: dict[str, Any], out: Path, builtin: bool) -> Report:
    import numpy as np

    from fastsimgan.reporting.html_report import Report, interval

    result, counts, drift = numbers["comparison"], numbers["counts"], numbers["drift"]
    rows, seeds = result["rows"], result["seeds"]
    report = Report("Gaze: do refined eyes train a better model?")
    report.paragraph(
        f"{counts['synthetic']} synthetic eyes, refined against {counts['real']} "
        f"{'simulated stand-ins for real ones' if builtin else 'real ones'}; gaze networks tested on "
        f"{counts['validation']} others. {seeds} network(s) a set, {result['steps']} steps of {result['batch_size']}."
        + (" A quick look: too few steps for a result." if numbers["quick"] else "")
    )
    if builtin:
        report.paragraph("Both sides are simulated here: this shows that the machinery works, not that real eyes gain.")
    spread = "± is half of the 95 % interval of the mean over the seeds (Student's t)." if seeds > 1 else "One seed."
    report.heading("Within 7° (the paper's Table 2), mean error (the form of Table 3)")
    columns = {
        "within_7deg": "within 7° %",
        "mean_deg": "mean error °",
        "bias_pitch_deg": "bias pitch °",
        "bias_yaw_deg": "bias yaw °",
        "bias_free_mean_deg": "bias-free error °",
        "bias_free_within_7deg": "bias-free within 7° %",
    }
    report.table(
        ["trained on", *columns.values()],
        [[name, *(interval(row[key], name == "constant") for key in columns)] for name, row in rows.items()],
    )
    report.paragraph(
        f"{spread} Constant: the mean synthetic gaze for every image. Bias: mean of predicted minus true; bias-free: "
        "with it taken out, which nobody has without labels. ×N: the synthetic set refined by N refiners "
        "(seeds 0, 1, ...), labels kept; with the word equalised, those and the equalised synthetic set. Supervised: "
        "trained on the real set's labels, which no refiner saw. "
        "All gaze networks take equally many steps. The intervals are over the gaze networks' seeds alone, not over "
        "refiners or people."
    )
    for name, found in result["differences"].items():
        report.paragraph(
            f"Refined is above {name} by {found['difference']:+.1f} points within 7°, 95 % interval "
            f"{found['low']:+.1f} to {found['high']:+.1f} (Welch)."
        )
    report.heading("Cumulative curve (Fig. 7)")
    degrees = np.array(result["degrees"])
    report.curves(
        {name: (degrees, np.array(share)) for name, share in result["within"].items()},
        "angular error, degrees",
        "test images within it, %",
        "Each curve is of the predictions averaged over the seeds.",
    )
    report.heading("Pictures")
    report.picture((out / "refiner-0" / "contact_sheet.png").read_bytes(), "Refiner of seed 0, as training left it")
    report.heading("Did the labels stay true?")
    angle = drift["gaze_deg"]
    report.paragraph(
        f"{drift['images']} images: {drift['text']}. A gaze network trained on the synthetic images changes its answer "
        f"by {angle['median']:.1f}° (median; 90 % within {angle['p90']:.1f}°); the new look has its share in that."
    )
    report.picture((out / "moved_most.png").read_bytes(), "The eight images that moved most")
    report.heading("Do they look real?")
    report.table(
        ["against the real images", "KID", "Fréchet", "told apart %", "95 % interval"],
        [
            [
                name,
                f"{row['kid']:.4f}",
                f"{row['frechet']:.4f}",
                f"{row['c2st']['accuracy']:.1f}",
                f"{row['c2st']['low']:.1f} to {row['c2st']['high']:.1f}",
            ]
            for name, row in numbers["realism"].items()
        ],
    )
    report.paragraph("Features of a fixed random convolution: compare within one project only. 50 % is guessing.")
    return report
