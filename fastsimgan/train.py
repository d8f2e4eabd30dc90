"""`python -m fastsimgan.train`: a folder of synthetic and a folder of real images in, a refiner out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsimgan import cli
from fastsimgan.config import FREE_ON_RESUME, PRESETS, TrainConfig, preset
from fastsimgan.errors import BAD_SHARE, SKIP, InputError

PROG = "python -m fastsimgan.train"
DESCRIPTION = """Train a SimGAN refiner: a network that makes synthetic images look real while their labels stay true.

Give --synthetic and --real (folders of images, .npz, .npy or HDF5 files, .tar shards), or neither for the built-in
procedural eyes. What comes out, in --out: refiner.safetensors, contact_sheet.png, metrics.jsonl, config.json,
checkpoints/ and pictures/."""


@dataclasses.dataclass(frozen=True)
class _Given:
    """The flags that decide about the defaults of all."""

    synthetic: Path | None = None
    out: Path = TrainConfig.out
    preset: str | None = None
    resume: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read both sets of images, train; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def parsed() -> int:
        # tyro's way of presets is subcommands: these would know nothing of --resume, whose defaults are in a file, nor
        # of what a run without data is
        given = cli.parse_known(_Given, arguments, prog=PROG)
        return cli.run(train, TrainConfig, prog=PROG, description=DESCRIPTION, argv=arguments, default=_default(given))

    return cli.exit_code(parsed)


def train(config: TrainConfig) -> None:
    """The command itself, on parsed settings."""
    from fastsimgan.data.formats.open_images import refuse_inside

    config.validate()
    refuse_inside(config.out, "--out", config.synthetic, config.real)
    if config.resume:
        _check_unchanged(config)
    elif config.out.exists() and not config.dry_run:
        raise InputError(f"{config.out}: --out must not exist yet, or --resume goes on with it")

    from fastsimgan.data.simulators.builtin import builtin_pair

    if config.synthetic is None or config.real is None:
        synthetic, real = (part["images"] for part in builtin_pair(config.seed))
        cli.LOG.info(
            f"built-in eyes: {len(synthetic)} synthetic, {len(real)} of the stand-in for real ones (simulated too)"
        )
    else:
        synthetic, real = _both_sides(config, config.synthetic, config.real)

    from fastsimgan.training.loop import fit

    fit(synthetic, real, config)


def _both_sides(config: TrainConfig, synthetic: Path, real: Path) -> tuple[Any, Any]:
    """Both sets of images, after saying what was found.

    Synthetic images are read as stored: labels belong to them. Real ones carry none, so they are turned upright and
    made grey or RGB, as the synthetic ones are.
    """
    from fastsimgan.data.formats.open_images import open_images
    from fastsimgan.data.pixel_values import UNIT
    from fastsimgan.data.reading import Reading, in_the_colour

    reading = Reading(
        images=config.images,
        key=config.key,
        links="all" if config.follow_links else "inside",
        on_error=config.on_error,
        any_size=True,
        colour="as stored" if config.colour == "auto" else config.colour,
        span=config.range or UNIT,
        skipping=SKIP,
        colouring="--colour rgb or --colour grey makes them alike",
    )
    ours = open_images(synthetic, reading)
    cli.LOG.info(f"synthetic: {ours.describe()}")
    theirs = _open_real(
        real, dataclasses.replace(reading, upright=True, images=config.real_images or config.images), config
    )
    cli.LOG.info(f"real: {theirs.describe()}")
    images = in_the_colour(_set_of(ours), config.colour)
    _say_left_out("synthetic", ours, len(images), config)
    photos = _photos(theirs, images, config)
    _say_values(images, photos, config)
    return images, photos


def _photos(theirs: Any, images: Any, config: TrainConfig) -> Any:
    """The real images, made like the synthetic ones in colour and scale."""
    from fastsimgan.data.ragged import channels_of
    from fastsimgan.data.reading import in_the_colour
    from fastsimgan.data.resizing import rescale

    colour = config.colour
    if colour == "auto":
        channels = channels_of(images)
        colour = "grey" if channels == 1 else "rgb" if channels == 3 else "auto"
    scale = _scale(config, images)
    if hasattr(theirs, "reading"):
        read_as = "as stored" if colour == "auto" else colour
        theirs.reading = dataclasses.replace(theirs.reading, colour=read_as, scale=scale)
        stored = _set_of(theirs)
        resized = theirs.resized
    else:
        stored = rescale(as_found := _set_of(theirs), scale)
        resized = 0 if stored is as_found else len(stored)
    if resized:
        cli.LOG.info(f"real: {resized} of {len(stored)} images {_scale_text(config, scale)}")
    photos = in_the_colour(stored, colour)
    _say_left_out("real", theirs, len(photos), config)
    if converted := getattr(theirs, "converted", 0) or (len(photos) if photos is not stored else 0):
        of = "--colour says" if config.colour != "auto" else "the synthetic ones are"
        cli.LOG.info(f"real: {converted} of {len(photos)} images made {'RGB' if colour == 'rgb' else 'grey'}, as {of}")
    return photos


def _say_values(images: Any, photos: Any, config: TrainConfig) -> None:
    """What values both sides have, and what is odd about them."""
    from fastsimgan.data.pixel_values import UNIT, mismatch, value_range
    from fastsimgan.data.reading import grey_in_colour

    if grey_in_colour(images):
        cli.LOG.info("synthetic: RGB with R = G = B in all that were looked at; --colour grey trains on one channel")
    span = config.range or UNIT
    ranges = value_range(images, span), value_range(photos, span)
    of = "" if config.range is None else f", where these are --range's {config.range[0]:g} and {config.range[1]:g}"
    for name, found in zip(("synthetic", "real"), ranges, strict=True):
        cli.LOG.info(f"{name}: values {found}{of}")
    if warning := mismatch(*ranges):
        cli.LOG.warning(warning)


def _set_of(source: Any) -> Any:
    return source.load_set() if hasattr(source, "load_set") else source.load()


def _scale(config: TrainConfig, synthetic: Any) -> Any:
    """What --resize-real means for the real images."""
    from fastsimgan.data.resizing import Scale, median_height

    if config.resize_real == "auto":
        return Scale(height=median_height(synthetic))
    return Scale(factor=1.0 if isinstance(config.resize_real, str) else config.resize_real)


def _scale_text(config: TrainConfig, scale: Any) -> str:
    if config.resize_real == "auto":
        return f"brought to {scale.height} pixels' height, the synthetic ones' median (--resize-real none: not)"
    return f"resized by {scale.factor:g} (--resize-real)"


def _open_real(path: Path, reading: Any, config: TrainConfig) -> Any:
    """The real side; a glob that was given for both sides and that nothing matches here is left aside."""
    from fastsimgan.data.formats.open_images import matches, open_images
    from fastsimgan.data.reading import real_images_flag

    reading = dataclasses.replace(reading, flag=real_images_flag)
    if config.images is not None and config.real_images is None and not matches(path, reading):
        cli.LOG.info(f"real: no name matches --images {config.images!r}: judged without it")
        reading = dataclasses.replace(reading, images=None)
    return open_images(path, reading)


def _say_left_out(name: str, source: Any, kept: int, config: TrainConfig) -> None:
    """Name what was left out. Raises InputError if it is too much."""
    left_out: list[str] = getattr(source, "left_out", [])
    for reason in left_out:
        cli.LOG.info(f"left out: {reason}")
    if len(left_out) > BAD_SHARE * (kept + len(left_out)):
        raise InputError(
            f"{config.synthetic if name == 'synthetic' else config.real}: at most {BAD_SHARE:.0%} of the images may be "
            f"bad, got {len(left_out)} of {kept + len(left_out)}"
        )


def _default(given: _Given) -> TrainConfig:
    """The settings that flags override: those of the run that is resumed, or of the preset."""
    if given.resume:
        return _saved(given.out)
    name = given.preset or ("gaze" if given.synthetic else "quick")
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
        if field.name not in FREE_ON_RESUME and before != now:
            flag = "lambda" if field.name == "lam" else field.name.replace("_", "-")
            raise InputError(f"--{flag} must stay {before} when resuming {config.out}, got {now}")


if __name__ == "__main__":
    sys.exit(main())
