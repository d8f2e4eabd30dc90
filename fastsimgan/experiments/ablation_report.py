"""The page that tells what an ablation found, and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.pixel_values import from_float, to_float
from fastsimgan.experiments.ablation_measures import Measure
from fastsimgan.experiments.ablation_tasks import Ablation, AblationConfig, Task
from fastsimgan.reporting.contact_sheet import save_rows
from fastsimgan.reporting.html_report import Report, interval

PICTURES = 10


def draw(out: Path, task: Task, refined: dict[str, Any], held: dict[str, Any]) -> None:
    """pictures.png: the same unseen images, as they are and as seed 0's refiners make them, and real ones below."""
    synthetic, real = task.sets["synthetic"]["images"], task.sets["real"]["images"]
    chosen = np.flatnonzero(held["synthetic"])[:PICTURES]
    rows = {"synthetic": synthetic[chosen], **{name: images[chosen] for name, images in refined.items()}}
    rows["real"] = real[held["real"]][:PICTURES]
    save_rows(out / "pictures.png", {name: from_float(to_float(each), "uint8") for name, each in rows.items()})


def page(
    numbers: dict[str, Any], config: AblationConfig, ablation: Ablation, measures: dict[str, Measure],
    losses: dict[str, list[float]], held_out: int,
) -> Report:  # fmt: skip
    """The report on ``numbers``, as report.json holds them; ``losses`` are D's, by kind, of the refiners of seed 0."""
    counts, seeds, training = numbers["counts"], numbers["seeds"], numbers["training"]
    builtin = config.synthetic is None
    report = Report(f"{ablation.title} ({ablation.figure})")
    report.paragraph(
        f"{counts['synthetic']} synthetic {config.data}, {counts['real']} "
        f"{'of a simulated stand-in for real ones' if builtin else 'real ones'}; one in {held_out} of both is kept "
        f"from the refiners. {seeds} refiner(s) of each kind, {training[ablation.whole]['steps']} iterations of "
        f"{training[ablation.whole]['batch_size']}; a task network for each, {numbers['judge']['steps']} steps, "
        f"tested on {counts['validation']} others."
        + (" A quick look: too few steps for a result." if config.quick else "")
    )
    if builtin:
        report.paragraph("Both sides are simulated here: this shows that the machinery works, nothing about real ones.")
    _measured(report, numbers, ablation, measures)
    report.heading(f"Is it as in {ablation.figure}?")
    for finding in numbers["findings"]:
        report.paragraph(finding)
    report.heading("Pictures")
    report.picture((config.out / "pictures.png").read_bytes(), "Images that no refiner saw; refiners of seed 0")
    _losses(report, losses)
    return report


def _measured(report: Report, numbers: dict[str, Any], ablation: Ablation, measures: dict[str, Measure]) -> None:
    seeds, training = numbers["seeds"], numbers["training"]
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


def _losses(report: Report, losses: dict[str, list[float]]) -> None:
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
