"""`python -m fastsimgan.evaluate`: does the refined set train a better model than the synthetic one?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastsimgan import cli
from fastsimgan.errors import InputError
from fastsimgan.storage.atomic import refuse_existing

if TYPE_CHECKING:
    from fastsimgan.evaluation.task_network import Judge, Labelled

DESCRIPTION = """Train the same task network on the synthetic and on the refined images, test both on labelled real
images, and print a table: mean ± standard deviation over the seeds, and the prediction averaged over them.

The sets carry `pitch_yaw` (radians: the paper's gaze network) or `label` (classes): as arrays beside `images` in an
.npz or HDF5 file; or, in folders and shards, in JSON sidecars, a metadata.jsonl or .csv, or as one folder a class."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    synthetic: Path | None = None
    """Labelled synthetic images. Left out with the others: the built-in eyes, refined by --refiner."""
    refined: Path | None = None
    """The same images refined, or give --refiner."""
    real: Path | None = None
    """Labelled real images to test on; nothing is trained on them."""
    refiner: Path | None = None
    """Refine --synthetic with this run or file, in place of --refined."""
    equalised: bool = False
    """Add a row: the synthetic images with each histogram equalised, what a user would try before a refiner."""
    seeds: int = 5
    """Networks trained on each set, seeds 0, 1, ..."""
    steps: int | None = None
    """Steps of each network's training; default 600."""
    realism: bool = False
    """Also say how like the real images both sets look: KID, Fréchet distance, a classifier two-sample test."""
    features: str = "random"
    """In which --realism takes its two distances: `random`, a fixed random convolution; `task`, the hidden layer of a
    task network trained on the synthetic set; or an ONNX file of your own, float32 [N, C, H, W] in [-1, 1] to [N, d]
    or [N, d, h, w]."""
    drift: bool = False
    """Also say how far the iris and the edges moved from each synthetic image to its refined one, in pixels."""
    worst: Path | None = None
    """Draw the eight images that moved most, before and after, here (PNG); implies --drift."""
    json: Path | None = None
    """Write the numbers here."""
    plot: Path | None = None
    """Draw the share of test images within d degrees, for every d (Fig. 7), here (PNG; needs matplotlib)."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    images: str | None = None
    """Glob of the files that are images ('rgb/*.png'), where masks or the like lie beside them; '*': all that have an
    image's suffix."""
    key: str | None = None
    """Name of the array, dataset or group that holds the images, where it is not `images` and there are others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print the table; return the exit code."""
    return cli.run(
        evaluate_command, EvaluateConfig, prog="python -m fastsimgan.evaluate", description=DESCRIPTION, argv=argv
    )


def evaluate_command(config: EvaluateConfig) -> None:
    """The command itself, on parsed settings."""
    from fastsimgan.data.formats.open_images import refuse_inside

    for flag, path in (("--json", config.json), ("--plot", config.plot), ("--worst", config.worst)):
        if path is not None:
            refuse_existing(path)
            refuse_inside(path, flag, config.synthetic, config.refined, config.real)
    if config.refined is not None and config.refiner is not None:
        raise InputError(f"give --refined or --refiner, not both: got {config.refined} and {config.refiner}")

    from fastsimgan.evaluation.comparison import compare, equalised
    from fastsimgan.evaluation.tables import draw, table
    from fastsimgan.evaluation.task_network import Judge, number_classes, unseen_classes
    from fastsimgan.reporting.plots import check_matplotlib

    if config.plot is not None:
        check_matplotlib("--plot")  # missing matplotlib is better said now than after the training
    synthetic, refined, real = _sets(config)
    features = _features(config, real) if config.realism else None
    sets = {"synthetic": synthetic, "refined": refined}
    if config.equalised:
        sets["equalised"] = equalised(synthetic)
    drift = config.drift or config.worst is not None
    if drift and synthetic.images.shape != refined.images.shape:
        raise InputError(
            f"--drift needs each synthetic image refined, got {list(synthetic.images.shape)} and "
            f"{list(refined.images.shape)}"
        )
    if unseen := unseen_classes({**sets, "refined": refined}, real):
        cli.LOG.warning(f"{unseen}: no network can answer with these")
    number_classes(sets, real)  # refuses what cannot be classes
    judge = Judge() if config.steps is None else Judge(steps=config.steps)
    result, predictions = compare(sets, real, seeds=config.seeds, judge=judge, device=config.device)
    print(table(result))
    if config.realism:
        result["realism"] = _realism(synthetic, refined, real, judge, config, features)
    if drift:
        result["drift"] = _drift(synthetic, refined, config.worst)
    if config.json is not None:
        from fastsimgan.storage.atomic import write_atomically

        write_atomically(config.json, (json.dumps(result, indent=2) + "\n").encode())
        cli.LOG.info(f"numbers: {config.json}")
    if config.plot is not None:
        draw(config.plot, result["task"], predictions, real.labels)
        cli.LOG.info(f"plot: {config.plot}")


def _features(config: EvaluateConfig, real: Labelled) -> Callable[[Any], Any] | None:
    """--features, tried on two images before the training, not after; None for the task network, still to come."""
    from fastsimgan.metrics.features import onnx_features, random_features

    if config.features == "task":
        return None
    features = random_features if config.features == "random" else onnx_features(Path(config.features))
    features(real.images[:2])
    return features


def _realism(
    synthetic: Labelled, refined: Labelled, real: Labelled, judge: Judge, config: EvaluateConfig,
    features: Callable[[Any], Any] | None,
) -> dict[str, Any]:  # fmt: skip
    from fastsimgan.metrics.realism import realism

    if features is None:
        features = _task_features(synthetic, judge, config.device)
    print(f"{'against the real images':<24}{'KID':>10}{'Fréchet':>10}   told apart from them by a classifier")
    found = {}
    for name, part in (("synthetic", synthetic), ("refined", refined)):
        row = realism(part.images, real.images, features=features)
        found[name] = asdict(row)
        test = row.c2st
        print(
            f"{name:<24}{row.kid:>10.4f}{row.frechet:>10.4f}   "
            f"{test.accuracy:.1f} % (95 % interval {test.low:.1f} to {test.high:.1f}; 50 is guessing)"
        )
    named = {
        "random": "a fixed random convolution",
        "task": "the hidden layer of a network trained on the synthetic set",
    }
    print(f"features: {named.get(config.features, config.features)}; not the Inception distances of the literature")
    return {"features": config.features, **found}


def _task_features(synthetic: Labelled, judge: Judge, device: str) -> Callable[[Any], Any]:
    """Stored images to what the last layer of a task network sees, which was trained on the synthetic set."""
    from fastsimgan.evaluation.task_network import number_classes, run_network, train_network
    from fastsimgan.hardware.device import choose_device

    place = choose_device(device)
    synthetic = number_classes({}, synthetic)[1]
    classes = 0 if synthetic.task == "gaze" else 1 + int(synthetic.labels.max())
    network = train_network(synthetic, classes=classes, seed=0, judge=judge, device=place)
    return lambda images: run_network(network, images, place, hidden=True).double().numpy()


def _drift(synthetic: Labelled, refined: Labelled, worst: Path | None) -> dict[str, Any]:
    from fastsimgan.metrics.label_drift import describe, label_drift

    drift = label_drift(synthetic.images, refined.images)
    print(describe(drift))
    if worst is not None:
        from fastsimgan.data.pixel_values import from_float, to_float
        from fastsimgan.reporting.contact_sheet import save_rows

        rows = {
            name: from_float(to_float(part.images[drift["worst"]]), "uint8")
            for name, part in (("synthetic", synthetic), ("refined", refined))
        }
        save_rows(worst, rows)
        print(f"moved most: {worst}")
    return drift


def _sets(config: EvaluateConfig) -> tuple[Labelled, Labelled, Labelled]:
    from fastsimgan.data.formats.hdf5_file import HDF5Images
    from fastsimgan.data.formats.numpy_file import ArrayImages
    from fastsimgan.data.formats.open_images import open_images
    from fastsimgan.data.pixel_values import mismatch, value_range
    from fastsimgan.data.reading import Reading
    from fastsimgan.data.simulators.builtin import builtin_pair, builtin_validation
    from fastsimgan.evaluation.task_network import Labelled

    def read(name: str, path: Path) -> dict[str, Any]:
        source = open_images(path, Reading(images=config.images, key=config.key, links="inside"))
        cli.LOG.info(f"{name}: {source.describe()}")
        if isinstance(source, ArrayImages | HDF5Images):
            for label in {"pitch_yaw", "label"} & set(source.other_names):
                shape = list(source.others()[label].shape)
                raise InputError(f"{path}: array {label} must have length {len(source)}, one row an image, got {shape}")
        images = source.load()
        cli.LOG.info(f"{name}: values {value_range(images)}")
        return {"images": images, **source.labels()}

    if config.synthetic is None and config.real is None and config.refined is None:
        if config.refiner is None:
            raise InputError("give --refiner RUN for the built-in eyes, or --synthetic, --refined and --real")
        seed = 0
        arrays, real = builtin_pair(seed)[0], builtin_validation(seed)
    elif config.synthetic is None or config.real is None or (config.refined is None and config.refiner is None):
        raise InputError("give --synthetic, --real and one of --refined and --refiner")
    else:
        arrays, real = read("synthetic", config.synthetic), read("real", config.real)
    if config.refiner is not None:
        from fastsimgan.inference import load_refiner

        refined = {**arrays, "images": load_refiner(config.refiner, config.device)(arrays["images"])}
    else:
        assert config.refined is not None
        refined = read("refined", config.refined)
    names = [
        str(path) for path in (config.synthetic or "built-in", config.refined or "refined", config.real or "built-in")
    ]
    synthetic, refined_set, real_set = (
        Labelled.from_arrays(part, name) for part, name in zip((arrays, refined, real), names, strict=True)
    )
    if warning := mismatch(value_range(synthetic.images), value_range(real_set.images)):
        cli.LOG.warning(warning)
    return synthetic, refined_set, real_set


class _Callable(ModuleType):
    """`fastsimgan.evaluate` names both this command and the function of the Python API: the module answers a call."""

    def __call__(
        self, synthetic: dict[str, Any], refined: dict[str, Any], real: dict[str, Any], *, seeds: int = 5,
        steps: int = 600, device: str = "auto",
    ) -> dict[str, Any]:  # fmt: skip
        """Compare two labelled sets by the networks they train, as `evaluation.comparison.evaluate`.

        Args:
            synthetic, refined, real: ``images`` (``[N, H, W]`` or ``[N, H, W, C]``) with ``pitch_yaw`` (radians) or
                ``label`` (classes).
            seeds: networks for each set.
            steps: training steps of each.
            device: "auto", "cpu", "cuda" or "cuda:1".

        Returns:
            What ``--json`` writes: ``task``, ``rows`` and ``differences``.

        Raises:
            InputError: the sets differ in task or size, or a number is out of range.
        """
        from fastsimgan.evaluation.comparison import evaluate

        return evaluate(synthetic, refined, real, seeds=seeds, steps=steps, device=device)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
