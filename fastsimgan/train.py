"""`python -m fastsimgan.train`: a folder of synthetic and a folder of real images in, a refiner out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from fastsimgan import cli
from fastsimgan.config import PRESETS, TrainConfig, preset
from fastsimgan.errors import FastSimGANError, InputError

DESCRIPTION = """Train a SimGAN refiner: a network that makes synthetic images look real while their labels stay true.

Give --synthetic and --real (folders of images, .npz, .npy or HDF5 files, .tar shards), or neither for the built-in
procedural eyes. What comes out, in --out: refiner.safetensors, contact_sheet.png, metrics.jsonl, config.json,
checkpoints/ and pictures/."""

#: What a resumed run may change without ceasing to be the same run.
_FREE_ON_RESUME = {"out", "resume", "dry_run", "device", "picture_every", "checkpoint_every", "keep", "data", "profile"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read both sets of images, train; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        default = _default(arguments)
    except FastSimGANError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return cli.run(
        train, TrainConfig, prog="python -m fastsimgan.train", description=DESCRIPTION, argv=arguments, default=default
    )


def train(config: TrainConfig) -> None:
    """The command itself, on parsed settings."""
    config.validate()
    if config.resume:
        _check_unchanged(config)
    elif config.out.exists() and not config.dry_run:
        raise InputError(f"{config.out}: --out must not exist yet, or --resume goes on with it")

    from fastsimgan.data.builtin import builtin_pair
    from fastsimgan.data.source import open_images

    if config.synthetic is None or config.real is None:
        synthetic, real = (part["images"] for part in builtin_pair(config.seed))
        print(f"built-in eyes: {len(synthetic)} synthetic, {len(real)} of the stand-in for real ones (simulated too)")
    else:
        sources = open_images(config.synthetic), open_images(config.real)
        for name, source in zip(("synthetic", "real"), sources, strict=True):
            print(f"{name}: {source.describe()}")
        synthetic, real = (source.load() for source in sources)

    from fastsimgan.training import fit

    fit(synthetic, real, config)


def _default(arguments: Sequence[str]) -> TrainConfig:
    """The settings that flags override: those of the run that is resumed, or of the preset."""

    def given(flag: str) -> str | None:
        for position, argument in enumerate(arguments):
            if argument == flag and position + 1 < len(arguments):
                return arguments[position + 1]
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2]
        return None

    if "--resume" in arguments:
        return _saved(Path(given("--out") or TrainConfig.out))
    name = given("--preset") or ("gaze" if given("--synthetic") else "quick")
    return preset(name) if name in PRESETS else TrainConfig()  # an unknown name is the parser's to answer


def _saved(out: Path) -> TrainConfig:
    path = out / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: --resume needs the folder of an earlier run (--out)")
    return dataclasses.replace(TrainConfig.from_json(path.read_text()), out=out)


def _check_unchanged(config: TrainConfig) -> None:
    saved = _saved(config.out)
    for field in dataclasses.fields(TrainConfig):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in _FREE_ON_RESUME and before != now:
            flag = "lambda" if field.name == "lam" else field.name.replace("_", "-")
            raise InputError(f"--{flag} must stay {before} when resuming {config.out}, got {now}")


if __name__ == "__main__":
    sys.exit(main())
