"""`python -m fastsimgan.experiments ablation-local | ablation-history`: numbers where the paper has pictures.

Fig. 8 sets the local adversarial loss against a global one, Fig. 9 a history of refined images against none. Here both
sides are trained with several seeds and measured: on images that no refiner saw, and by the task networks they train.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsimgan import cli
from fastsimgan.experiments.cached_step import (
    check_counts,
    check_sets,
    claim,
    piece,
    refined_by,
    versions,
    write_report,
)

if TYPE_CHECKING:
    from fastsimgan.config import TrainConfig
    from fastsimgan.reporting.html_report import Report

DESCRIPTION = """Train refiners with and without one part of the method, several seeds each, measure their images, and
write report.html and report.json. The same command goes on after a kill: every finished piece is kept in --out, and
another experiment's pieces are refused."""

HELD_OUT = 3  # one image in so many is kept from the refiners, for the tests that tell refined from real ones
DRIFT_IMAGES = 1000
PICTURES = 10


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


@dataclass(frozen=True)
class _Task:
    """Data and judge of one kind; ``score`` takes images for all of the synthetic labels and a seed; ``drift`` takes
    refined images and which of the synthetic ones they are, and gives pixels."""

    sets: dict[str, dict[str, Any]]
    hashes: dict[str, str]
    training: TrainConfig
    judge: Any
    score: Callable[[Any, int], dict[str, float]]
    drift: Callable[[Any, Any], float | None]


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
    import numpy as np

    ablation = ABLATIONS[name]
    task = _eyes(config) if config.data == "eyes" else _hands(config)
    task.training.validate()
    synthetic, real = task.sets["synthetic"]["images"], task.sets["real"]["images"]
    variants = {
        ablation.whole: task.training,
        ablation.without: _without(name, task.training, synthetic.shape),
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
    rng = np.random.default_rng(0)
    held = {}
    for each, images in (("synthetic", synthetic), ("real", real)):
        held[each] = np.zeros(len(images), bool)
        held[each][rng.permutation(len(images))[: len(images) // HELD_OUT]] = True

    def measured(images: Any, seed: int, history: list[float] | None) -> dict[str, Any]:
        return _measure(task, images, held, seed, history)

    results: dict[str, list[dict[str, Any]]] = {"synthetic": [], **{each: [] for each in variants}}
    losses = {}
    first = {}  # seed 0's images of each kind
    for seed in range(config.seeds):
        cli.LOG.info(f"seed {seed} of {config.seeds}: synthetic")
        results["synthetic"].append(
            piece(config.out, f"measured-synthetic-{seed}", lambda seed=seed: measured(synthetic, seed, None))  # type: ignore[misc]
        )
        for each, training in variants.items():
            cli.LOG.info(f"seed {seed} of {config.seeds}: {each}")
            label = f"{each}-{seed}".replace(" ", "-")
            images = refined_by(
                config.out, label, dataclasses.replace(training, seed=seed),
                synthetic[~held["synthetic"]], real[~held["real"]], synthetic,
            )  # fmt: skip
            history = _discriminator_losses(config.out / f"refiner-{label}" / "metrics.jsonl")
            if seed == 0:
                losses[each], first[each] = history, images
            results[each].append(
                piece(config.out, f"measured-{label}",
                      lambda images=images, seed=seed, history=history: measured(images, seed, history))  # type: ignore[misc]
            )  # fmt: skip

    measures = MEASURES | TASK_MEASURES[config.data]
    numbers = {
        "command": command,
        "versions": versions(),
        **identity,
        "counts": {each: len(part["images"]) for each, part in task.sets.items()},
        "rows": {
            each: {key: _over_seeds([one[key] for one in ones]) for key in measures} for each, ones in results.items()
        },
    }
    numbers["findings"] = _findings(numbers["rows"], measures, ablation)
    print("\n".join(numbers["findings"]))
    _draw(config.out, synthetic, real, first, held)
    write_report(config.out, _page(numbers, config, ablation, measures, losses), numbers)
    return numbers


def _eyes(config: AblationConfig) -> _Task:
    """The gaze experiment's data, training and judge."""
    import torch

    from fastsimgan.config import preset
    from fastsimgan.errors import InputError
    from fastsimgan.evaluation.task_network import Judge, Labelled, summarise, train_and_predict
    from fastsimgan.experiments.gaze import read_eyes
    from fastsimgan.hardware.device import choose_device
    from fastsimgan.metrics.label_drift import label_drift

    arrays, hashes = read_eyes(config)
    sets = {name: Labelled.from_arrays(arrays[name], name) for name in ("synthetic", "validation")}
    for name, part in sets.items():
        if part.task != "gaze":
            raise InputError(f"{name}: must hold pitch_yaw, got {part.task} labels")
    training = preset("quick" if config.quick or config.synthetic is None else "gaze", device=config.device)
    judge = Judge(steps=config.judge_steps or (300 if config.quick else Judge.steps))
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

    return _Task(arrays, hashes, _with_steps(training, config), judge, score, drift)


def _hands(config: AblationConfig) -> _Task:
    """The hand experiment's."""
    import numpy as np

    from fastsimgan.config import preset
    from fastsimgan.evaluation.pose_network import PoseJudge, train_and_find_joints
    from fastsimgan.experiments.hand import (
        PAPER_SIZE,
        QUICK_JUDGE,
        QUICK_TRAINING,
        evaluated_joints,
        quick_size,
        read_hands,
    )
    from fastsimgan.hardware.device import choose_device
    from fastsimgan.metrics.depth_edges import joint_edge_shifts
    from fastsimgan.metrics.joints import joint_errors, share_within

    sets, hashes = read_hands(config)
    joints = evaluated_joints(sets)
    training = preset("quick", **QUICK_TRAINING) if config.quick else preset("hand")
    judge = PoseJudge(**QUICK_JUDGE, input_size=quick_size(sets)) if config.quick else PoseJudge()
    if config.judge_steps is not None:
        judge = dataclasses.replace(judge, steps=config.judge_steps)
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

    training = dataclasses.replace(training, device=config.device)
    return _Task(sets, hashes, _with_steps(training, config), judge, score, drift)


def _with_steps(training: TrainConfig, config: AblationConfig) -> TrainConfig:
    return training if config.steps is None else dataclasses.replace(training, steps=config.steps)


def _without(name: str, training: TrainConfig, shape: tuple[int, ...]) -> TrainConfig:
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


def _measure(task: _Task, images: Any, held: dict[str, Any], seed: int, losses: list[float] | None) -> dict[str, Any]:
    """The measures of one refiner's ``images``, in the order of the synthetic ones; without ``losses``, of those."""
    import numpy as np

    from fastsimgan.metrics.realism import high_frequency_energy, kernel_distance, patch_test, random_features

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


def _discriminator_losses(metrics: Path) -> list[float]:
    """D's loss at each iteration of Algorithm 1."""
    rows = (json.loads(line) for line in metrics.read_text().splitlines())
    return [row["loss_discriminator"] for row in rows if row["phase"] == "train" and "loss_discriminator" in row]


def _over_seeds(values: list[float | None]) -> dict[str, Any] | None:
    """Mean, deviation and each, as `comparison.statistics` has them; None where the measure has no sense."""
    from fastsimgan.evaluation.comparison import statistics

    known = [{"value": value} for value in values if value is not None]
    return statistics(known)["value"] if len(known) == len(values) else None


def _findings(rows: dict[str, Any], measures: dict[str, Measure], ablation: Ablation) -> list[str]:
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


def _draw(out: Path, synthetic: Any, real: Any, refined: dict[str, Any], held: dict[str, Any]) -> None:
    """The same unseen images, as they are and as seed 0's refiners make them, and real ones below."""
    import numpy as np

    from fastsimgan.data.pixel_values import from_float, to_float
    from fastsimgan.reporting.contact_sheet import save_rows

    chosen = np.flatnonzero(held["synthetic"])[:PICTURES]
    rows = {"synthetic": synthetic[chosen], **{name: images[chosen] for name, images in refined.items()}}
    rows["real"] = real[held["real"]][:PICTURES]
    save_rows(out / "pictures.png", {name: from_float(to_float(each), "uint8") for name, each in rows.items()})


def _page(
    numbers: dict[str, Any], config: AblationConfig, ablation: Ablation, measures: dict[str, Measure],
    losses: dict[str, list[float]],
) -> Report:  # fmt: skip
    import numpy as np

    from fastsimgan.reporting.html_report import Report, interval

    counts, seeds, training = numbers["counts"], numbers["seeds"], numbers["training"]
    builtin = config.synthetic is None
    report = Report(f"{ablation.title} ({ablation.figure})")
    report.paragraph(
        f"{counts['synthetic']} synthetic {config.data}, {counts['real']} "
        f"{'of a simulated stand-in for real ones' if builtin else 'real ones'}; one in {HELD_OUT} of both is kept "
        f"from the refiners. {seeds} refiner(s) of each kind, {training[ablation.whole]['steps']} iterations of "
        f"{training[ablation.whole]['batch_size']}; a task network for each, {numbers['judge']['steps']} steps, "
        f"tested on {counts['validation']} others."
        + (" A quick look: too few steps for a result." if config.quick else "")
    )
    if builtin:
        report.paragraph("Both sides are simulated here: this shows that the machinery works, nothing about real ones.")
    report.heading("Measured")
    report.table(
        ["", *(measure.title for measure in measures.values())],
        [
            [name, *("" if row[key] is None else interval(row[key], digits=measure.digits)
                     for key, measure in measures.items())]
            for name, row in numbers["rows"].items()
        ],
    )  # fmt: skip
    report.paragraph(
        ("± is half of the 95 % interval of the mean over the seeds (Student's t), each seed a refiner and a task "
         "network of its own. " if seeds > 1 else "One seed. ")
        + "Patches told apart: by a discriminator trained from scratch on half of the unseen refined and real images, "
        "asked about the other half; 50 is guessing. Fine detail: energy of what a 3×3 blur takes out, over the real "
        "images'; off by one octave is twice or half of it. KID: in features of a fixed random convolution. Label "
        "drift: median movement of the iris's rim, or for hands of the depth edges by the joints. Spread: standard "
        "deviation over mean of D's loss in the second half of training."
    )  # fmt: skip
    if ablation.without == "global":
        report.paragraph(
            f"The global loss is one answer an image, the local one a sum over patches (§2.2); so the global refiner's "
            f"λ is {training[ablation.without]['lam']:.3g} in place of {training[ablation.whole]['lam']:.3g}, which "
            "keeps the balance between the adversarial loss and self-regularisation."
        )
    report.heading(f"Is it as in {ablation.figure}?")
    for finding in numbers["findings"]:
        report.paragraph(finding)
    report.heading("Pictures")
    report.picture((config.out / "pictures.png").read_bytes(), "Images that no refiner saw; refiners of seed 0")
    report.heading("D's loss over time")
    report.curves(
        {
            name: (np.arange(1, len(each) + 1, dtype=float), np.array(each) / max(each))
            for name, each in losses.items()
            if each
        },
        "iteration",
        "D's loss, over its largest",
        "Refiners of seed 0; each curve is over its own largest value, since a local loss is a sum over patches.",
    )
    return report
