"""The page that tells what the gaze experiment found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.reporting.html_report import Report, interval


def page(numbers: dict[str, Any], out: Path, builtin: bool) -> Report:
    """The report on ``numbers``, as report.json holds them; pictures are read from ``out``."""
    result, counts = numbers["comparison"], numbers["counts"]
    seeds = result["seeds"]
    report = Report("Gaze: do refined eyes train a better model?")
    report.paragraph(
        f"{counts['synthetic']} synthetic eyes, refined against {counts['real']} "
        f"{'simulated stand-ins for real ones' if builtin else 'real ones'}; gaze networks tested on "
        f"{counts['validation']} others. {seeds} network(s) a set, {result['steps']} steps of {result['batch_size']}."
        + (" A quick look: too few steps for a result." if numbers["quick"] else "")
    )
    if builtin:
        report.paragraph("Both sides are simulated here: this shows that the machinery works, not that real eyes gain.")
    _within(report, result)
    _curve(report, result)
    report.heading("Pictures")
    report.picture((out / "refiner-0" / "contact_sheet.png").read_bytes(), "Refiner of seed 0, as training left it")
    _truth(report, numbers["drift"], out)
    _realism(report, numbers["realism"])
    return report


def _within(report: Report, result: dict[str, Any]) -> None:
    rows, seeds = result["rows"], result["seeds"]
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


def _curve(report: Report, result: dict[str, Any]) -> None:
    report.heading("Cumulative curve (Fig. 7)")
    degrees = np.array(result["degrees"])
    report.curves(
        {name: (degrees, np.array(share)) for name, share in result["within"].items()},
        "angular error, degrees",
        "test images within it, %",
        "Each curve is of the predictions averaged over the seeds.",
    )


def _truth(report: Report, drift: dict[str, Any], out: Path) -> None:
    report.heading("Did the labels stay true?")
    angle = drift["gaze_deg"]
    report.paragraph(
        f"{drift['images']} images: {drift['text']}. A gaze network trained on the synthetic images changes its answer "
        f"by {angle['median']:.1f}° (median; 90 % within {angle['p90']:.1f}°); the new look has its share in that."
    )
    report.picture((out / "moved_most.png").read_bytes(), "The eight images that moved most")


def _realism(report: Report, realism: dict[str, Any]) -> None:
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
            for name, row in realism.items()
        ],
    )
    report.paragraph("Features of a fixed random convolution: compare within one project only. 50 % is guessing.")
