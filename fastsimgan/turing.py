"""`python -m fastsimgan.turing`: the visual Turing test (§3.1.2). People say of each image whether it is real."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastsimgan import cli

DESCRIPTION = """A visual Turing test: `make` writes one HTML page that needs no network and shows real and refined
images in random order; whoever answers downloads a JSON file; `score` counts these."""


@dataclass(frozen=True)
class Make:
    """Write the page."""

    real: Path
    """Real images: a folder, .npz or .npy."""
    refined: Path
    """Refined images (or any others to be told from real ones). Of images of several sizes the middle is shown."""
    out: Path
    """The page, an .html that must not exist yet."""
    count: int = 50
    """Images of each kind."""
    at_a_time: int = 20
    """Images on the screen."""
    seed: int = 0
    """Of the choice and the order."""
    title: str = "Real or refined?"
    """Heading of the page."""
    images: str | None = None
    """Glob of the files that are images ('rgb/*.png'), where masks or the like lie beside them; '*': all that have an
    image's suffix. Among real images it counts only if some name matches."""
    key: str | None = None
    """Name of the array, dataset or group that holds the images, where it is not `images` and there are others."""


@dataclass(frozen=True)
class Score:
    """Count answers."""

    answers: Annotated[tuple[Path, ...], cli.positional()]
    """The JSON files that people downloaded, all of one page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, make or score; return the exit code."""
    either = {"make": Make, "score": Score}
    return cli.run(_run, either, prog="python -m fastsimgan.turing", description=DESCRIPTION, argv=argv)


def _run(config: Make | Score) -> None:
    # here, so that --help stays quick
    from fastsimgan.evaluation.turing_test import make, report, score

    if isinstance(config, Make):
        make(**vars(config))
    else:
        print(report(score(config.answers)))


if __name__ == "__main__":
    sys.exit(main())
