"""What the hand experiment found, as a table for a terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.reporting.html_report import Report, interval

PAPER_SIZE = 224  # pixels each way, at which "within 5 px" is said


def table(result: dict[str, Any]) -> str:
    """The rows as text, for a terminal."""
    lines = [f"{'trained on':<16}{'images':>8}{'within 5 px %':>18}{'mean px':>16}{'median px':>16}"]
    for name, row in result["rows"].items():
        cells = [f"{row[key]['mean']:.2f}" for key in ("within_5px", "mean_px", "median_px")]
        if name != "constant":
            cells = [
                f"{cell} ± {row[key]['std']:.2f}"
                for cell, key in zip(cells, ("within_5px", "mean_px", "median_px"), strict=True)
            ]
        count = result["images"].get(name, "")
        lines.append(f"{name:<16}{count:>8}{cells[0]:>18}{cells[1]:>16}{cells[2]:>16}")
    lines.append(f"pixels of {PAPER_SIZE}x{PAPER_SIZE}, {result['pixel']:.3f} of these pictures'; ± standard deviation")
    for what, (difference, low, high) in result["differences"].items():
        lines.append(f"{what} by {difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} (Welch's t)")
    return "\n".join(lines)


def page(numbers: dict[str, Any], out: Path, builtin: bool) -> Report:
    """The report on ``numbers``, as report.json holds them; pictures are read from ``out``."""
    result, counts, edges = numbers["comparison"], numbers["counts"], numbers["edges"]
    judge, seeds, (height, width) = numbers["judge"], numbers["seeds"], numbers["size"]
    report = Report("Hands: do refined depth images train a better pose network?")
    report.paragraph(
        f"{counts['synthetic']} synthetic hands of {height}×{width}, refined against {counts['real']} "
        f"{'of a simulated stand-in for a real depth sensor' if builtin else 'real ones'}; pose networks tested on "
        f"{counts['validation']} others. {seeds} network(s) a set, {judge['steps']} steps of {judge['batch_size']}."
        + (" A quick look: small networks, few steps." if numbers["quick"] else "")
    )
    if builtin:
        report.paragraph(
            "Both sides are simulated here: this shows that the machinery works, not that real hands gain."
        )
    _within(report, result, seeds, numbers["quick"])
    _curve(report, result)
    report.heading("Pictures")
    report.picture((out / "refiner-0" / "contact_sheet.png").read_bytes(), "The refiner, as training left it")
    _noise(report, edges)
    _truth(report, edges, out)
    return report


def _within(report: Report, result: dict[str, Any], seeds: int, quick: bool) -> None:
    report.heading("Within 5 px (the form of Table 4)")
    columns = {"within_5px": "within 5 px %", "mean_px": "mean error px", "median_px": "median px"}
    report.table(
        ["trained on", "images", *columns.values()],
        [
            [name, str(result["images"].get(name, "")), *(interval(row[key], name == "constant") for key in columns)]
            for name, row in result["rows"].items()
        ],
    )
    report.paragraph(
        f"Pixels are those of a {PAPER_SIZE}×{PAPER_SIZE} picture, as in the paper; one of them is "
        f"{result['pixel']:.3f} pixels here, and 5 are {5 * result['pixel']:.2f}. Share of all joints of all test "
        "images. "
        + ("± is half of the 95 % interval of the mean over the seeds (Student's t). " if seeds > 1 else "One seed. ")
        + "Constant: the mean synthetic joints for every image. Real: trained on the real set's labels, which no "
        "refiner saw."
        + ("" if quick else " ×1 is one camera, or a third of the synthetic set; ×3 all of it.")
        + " All pose networks take equally many steps. The intervals are over the pose networks' seeds alone, not over "
        "refiners."
    )
    for what, (difference, low, high) in result["differences"].items():
        report.paragraph(
            f"{what[0].upper()}{what[1:]} by {difference:+.1f} points within 5 px, 95 % interval {low:+.1f} to "
            f"{high:+.1f} (Welch)."
        )


def _curve(report: Report, result: dict[str, Any]) -> None:
    report.heading("Share of joints within d pixels (Fig. 12)")
    distances = np.array(result["distances"])
    report.curves(
        {name: (distances, np.array(share)) for name, share in result["within"].items()},
        f"distance d, pixels of {PAPER_SIZE}×{PAPER_SIZE}",
        "joints within it, %",
        "Each curve is the mean over the seeds.",
    )


def _noise(report: Report, edges: dict[str, Any]) -> None:
    report.heading("Where did the refiner put its noise?")
    places = ("edges", "flat", "background")
    report.table(
        ["noise of the", *(f"error, {place}" for place in places), "edges / flat", "lost on edges %", "lost on flat %"],
        [
            [
                name,
                *(f"{noise[place]['error']:.4f}" for place in places),
                "" if noise["edges_to_flat"] is None else f"{noise['edges_to_flat']:.1f}",
                f"{noise['edges']['lost']:.1f}",
                f"{noise['flat']['lost']:.1f}",
            ]
            for name, noise in edges["noise"].items()
        ],
    )
    report.paragraph(
        f"{edges['images']} images. Error: mean |R(x) − x| with black to white as 2. Edges: pixels on either side of a "
        "depth discontinuity; flat: the rest of the hand. Lost: hand pixels that came nearer to the background."
    )


def _truth(report: Report, edges: dict[str, Any], out: Path) -> None:
    report.heading("Did the labels stay true?")
    for name, drift in edges["drift"].items():
        report.paragraph(
            f"The {name} moved the depth edges nearest to the joints by "
            + ("(none found)." if drift["median_px"] is None else
               f"{drift['median_px']:.2f} pixels of these pictures (median over images; 90 % within "
               f"{drift['p90_px']:.2f}).")
        )  # fmt: skip
    report.picture((out / "moved_most.png").read_bytes(), "The eight images whose edges moved most")
