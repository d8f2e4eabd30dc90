"""``python -m fastsimgan.data import KIND``: a public dataset, as it lies on the disk, into one packed ``.npz``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastsimgan import cli
from fastsimgan.errors import InputError

DESCRIPTION = """Pack a public dataset into one .npz, which train, refine, evaluate and experiments read: eyes with
`images` and `pitch_yaw` (radians), depth hands with `images` and `joints` (pixels). `import unityeyes` takes a folder
of N.jpg with N.json, `import mpiigaze` the folder that holds Data/Normalized, `import nyu-hands` NYU Hand Pose's train
or test. What was found and what was rejected, with the reason, is printed."""

SHOWN = 20  # rejected files; --report has all


@dataclass(frozen=True)
class ImportConfig:
    action: Annotated[Literal["import"], cli.positional()]
    kind: Annotated[Literal["unityeyes", "mpiigaze", "nyu-hands"], cli.positional()]
    input: Path
    """The dataset's folder."""
    output: Path
    """The .npz to write; it must not exist yet."""
    size: tuple[int, int] | None = None
    """Height and width; default 35 55 for eyes (UnityEyes' are resampled, MPIIGaze's 36x60 cut), 224 224 for hands."""
    evaluation: bool = False
    """MPIIGaze: only the eyes of its evaluation lists."""
    rendered: bool = False
    """NYU hands: the rendered ones, in place of the real ones."""
    cameras: tuple[int, ...] = (1, 2, 3)
    """NYU hands: of these cameras."""
    report: Path | None = None
    """Also write the report, with every rejected file, as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, import, report; return the exit code."""
    return cli.run(_import, ImportConfig, prog="python -m fastsimgan.data", description=DESCRIPTION, argv=argv)


def _import(config: ImportConfig) -> None:
    # here, so that --help stays quick
    from fastsimgan.storage.atomic import refuse_existing, staged
    from fastsimgan.storage.names import printable

    if config.output.suffix != ".npz":
        raise InputError(f"{printable(config.output)}: --output must end in .npz")
    hands = config.kind == "nyu-hands"
    size = config.size or ((224, 224) if hands else (35, 55))
    if min(size) < 1 or max(size) > 1024:
        raise InputError(f"--size must be from 1 to 1024, got {size[0]} {size[1]}")
    for path in filter(None, (config.output, config.report)):
        refuse_existing(path)
    if config.evaluation and config.kind != "mpiigaze":
        raise InputError(f"--evaluation is for mpiigaze, got {config.kind}")
    if (config.rendered or config.cameras != (1, 2, 3)) and not hands:
        raise InputError(f"--rendered and --cameras are for nyu-hands, got {config.kind}")
    count, arrays, counts, rejected = _hands(config, size) if hands else _eyes(config, size)

    report = {"input": str(config.input), "kind": config.kind, "found": counts, "images": count}
    if config.report is not None:
        with staged(config.report) as partial:
            partial.write_text(json.dumps(report | {"rejected": rejected}, indent=1) + "\n", encoding="utf-8")
    met = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{printable(config.input)}: {met}; {count} read, {len(rejected)} rejected")
    for reason in list(rejected.values())[:SHOWN]:
        print(f"  {reason}")
    if len(rejected) > SHOWN:
        print(f"  and {len(rejected) - SHOWN} more (--report FILE has all)")
    if count == 0:
        raise InputError(f"{printable(config.input)}: must hold at least one image of {config.kind}, got none")
    print(f"{printable(config.output)}: {count} images of {size[0]}x{size[1]}, {', '.join(arrays)}")


Found = tuple[int, list[str], dict[str, int], dict[str, str]]
"""How many images were written, the arrays' names, what the scan met, and what was rejected, reason by name."""


def _eyes(config: ImportConfig, size: tuple[int, int]) -> Found:
    from fastsimgan.data.datasets.mpiigaze import read_mpiigaze
    from fastsimgan.data.datasets.unityeyes import read_unityeyes

    if config.kind == "mpiigaze":
        found = read_mpiigaze(config.input, size, config.evaluation)
    else:
        found = read_unityeyes(config.input, size)
    if len(found.arrays["images"]):
        found.save(config.output)
    return len(found.arrays["images"]), list(found.arrays), found.counts, found.rejected


def _hands(config: ImportConfig, size: tuple[int, int]) -> Found:
    from tqdm import tqdm

    from fastsimgan.data.datasets.nyu_hands import import_nyu_hands

    if size[0] != size[1]:
        raise InputError(f"--size must be square for nyu-hands, got {size[0]} {size[1]}")
    with tqdm(unit="frame", dynamic_ncols=True, disable=cli.quiet()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = import_nyu_hands(
            config.input, config.output,
            rendered=config.rendered, cameras=config.cameras, size=size[0], progress=progress,
        )  # fmt: skip
    return found.images, found.arrays, found.counts, found.rejected


if __name__ == "__main__":
    sys.exit(main())
