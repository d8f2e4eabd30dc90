"""Two sets of labelled images compared by the networks they train: numbers, table and curve (§3.1.3, Fig. 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastsimgan import cli
from fastsimgan.data.equalisation import equalise
from fastsimgan.errors import InputError
from fastsimgan.evaluation.task_network import (
    Judge,
    Labelled,
    constant_prediction,
    number_classes,
    summarise,
    train_and_predict,
)
from fastsimgan.hardware.device import choose_device, keep_freed_memory
from fastsimgan.metrics.statistics import check_scipy, difference_interval


def evaluate(
    synthetic: dict[str, Any], refined: dict[str, Any], real: dict[str, Any], *, seeds: int = 5, steps: int = 600,
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Compare two labelled sets by the networks they train.

    Args:
        synthetic, refined, real: ``images`` (``[N, H, W]`` or ``[N, H, W, C]``) with ``pitch_yaw`` or ``label``.
        seeds: networks for each set.
        steps: training steps of each.
        device: where.

    Returns:
        What ``--json`` writes: ``task``; ``rows``, each row's numbers with mean and std over the seeds; and
        ``differences``, how far refined is above each other set, with a 95 % interval (from two seeds on).
    """
    named = {"synthetic": synthetic, "refined": refined, "real": real}
    sets = {name: Labelled.from_arrays(arrays, name) for name, arrays in named.items()}
    test = sets.pop("real")
    return compare(sets, test, seeds=seeds, judge=Judge(steps=steps), device=device)[0]


def compare(
    sets: dict[str, Labelled], real: Labelled, *, seeds: int, judge: Judge, device: str = "auto",
    keep: Callable[[str, Callable[[], Any]], Any] = lambda name, work: work(),
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Train on each set with each seed and test on ``real``.

    Args:
        sets: by name; "synthetic" must be among them, for the constant predictor.
        real: labelled images that nothing is trained on.
        seeds: networks for each set, seeds 0, 1, ...
        judge: how each is trained.
        device: where.
        keep: called with each network's name (its set and seed) and the work that gives its predictions; returns them.
            A caller that keeps them on the disk need not do that work twice.

    Returns:
        The result as ``--json`` writes it, and each set's ensemble prediction.

    Raises:
        InputError: the sets differ in task or size, or a number is out of range.
    """
    _check(sets, real, seeds, judge)
    if seeds > 1:
        check_scipy()  # missing, it is better said now than after the training
    place = choose_device(device)
    keep_freed_memory()
    sets, real, names = number_classes(sets, real)
    classes = len(names)
    constant = constant_prediction(sets["synthetic"], len(real.images), classes)
    rows: dict[str, Any] = {"constant": statistics([summarise(real.task, constant, real.labels)])}
    predictions = {"constant": constant}
    steps = len(sets) * seeds * judge.steps
    bar = tqdm(total=steps, desc="task networks", unit="step", dynamic_ncols=True, disable=cli.quiet())
    runs: dict[str, list[Any]] = {name: [] for name in sets}
    for seed in range(seeds):  # sets inside seeds: an interrupted look at the bar compares like with like
        for name, part in sets.items():
            bar.set_postfix_str(f"{name}, seed {seed}")
            train = partial(
                train_and_predict, part, real.images,
                classes=classes, seed=seed, judge=judge, device=place, progress=bar.update,
            )  # fmt: skip
            runs[name].append(keep(f"{name}-{seed}", train))
            bar.update(sum(map(len, runs.values())) * judge.steps - bar.n)  # past what was kept
    bar.close()
    for name, outputs in runs.items():
        predictions[name] = np.mean(outputs, 0)
        rows[name] = statistics([summarise(real.task, output, real.labels) for output in outputs])
        rows[name]["ensemble"] = summarise(real.task, predictions[name], real.labels)
    result = {
        "task": real.task,
        "rows": rows,
        "differences": _differences(rows, real.task) if seeds > 1 and "refined" in rows else {},
        "seeds": seeds,
        "steps": judge.steps,
        "batch_size": judge.batch_size,
        "test_images": len(real.images),
        **({"classes": names} if names else {}),
    }
    return result, predictions


def _differences(rows: dict[str, Any], task: str) -> dict[str, dict[str, float]]:
    """How far refined is above each other trained set, in points within 7° or of accuracy."""
    key = "within_7deg" if task == "gaze" else "accuracy"
    refined = rows["refined"][key]["each"]
    others = {name: row[key]["each"] for name, row in rows.items() if name not in ("constant", "refined")}
    return {
        name: dict(zip(("difference", "low", "high"), difference_interval(refined, each), strict=True))
        for name, each in others.items()
    }


def _check(sets: dict[str, Labelled], real: Labelled, seeds: int, judge: Judge) -> None:
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if judge.steps < 1:
        raise InputError(f"steps must be at least 1, got {judge.steps}")
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


def equalised(part: Labelled) -> Labelled:
    """The same set with each grey image's histogram equalised."""
    if part.images.ndim != 3 or part.images.dtype == np.float32:
        raise InputError(
            f"--equalised needs grey 8- or 16-bit images, got {part.images.dtype} {list(part.images.shape)}"
        )
    equal = equalise(torch.from_numpy(np.ascontiguousarray(part.images))[:, None])[:, 0].numpy()
    return dataclasses.replace(part, images=equal)


def statistics(summaries: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each number over the seeds (0 for a single one), and each seed's."""
    return {
        key: {
            "mean": float(np.mean([s[key] for s in summaries])),
            "std": float(np.std([s[key] for s in summaries], ddof=1)) if len(summaries) > 1 else 0.0,
            "each": [s[key] for s in summaries],
        }
        for key in summaries[0]
    }
