"""``python -m fastsimgan.export``: a refiner as ONNX files that agree with PyTorch, and the way to TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsimgan import cli

DESCRIPTION = """Write a trained refiner as ONNX files, each compared with PyTorch on real or built-in images.

Into --out: refiner.onnx (float32), refiner.fp16.onnx, refiner.u8.fp16.onnx (uint8 in and out, everything inside),
--quantise's files, export.json (hashes, parity), worst.*.png, README.md (a model card: how to call each file) and
trtexec10.sh, trtexec11.sh. Batch, height and width are free. The folder appears whole, or not at all if a file does not
agree."""


@dataclass(frozen=True)
class ExportConfig:
    refiner: Path
    """Folder of a training run, or its refiner.safetensors."""
    out: Path
    """Folder to write; it must not exist."""
    images: Path | None = None
    """Synthetic images like those to be refined, to compare (64) and calibrate (64) on: folder, shards or arrays. Where
    masks or the like lie among them, a quoted glob tells which are images: 'renders/rgb/*.png'. Left out: the built-in
    eyes."""
    key: str | None = None
    """Name of the array, dataset or group in --images that holds them, where it is not `images`."""
    quantise: tuple[Literal["int8-cpu", "int8-tensorrt", "fp8"], ...] = ()
    """8-bit files to write too."""
    min_psnr: float = 50.0
    """Least PSNR of an 8-bit file against PyTorch, in dB (50 dB is 0.8 grey levels, root mean square)."""
    trtexec: Literal[10, 11] | None = None
    """Print the trtexec command for this major version of TensorRT."""
    engine: Literal["tensorrt", "tensorrt-rtx"] | None = None
    """Build an engine of refiner.u8.fp16.onnx with this library for the GPU that is here, into the engine cache."""
    sm: str | None = None
    """With --engine tensorrt-rtx, and no GPU needed: build for this architecture, such as sm_89."""
    batch: tuple[int, int, int] = (1, 512, 512)
    """Smallest, usual and largest batch of the engine and of the trtexec command."""
    size: tuple[int, int] | None = None
    """Height and width of the engine's images. Left out: those of --images (or of the built-in eyes)."""


def export_command(config: ExportConfig) -> None:
    """The command itself, on parsed settings."""
    from fastsimgan.data.formats.open_images import refuse_inside
    from fastsimgan.errors import InputError
    from fastsimgan.storage.atomic import refuse_existing
    from fastsimgan.storage.names import printable

    refuse_existing(config.out)
    refuse_inside(config.out, "--out", config.images)
    if config.sm is not None and config.engine != "tensorrt-rtx":
        raise InputError(f"--sm goes with --engine tensorrt-rtx, got {config.sm}")

    from fastsimgan.exporting.export import engine, export
    from fastsimgan.inference.tensorrt_backend import library

    if config.engine is not None:
        library(config.engine)  # missing, it is better said now than after the export
    export(
        config.refiner,
        config.out,
        images=config.images,
        key=config.key,
        quantise=config.quantise,
        min_psnr=config.min_psnr,
        batch=config.batch,
        size=config.size,
    )
    cli.LOG.info(f"{printable(config.out)}: how to call each file is in README.md")
    if config.trtexec is not None:
        print((config.out / f"trtexec{config.trtexec}.sh").read_text(), end="")
    if config.engine is not None:
        path = engine(config.out, config.engine, batch=config.batch, size=config.size, sm=config.sm)
        cli.LOG.info(f"engine: {printable(path)}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(export_command, ExportConfig, prog="python -m fastsimgan.export", description=DESCRIPTION, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
