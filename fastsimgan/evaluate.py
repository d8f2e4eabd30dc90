"""`python -m fastsimgan.evaluate`: does the refined set train a better model than the synthetic one?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsimgan import cli
from fastsimgan.errors import InputError

if TYPE_CHECKING:
    from fastsimgan.metrics.downstream import Judge, Labelled

DESCRIPTION = """Train the same task network on the synthetic and on the refined images, test both on labelled real
images, and print a table: mean ± standard deviation over the seeds, and the prediction averaged over them.

The arrays are .npz files with `images` and `pitch_yaw` (radians: the paper's gaze network) or `label` (classes)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    synthetic: Path | None = None
    """Labelled synthetic images (.npz). Left out with the others: the built-in eyes, refined by --refiner."""
    refined: Path | None = None
    """The same images refined (.npz), or give --refiner."""
    real: Path | None = None
    """Labelled real images to test on (.npz); nothing is trained on them."""
    refiner: Path | None = None
    """Refine --synthetic with this run or file, in place of --refined."""
    equalised: bool = False
    """Add a row: the synthetic images with each histogram equalised, what a user would try before a refiner."""
    seeds: int = 5
    """Networks trained on each set, seeds 0, 1, ..."""
    steps: int | None = None
    """Steps of each network's training; default 375."""
    json: Path | None = None
    """Write the numbers here."""
    plot: Path | None = None
    """Draw the share of test images within d degrees, for every d (Fig. 7), here (PNG; needs matplotlib)."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print the table; return the exit code."""
    return cli.run(
        evaluate_command, EvaluateConfig, prog="python -m fastsimgan.evaluate", description=DESCRIPTION, argv=argv
    )


def evaluate_command(config: EvaluateConfig) -> None:
    """The command itself, on parsed settings."""
    for path in (config.json, config.plot):
        if path is not None and path.exists():
            raise InputError(f"{path}: must not exist yet; nothing is ever overwritten")
    if config.refined is not None and config.refiner is not None:
        raise InputError(f"give --refined or --refiner, not both: got {config.refined} and {config.refiner}")
    if config.plot is not None:
        _matplotlib()

    from fastsimgan.metrics.downstream import Judge

    synthetic, refined, real = _sets(config)
    judge = Judge() if config.steps is None else Judge(steps=config.steps)
    sets = {"synthetic": synthetic, "refined": refined}
    result, predictions = compare(sets, real, config, judge)
    print(table(result))
    if config.json is not None:
        from fastsimgan.checkpoint import write_atomically

        write_atomically(config.json, (json.dumps(result, indent=2) + "\n").encode())
        print(f"numbers: {config.json}")
    if config.plot is not None:
        _draw(config.plot, result["task"], predictions, real.labels)
        print(f"plot: {config.plot}")


def evaluate(
    synthetic: dict[str, Any], refined: dict[str, Any], real: dict[str, Any], *, seeds: int = 5, steps: int = 375,
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Compare two labelled sets by the networks they train.

    Args:
        synthetic, refined, real: ``images`` (``[N, H, W]`` or ``[N, H, W, C]``) with ``pitch_yaw`` or ``label``.
        seeds: networks for each set.
        steps: training steps of each.
        device: where.

    Returns:
        What ``--json`` writes: ``task`` and ``rows``, each row's numbers with mean and std over the seeds.
    """
    from fastsimgan.metrics.downstream import Judge, Labelled

    sets = {"synthetic": Labelled.from_arrays(synthetic, "synthetic"), "refined": Labelled.from_arrays(refined, "refined")}
    config = EvaluateConfig(seeds=seeds, device=device)
    return compare(sets, Labelled.from_arrays(real, "real"), config, Judge(steps=steps))[0]


def compare(
    sets: dict[str, Labelled], real: Labelled, config: EvaluateConfig, judge: Judge
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train on each set with each seed; the result as written to json, and each set's ensemble prediction."""
    from tqdm import tqdm

    from fastsimgan.device import choose_device
    from fastsimgan.metrics.downstream import constant_prediction, summarise, train_and_predict

    _check(sets, real, config)
    device = choose_device(config.device)
    if config.equalised:
        sets = {"synthetic": sets["synthetic"], "equalised": _equalise(sets["synthetic"]), **sets}
    classes = 0 if real.task == "gaze" else 1 + int(max(part.labels.max() for part in (real, *sets.values())))
    constant = constant_prediction(sets["synthetic"], len(real.images), classes)
    rows: dict[str, Any] = {"constant": _statistics([summarise(real.task, constant, real.labels)])}
    predictions = {"constant": constant}
    bar = tqdm(total=len(sets) * config.seeds * judge.steps, desc="task networks", unit="step", dynamic_ncols=True)
    runs: dict[str, list[Any]] = {name: [] for name in sets}
    for seed in range(config.seeds):  # sets inside seeds: an interrupted look at the bar compares like with like
        for name, part in sets.items():
            bar.set_postfix_str(f"{name}, seed {seed}")
            runs[name].append(
                train_and_predict(
                    part, real.images, classes=classes, seed=seed, judge=judge, device=device, progress=bar.update
                )
            )
    bar.close()
    for name, outputs in runs.items():
        predictions[name] = np.mean(outputs, 0)
        rows[name] = _statistics([summarise(real.task, output, real.labels) for output in outputs])
        rows[name]["ensemble"] = summarise(real.task, predictions[name], real.labels)
    result = {
        "task": real.task,
        "rows": rows,
        "seeds": config.seeds,
        "steps": judge.steps,
        "batch_size": judge.batch_size,
        "test_images": len(real.images),
    }
    return result, predictions


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
        cells = [f"{row[key]['mean']:.2f}" + (f" ± {row[key]['std']:.2f}" if name != "constant" else "") for key in columns]
        lines.append(f"{name:<22}" + "".join(f"{cell:>16}" for cell in cells))
        if "ensemble" in row:
            lines.append(f"{'  ensemble':<22}" + "".join(f"{row['ensemble'][key]:>16.2f}" for key in columns))
    lines.append(
        f"{result['test_images']} real test images; mean ± standard deviation over {result['seeds']} seeds; "
        "ensemble: the seeds' predictions averaged; constant: the training labels' mean or commonest"
    )
    return "\n".join(lines)


def _sets(config: EvaluateConfig) -> tuple[Labelled, Labelled, Labelled]:
    from fastsimgan.data.builtin import builtin_pair, builtin_validation
    from fastsimgan.data.source import open_images
    from fastsimgan.metrics.downstream import Labelled

    def read(path: Path) -> dict[str, Any]:
        source = open_images(path)
        return {"images": source.load(), **source.labels()}

    if config.synthetic is None and config.real is None and config.refined is None:
        if config.refiner is None:
            raise InputError("give --refiner RUN for the built-in eyes, or --synthetic, --refined and --real")
        seed = 0
        arrays, real = builtin_pair(seed)[0], builtin_validation(seed)
    elif config.synthetic is None or config.real is None or (config.refined is None and config.refiner is None):
        raise InputError("give --synthetic, --real and one of --refined and --refiner")
    else:
        arrays, real = read(config.synthetic), read(config.real)
    if config.refiner is not None:
        from fastsimgan.runtime import load_refiner

        refined = {**arrays, "images": load_refiner(config.refiner, config.device)(arrays["images"])}
    else:
        assert config.refined is not None
        refined = read(config.refined)
    names = [str(path) for path in (config.synthetic or "built-in", config.refined or "refined", config.real or "built-in")]
    synthetic, refined_set, real_set = (
        Labelled.from_arrays(part, name) for part, name in zip((arrays, refined, real), names, strict=True)
    )
    return synthetic, refined_set, real_set


def _check(sets: dict[str, Labelled], real: Labelled, config: EvaluateConfig) -> None:
    if config.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {config.seeds}")
    if config.steps is not None and config.steps < 1:
        raise InputError(f"--steps must be at least 1, got {config.steps}")
    for name, part in sets.items():
        if part.task != real.task:
            raise InputError(f"{name} images must carry the same label as the real ones ({real.task}), got {part.task}")
        if part.images.shape[1:] != real.images.shape[1:]:
            raise InputError(
                f"{name} images must have the real images' size {list(real.images.shape[1:])}, "
                f"got {list(part.images.shape[1:])}"
            )
        if len(part.images) != len(part.labels):
            raise InputError(f"{name} must have one label an image, got {len(part.labels)} for {len(part.images)}")


def _equalise(part: Labelled) -> Labelled:
    import dataclasses

    import torch

    from fastsimgan.data.histogram import equalise

    if part.images.ndim != 3 or part.images.dtype == np.float32:
        raise InputError(f"--equalised needs grey 8- or 16-bit images, got {part.images.dtype} {list(part.images.shape)}")
    equal = equalise(torch.from_numpy(np.ascontiguousarray(part.images))[:, None])[:, 0].numpy()
    return dataclasses.replace(part, images=equal)


def _statistics(summaries: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds (0 for a single one)."""
    return {
        key: {
            "mean": float(np.mean([s[key] for s in summaries])),
            "std": float(np.std([s[key] for s in summaries], ddof=1)) if len(summaries) > 1 else 0.0,
            "each": [s[key] for s in summaries],
        }
        for key in summaries[0]
    }


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        from fastsimgan.errors import UnavailableError

        raise UnavailableError('--plot needs matplotlib: pip install "fastsimgan[eval]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(path: Path, task: str, predictions: dict[str, Any], labels: Any) -> None:
    """Cumulative error curves of the ensembles (Fig. 7); for classes, accuracy against the share of images answered."""
    import io

    from fastsimgan.checkpoint import write_atomically
    from fastsimgan.metrics.gaze_error import angular_errors, pitch_yaw

    if task != "gaze":
        raise InputError("--plot draws gaze errors; classes have no such curve")
    pyplot = _matplotlib()
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    degrees = np.linspace(0, 25, 251)
    for name, prediction in predictions.items():
        errors = angular_errors(pitch_yaw(prediction), labels)
        style = "--" if name == "constant" else "-"
        axes.plot(degrees, (errors[:, None] <= degrees).mean(0) * 100, style, label=name)
    axes.set(xlabel="angular error, degrees", ylabel="real test images within it, %", xlim=(0, 25), ylim=(0, 100))
    axes.axvline(7, color="0.8", zorder=0)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
