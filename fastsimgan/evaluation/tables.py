"""A comparison as it is shown: a table for a terminal, and the curve of Fig. 7."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.gaze_angles import pitch_yaw
from fastsimgan.errors import InputError
from fastsimgan.metrics.gaze_error import angular_errors
from fastsimgan.reporting.plots import figure
from fastsimgan.storage.atomic import write_atomically


def table(result: dict[str, Any]) -> str:
    """The rows as text, for a terminal."""
    columns = (
        {
            "mean_deg": "mean error °",
            "median_deg": "median °",
            "within_7deg": "within 7° %",
            "bias_pitch_deg": "bias pitch °",
            "bias_yaw_deg": "bias yaw °",
            "bias_free_mean_deg": "bias-free °",
            "bias_free_within_7deg": "bias-free 7° %",
        }
        if result["task"] == "gaze"
        else {"accuracy": "accuracy %"}
    )
    lines = [f"{'trained on':<22}" + "".join(f"{title:>16}" for title in columns.values())]
    for name, row in result["rows"].items():
        cells = [
            f"{row[key]['mean']:.2f}" + (f" ± {row[key]['std']:.2f}" if name != "constant" else "") for key in columns
        ]
        lines.append(f"{name:<22}" + "".join(f"{cell:>16}" for cell in cells))
        if "ensemble" in row:
            lines.append(f"{'  ensemble':<22}" + "".join(f"{row['ensemble'][key]:>16.2f}" for key in columns))
    lines.append(
        f"{result['test_images']} real test images; mean ± standard deviation over {result['seeds']} seeds; "
        "ensemble: the seeds' predictions averaged; constant: the training labels' mean or commonest"
    )
    lines += [
        f"refined above {name} by {found['difference']:+.1f} points, 95 % interval {found['low']:+.1f} to "
        f"{found['high']:+.1f} (Welch's t over the seeds)"
        for name, found in result["differences"].items()
    ]
    return "\n".join(lines)


def draw(path: Path, task: str, predictions: dict[str, Any], labels: Any) -> None:
    """Cumulative error curves of the ensembles (Fig. 7), as a PNG.

    Args:
        path: where.
        task: "gaze".
        predictions: unit gaze vectors ``[N, 3]`` by name.
        labels: ``[N, 2]``, pitch and yaw in radians.

    Raises:
        InputError: classes, which have no such curve.
        UnavailableError: matplotlib is not installed.
    """
    if task != "gaze":
        raise InputError("--plot draws gaze errors; classes have no such curve")
    drawing = figure("--plot", 5, 4)
    axes = drawing.add_subplot()
    degrees = np.linspace(0, 25, 251)
    for name, prediction in predictions.items():
        errors = angular_errors(pitch_yaw(prediction), labels)
        style = "--" if name == "constant" else "-"
        axes.plot(degrees, (errors[:, None] <= degrees).mean(0) * 100, style, label=name)
    axes.set(xlabel="angular error, degrees", ylabel="real test images within it, %", xlim=(0, 25), ylim=(0, 100))
    axes.axvline(7, color="0.8", zorder=0)
    axes.legend()
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
