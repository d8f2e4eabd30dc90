"""``python -m fastsimgan.data import KIND``: a public eye dataset, as it lies on the disk, into one packed ``.npz``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastsimgan import cli
from fastsimgan.errors import InputError

DESCRIPTION = """Pack a public eye dataset into one .npz with `images` and `pitch_yaw` (radians), which train, refine
and evaluate read. `import unityeyes` takes a folder of N.jpg with N.json, `import mpiigaze` the folder that holds
Data/Normalized. What was found and what was rejected, with the reason, is printed."""

SHOWN = 20  # rejected files; --report has all


@dataclass(frozen=True)
class ImportConfig:
    action: Annotated[Literal["import"], tyro.conf.Positional]
    kind: Annotated[Literal["unityeyes", "mpiigaze"], tyro.conf.Positional]
    input: Path
    """The dataset's folder."""
    output: Path
    """The .npz to write; it must not exist yet."""
    size: tuple[int, int] = (35, 55)
    """Height and width of the eyes: UnityEyes' are resampled, MPIIGaze's 36x60 cut."""
    evaluation: bool = False
    """MPIIGaze: only the eyes of its evaluation lists."""
    report: Path | None = None
    """Also write the report, with every rejected file, as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, import, report; return the exit code."""
    return cli.run(_import, ImportConfig, prog="python -m fastsimgan.data", description=DESCRIPTION, argv=argv)


def _import(config: ImportConfig) -> None:
    # here, so that --help stays quick
    from fastsimgan.data.files import printable, refuse_existing, staged
    from fastsimgan.data.mpiigaze import read_mpiigaze
    from fastsimgan.data.unityeyes import read_unityeyes

    if config.output.suffix != ".npz":
        raise InputError(f"{printable(config.output)}: --output must end in .npz")
    if min(config.size) < 1 or max(config.size) > 1024:
        raise InputError(f"--size must be from 1 to 1024, got {config.size[0]} {config.size[1]}")
    for path in filter(None, (config.output, config.report)):
        refuse_existing(path)
    if config.kind == "mpiigaze":
        found = read_mpiigaze(config.input, config.size, config.evaluation)
    elif config.evaluation:
        raise InputError("--evaluation is for mpiigaze, got unityeyes")
    else:
        found = read_unityeyes(config.input, config.size)

    count = len(found.arrays["images"])
    report = {"input": str(config.input), "kind": config.kind, "found": found.counts, "images": count}
    if config.report is not None:
        with staged(config.report) as partial:
            partial.write_text(json.dumps(report | {"rejected": found.rejected}, indent=1) + "\n", encoding="utf-8")
    met = ", ".join(f"{number} {name}" for name, number in found.counts.items())
    print(f"{printable(config.input)}: {met}; {count} eyes read, {len(found.rejected)} rejected")
    for reason in list(found.rejected.values())[:SHOWN]:
        print(f"  {reason}")
    if len(found.rejected) > SHOWN:
        print(f"  and {len(found.rejected) - SHOWN} more (--report FILE has all)")
    if count == 0:
        raise InputError(f"{printable(config.input)}: must hold at least one {config.kind} eye, got none")
    found.save(config.output)
    print(f"{printable(config.output)}: {count} eyes of {config.size[0]}x{config.size[1]}, {', '.join(found.arrays)}")


if __name__ == "__main__":
    sys.exit(main())
