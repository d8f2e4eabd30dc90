"""What every experiment does alike: its folder, filled step by step, so that a kill loses one step and no more."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsimgan import __version__, cli
from fastsimgan.errors import InputError

if TYPE_CHECKING:
    from fastsimgan.config import TrainConfig
    from fastsimgan.reporting.html_report import Report

SETS = ("synthetic", "real", "validation")
Sets = dict[str, dict[str, Any]]


def check_sets(config: Any, builtin: str) -> None:
    """InputError unless ``config`` names all three of `SETS` or none of them, which means the built-in ``builtin``."""
    given = [getattr(config, name) is not None for name in SETS]
    if any(given) and not all(given):
        raise InputError(f"give --synthetic, --real and --validation, or none of them for the built-in {builtin}")


def check_counts(config: Any, *names: str) -> None:
    """InputError on the first of these settings that is given and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_installed(seeds: int) -> None:
    """UnavailableError if what the report will need is not installed: better said now than after the training."""
    from fastsimgan.metrics.statistics import check_scipy
    from fastsimgan.reporting.plots import check_matplotlib

    check_matplotlib("the report")
    if seeds > 1:
        check_scipy()


def read_sets(config: Any) -> tuple[Sets, dict[str, str]]:
    """The arrays of ``config.synthetic``, ``.real`` and ``.validation`` by name, and each file's SHA-256.

    Raises:
        InputError: one is no packed array, breaks its rules, or --validation is the file given as --real.
    """
    from fastsimgan.data.formats.open_images import open_images
    from fastsimgan.storage.checksum import hash_file
    from fastsimgan.storage.names import printable

    paths: dict[str, Path] = {name: getattr(config, name) for name in SETS}
    for name, path in paths.items():
        if path.suffix not in (".npz", ".npy"):
            raise InputError(f"{printable(path)}: --{name} must be an .npz or .npy file")
    hashes = {name: hash_file(path) for name, path in paths.items()}
    if hashes["real"] == hashes["validation"]:
        raise InputError(f"{printable(paths['validation'])}: --validation must not be the file given as --real")
    sources = {name: open_images(path) for name, path in paths.items()}
    return {name: {"images": source.load(), **source.labels()} for name, source in sources.items()}, hashes


def hash_sets(sets: Sets, *keys: str) -> dict[str, str]:
    """The SHA-256 of these arrays' bytes, of each set: of sets that lie in no file."""
    digests = {}
    for name, arrays in sets.items():
        digest = hashlib.sha256()
        for key in keys:
            digest.update(arrays[key].tobytes())
        digests[name] = digest.hexdigest()
    return digests


def claim(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Make ``out`` the folder of one experiment, or see that it is: all steps kept in it were made of the same things.

    Args:
        out: the folder.
        identity: all that decides about a result, in values that JSON can hold (others as text).

    Returns:
        The identity as JSON gives it back.

    Raises:
        InputError: ``out`` holds another experiment, or something else.
    """
    from fastsimgan.storage.atomic import write_atomically

    identity = json.loads(json.dumps({"version": __version__} | identity, default=str))
    path = out / "experiment.json"
    if path.is_file():
        there = json.loads(path.read_text())
        changed = [name for name in identity | there if there.get(name) != identity.get(name)]
        if changed:
            raise InputError(f"{out}: --out holds an experiment with another {', '.join(changed)}; name another folder")
        return identity
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: --out must be new, empty, or a folder that this experiment began")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(identity, indent=2) + "\n").encode())
    return identity


def cached(out: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``work``'s result, kept as ``name.json``; not done again if that is there."""
    from fastsimgan.storage.atomic import write_atomically

    path = out / f"{name}.json"
    if not path.is_file():
        write_atomically(path, (json.dumps(work()) + "\n").encode())
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def cached_array(out: Path, name: str, work: Callable[[], Any]) -> Any:
    """The same for one array, kept as ``name.npy``, with - for each space and x for each ×."""
    import numpy as np

    from fastsimgan.storage.atomic import staged

    path = out / f"{name.replace(' ', '-').replace('×', 'x')}.npy"
    if not path.is_file():
        array = work()
        with staged(path) as partial:
            np.save(partial, array, allow_pickle=False)
    return np.load(path, allow_pickle=False)


def refined_by(out: Path, name: str, training: TrainConfig, synthetic: Any, real: Any, images: Any = None) -> Any:
    """``images`` (default: ``synthetic``) as a refiner makes them: trained, or trained on, or read if it is done.

    Args:
        out: the experiment's folder; the refiner's run is ``refiner-NAME`` in it.
        name: of the refiner, such as its seed.
        training: its settings, seed and all.
        synthetic, real: stored images that it is trained on.
        images: stored images that it refines.

    Returns:
        Images like those, kept as ``refined-NAME.npy``.
    """
    from fastsimgan.inference import load_refiner
    from fastsimgan.training.loop import fit

    folder = out / f"refiner-{name}"

    def work() -> Any:
        # A run holds a refiner from its start on; the trainer knows whether it is done, and does nothing if so.
        fit(synthetic, real, dataclasses.replace(training, out=folder, resume=folder.exists()))
        return load_refiner(folder, training.device)(synthetic if images is None else images)

    return cached_array(out, f"refined-{name}", work)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import numpy as np
    import torch

    return {
        "fastsimgan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_report(out: Path, report: Report, numbers: dict[str, Any]) -> None:
    """Close ``report`` with how to get it again; write report.html and, last, report.json.

    Args:
        out: the experiment's folder.
        report: the page.
        numbers: what report.json holds; ``command``, ``versions`` and ``data_sha256`` are told in the page too.
    """
    from fastsimgan.storage.atomic import write_atomically

    report.heading("How to get this again")
    report.paragraph(numbers["command"])
    report.table(["version of", ""], [[name, text] for name, text in numbers["versions"].items()])
    report.table(["data", "SHA-256"], [[name, text] for name, text in numbers["data_sha256"].items()])
    write_atomically(out / "report.html", report.html().encode())
    write_atomically(out / "report.json", (json.dumps(numbers, indent=2) + "\n").encode())
    cli.LOG.info(f"report: {out / 'report.html'}")
