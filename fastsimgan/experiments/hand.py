"""`python -m fastsimgan.experiments hand`: pose networks trained on simulated and on refined depth hands (§3.2)."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsimgan import cli
from fastsimgan.errors import InputError
from fastsimgan.experiments.cached_step import (
    SETS,
    Sets,
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
    from fastsimgan.evaluation.pose_network import PoseJudge

DESCRIPTION = """Train a refiner of depth hands, refine the synthetic ones, train pose networks (stacked hourglasses) on
synthetic and on refined hands and on the real ones' labels if there are any, test them on labelled real hands, and
write report.html and report.json. The same command goes on after a kill: every finished piece is kept in --out, and
another experiment's pieces are refused."""

DRIFT_IMAGES = 1000
BUILTIN = {"synthetic": 9000, "real": 6000, "validation": 1000}
QUICK_BUILTIN, QUICK_SIZE = {"synthetic": 3000, "real": 1500, "validation": 1000}, 48
# Sized for two cores and 48x48 pictures, where the hand discriminator's strides would leave 2x2 patches. R starts as
# the paper's does, at random, and learns the identity first: begun at it, R drew outlines and moved flat depth as much
# as edges at every λ that was tried, on hands of other seeds.
QUICK_TRAINING: dict[str, Any] = {
    "hidden_channels": 24, "lam": 0.3, "steps": 1000, "computes": "image", "pretrain_refiner": 300,
    "learning_rate_refiner": 1e-3,
}  # fmt: skip
QUICK_JUDGE: dict[str, Any] = {
    "steps": 500, "batch_size": 16, "learning_rate": 3e-3, "ema_decay": 0.98, "features": 32, "depth": 3, "stride": 2,
}  # fmt: skip


@dataclass(frozen=True)
class HandConfig:
    """Settings of the experiment."""

    out: Path
    """Folder of the experiment."""
    synthetic: Path | None = None
    """Synthetic depth hands with `joints` (.npz). Left out with the others: the built-in hands."""
    real: Path | None = None
    """Real depth hands (.npz or .npy); training the refiner reads no label of theirs."""
    validation: Path | None = None
    """Labelled real depth hands to test on (.npz), none of them in --real."""
    seeds: int = 3
    """Pose networks trained on each set."""
    quick: bool = False
    """Small networks, few steps, no x3 rows, the built-in hands at 48x48: sized for two cores."""
    steps: int | None = None
    """Iterations of the refiner; default the preset's."""
    judge_steps: int | None = None
    """Steps of each pose network; default 20,000, with --quick 500."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code."""
    given = list(sys.argv[2:] if argv is None else argv)
    prog = "python -m fastsimgan.experiments hand"

    def command(config: HandConfig) -> None:
        run(config, f"{prog} {shlex.join(given)}")

    return cli.run(command, HandConfig, prog=prog, description=DESCRIPTION, argv=given)


def run(config: HandConfig, command: str) -> dict[str, Any]:
    """The experiment on parsed settings.

    Args:
        config: settings.
        command: how it was called, for the report.

    Returns:
        What report.json holds.

    Raises:
        InputError: a setting or a file breaks a rule, or --out holds another experiment.
    """
    check_sets(config, "hands")
    check_counts(config, "seeds", "steps", "judge_steps")
    check_installed(config.seeds)
    from fastsimgan.experiments.hand_report import page

    sets, hashes = read_hands(config)
    joints = evaluated_joints(sets)
    training, judge = hand_settings(config, sets)
    training.validate()
    identity = claim(
        config.out,
        {
            "experiment": "hand",
            "data_sha256": hashes,
            "training": dataclasses.asdict(training) | {"out": None},
            "judge": dataclasses.asdict(judge),
            "seeds": config.seeds,
            "quick": config.quick,
        },
    )

    synthetic = sets["synthetic"]["images"]
    refined = refined_by(config.out, "0", training, synthetic, sets["real"]["images"])
    trained = _sets(sets, joints, refined, config.quick)
    result = _compare(config, trained, sets["validation"]["images"], joints["validation"], judge)
    edges = cached(
        config.out, "edges",
        lambda: _edges(config.out, synthetic, refined, joints["synthetic"], config.synthetic is None),
    )  # fmt: skip

    numbers = {
        "command": command,
        "versions": versions(),
        **identity,
        "counts": {name: len(part["images"]) for name, part in sets.items()},
        "size": list(synthetic.shape[1:]),
        "comparison": result,
        "edges": edges,
    }
    write_report(config.out, page(numbers, config.out, config.synthetic is None), numbers)
    return numbers


def read_hands(config: Any) -> tuple[Sets, dict[str, str]]:
    """The three sets that ``config`` names or, for ``config.quick`` or not, the built-in ones; and the SHA-256 of each:
    of its file, or of the built-in arrays' bytes."""
    from fastsimgan.data.simulators.eyes import Role, population_seed
    from fastsimgan.data.simulators.hands import simulate_hands
    from fastsimgan.experiments.hand_report import PAPER_SIZE

    if config.synthetic is not None:
        return read_sets(config)
    counts, size = (QUICK_BUILTIN, QUICK_SIZE) if config.quick else (BUILTIN, PAPER_SIZE)
    sets: Sets = {}
    roles: tuple[Role, ...] = ("synthetic", "real_unlabelled", "real_validation")
    for name, role in zip(SETS, roles, strict=True):
        sets[name] = simulate_hands(
            counts[name],
            population_seed(0, role),
            population="synthetic" if name == "synthetic" else "stand_in_real",
            height=size,
            width=size,
        )
    return sets, hash_sets(sets, "images", "joints")


def evaluated_joints(sets: Sets) -> dict[str, Any]:
    """Each set's joints ``[N, J, 2]`` that are evaluated, in pixels; of --real only if it has some."""
    import numpy as np

    from fastsimgan.data.simulators.hands import EVALUATED, JOINTS

    found = {}
    shape = sets["validation"]["images"].shape[1:]
    for name, arrays in sets.items():
        if arrays["images"].ndim != 3 or arrays["images"].shape[1:] != shape:
            raise InputError(
                f"{name}: images must be depth [N, H, W] of the validation images' size {list(shape)}, "
                f"got {list(arrays['images'].shape)}"
            )
        if "joints" not in arrays:
            if name == "real":
                continue
            raise InputError(f"{name}: must hold joints, got {', '.join(sorted(arrays))}")
        joints = arrays["joints"]
        if joints.ndim != 3 or joints.shape[2] != 2 or joints.dtype.kind != "f" or not np.isfinite(joints).all():
            raise InputError(
                f"{name}: joints must be finite pixels (x, y), floats [N, J, 2], got {joints.dtype} "
                f"{list(joints.shape)}"
            )
        found[name] = joints[:, EVALUATED] if joints.shape[1] == JOINTS else joints
        if found[name].shape[1] != found["synthetic"].shape[1]:
            raise InputError(
                f"{name}: must have as many joints as the synthetic set ({found['synthetic'].shape[1]}), "
                f"got {found[name].shape[1]}"
            )
    return found


def hand_settings(config: Any, sets: Sets) -> tuple[TrainConfig, PoseJudge]:
    """How the refiners and the pose networks are trained; ``config`` is this experiment's or an ablation's."""
    from fastsimgan.config import preset
    from fastsimgan.evaluation.pose_network import PoseJudge

    training = preset("quick", **QUICK_TRAINING) if config.quick else preset("hand")
    steps = training.steps if config.steps is None else config.steps
    judge = PoseJudge(**QUICK_JUDGE, input_size=quick_size(sets)) if config.quick else PoseJudge()
    if config.judge_steps is not None:
        judge = dataclasses.replace(judge, steps=config.judge_steps)
    return dataclasses.replace(training, steps=steps, device=config.device), judge


def quick_size(sets: Sets) -> int:
    """What a quick pose network sees: the pictures' own size, or 64; a multiple of 16, so that it can be halved."""
    return min(64, -(-max(sets["validation"]["images"].shape[1:]) // 16) * 16)


def _sets(sets: Sets, joints: dict[str, Any], refined: Any, quick: bool) -> dict[str, tuple[Any, Any]]:
    """What pose networks are trained on, images and joints by name, in the order of Table 4."""
    synthetic = sets["synthetic"]["images"]
    if quick:
        one = slice(None)
    elif "camera" in sets["synthetic"]:  # the paper's ×1 is one of three cameras, its ×3 all of them
        one = sets["synthetic"]["camera"] == sets["synthetic"]["camera"].min()
    else:
        one = slice((len(synthetic) + 2) // 3)
    named = {
        "synthetic": (synthetic[one], joints["synthetic"][one]),
        "refined": (refined[one], joints["synthetic"][one]),
    }
    if "real" in joints:
        named["real"] = (sets["real"]["images"], joints["real"])
    if not quick:
        named["synthetic ×3"] = (synthetic, joints["synthetic"])
        named["refined ×3"] = (refined, joints["synthetic"])
    return named


def _compare(
    config: HandConfig, sets: dict[str, tuple[Any, Any]], images: Any, joints: Any, judge: PoseJudge
) -> dict[str, Any]:
    """Pose networks of every set and seed, each kept, and how near they come to ``joints``."""
    import numpy as np
    from tqdm import tqdm

    from fastsimgan.evaluation.comparison import statistics
    from fastsimgan.evaluation.pose_network import train_and_find_joints
    from fastsimgan.experiments.hand_report import PAPER_SIZE, table
    from fastsimgan.hardware.device import choose_device, keep_freed_memory
    from fastsimgan.metrics.joints import joint_errors, share_within
    from fastsimgan.metrics.statistics import difference_interval

    device = choose_device(config.device)
    keep_freed_memory()
    unit = max(images.shape[1:]) / PAPER_SIZE  # one pixel of the paper's, in these pictures' pixels
    errors: dict[str, list[Any]] = {name: [] for name in sets}
    steps = len(sets) * config.seeds * judge.steps
    bar = tqdm(total=steps, desc="pose networks", unit="step", dynamic_ncols=True, disable=cli.quiet())
    for seed in range(config.seeds):
        for name, (pictures, places) in sets.items():
            bar.set_postfix_str(f"{name}, seed {seed}")
            work = partial(
                train_and_find_joints, pictures, places, images,
                seed=seed, judge=judge, device=device, progress=bar.update,
            )  # fmt: skip
            found = cached_array(config.out, f"joints-{name}-{seed}", work)
            errors[name].append(joint_errors(found, joints) / unit)
            bar.update(sum(map(len, errors.values())) * judge.steps - bar.n)  # past what was kept
    bar.close()
    mean = np.broadcast_to(sets["synthetic"][1].mean(0), joints.shape)
    rows = {
        name: statistics([
            {"within_5px": float(share_within(each, np.array([5.0]))[0]), "mean_px": float(each.mean()),
             "median_px": float(np.median(each))}
            for each in all_errors
        ])
        for name, all_errors in {"constant": [joint_errors(mean, joints) / unit], **errors}.items()
    }  # fmt: skip
    distances = np.linspace(0, 20, 81)
    differences = {}
    for first, second in (("refined", "synthetic"), ("refined", "real"), ("refined ×3", "synthetic ×3")):
        if config.seeds > 1 and first in rows and second in rows:
            each = (rows[name]["within_5px"]["each"] for name in (first, second))
            differences[f"{first} above {second}"] = difference_interval(*each)
    result = {
        "rows": rows,
        "differences": differences,
        "distances": distances.tolist(),
        "within": {
            name: np.mean([share_within(each, distances) for each in all_errors], 0).tolist()
            for name, all_errors in errors.items()
        },
        "pixel": unit,
        "images": {name: len(pictures) for name, (pictures, _) in sets.items()},
    }
    print(table(result))
    return result


def _edges(out: Path, synthetic: Any, refined: Any, joints: Any, builtin: bool) -> dict[str, Any]:
    """Where the refiner's noise sits and how far edges by joints moved; and the same of the stand-in sensor itself."""
    import numpy as np

    from fastsimgan.data.pixel_values import from_float, to_float
    from fastsimgan.data.simulators.hands import through_sensor
    from fastsimgan.metrics.depth_edges import joint_edge_shifts, noise_by_place
    from fastsimgan.reporting.contact_sheet import save_rows

    chosen = np.sort(np.random.default_rng(0).permutation(len(synthetic))[:DRIFT_IMAGES])
    clean = synthetic[chosen]
    noisy = {"refiner": refined[chosen]}
    if builtin:
        noisy["stand-in sensor"] = through_sensor(clean, 0)
    result: dict[str, Any] = {"images": len(clean), "noise": {}, "drift": {}}
    for name, images in noisy.items():
        noise = noise_by_place(clean, images)
        result["noise"][name] = dataclasses.asdict(noise)
        shifts = joint_edge_shifts(clean, images, joints[chosen])
        known = shifts[np.isfinite(shifts)]
        result["drift"][name] = {
            "median_px": float(np.median(known)) if len(known) else None,
            "p90_px": float(np.quantile(known, 0.9)) if len(known) else None,
        }
        if name == "refiner":
            worst = np.argsort(-np.nan_to_num(shifts, nan=-1.0), kind="stable")[:8]
            rows = {"synthetic": clean[worst], "refined": images[worst]}
            save_rows(out / "moved_most.png", {key: from_float(to_float(each), "uint8") for key, each in rows.items()})
        print(
            f"{name}: noise {noise.edges.error:.4f} on depth edges, {noise.flat.error:.4f} on flat parts; "
            f"{noise.edges.lost:.1f} and {noise.flat.lost:.1f} % of the hand's pixels lost"
        )
    return result
