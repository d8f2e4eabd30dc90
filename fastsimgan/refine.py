"""``python -m fastsimgan.refine``: every image of a folder or an array file through a refiner, labels untouched."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsimgan import cli

DESCRIPTION = """Refine every image of a folder (PNG, JPEG, TIFF; 8 or 16 bits; grey or RGB), an .npz or an .npy.

The output has the same names, sizes, bit depths and order. Other files of the folder, and other arrays of the .npz, are
copied byte for byte. A folder gets a metadata.jsonl, unless it has metadata already. PNG, TIFF and arrays are written
without loss; JPEG is written as JPEG of quality 95. Nothing is ever overwritten, and the output appears whole, at the
end, or not at all."""


@dataclass(frozen=True)
class RefineConfig:
    refiner: Path
    """Folder of a training run, or its refiner file."""
    input: Path
    """Folder of images, .npz with an array `images`, or .npy."""
    output: Path
    """What to make; it must not exist, and must be of the input's kind."""
    batch_size: int = 64
    """Images refined at a time; lower it for large images, it bounds the memory."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    on_error: Literal["fail", "skip"] = "fail"
    """At an image that cannot be read: stop and write nothing, or leave it and its sidecars out and say so."""


def refine(config: RefineConfig) -> None:
    """Check the input and output first: they are quick to check, and loading torch is not."""
    from fastsimgan.data.files import printable
    from fastsimgan.data.source import open_images
    from fastsimgan.pipeline import check_output, refine_source

    source = open_images(config.input)
    check_output(source, config.output)
    print(source.describe())

    from fastsimgan.runtime import load_refiner

    refiner = load_refiner(config.refiner, device=config.device)
    report = refine_source(
        source,
        refiner,
        config.output,
        batch_size=config.batch_size,
        on_error=config.on_error,
        progress=True,
    )
    for reason in report.skipped:
        print(f"skipped {reason}", file=sys.stderr)
    print(
        f"{printable(config.output)}: {report.images} images ({len(report.skipped)} skipped) "
        f"in {report.seconds:.1f} s, {report.images / report.seconds:.0f} images/s, "
        f"mean |R(x) - x| {report.mean_change:.2f} grey levels of 255, refiner sha256 {refiner.sha256}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(refine, RefineConfig, prog="python -m fastsimgan.refine", description=DESCRIPTION, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
