"""`python -m fastsimgan.demo`: the whole job on the built-in eyes, in minutes on two cores (`make demo`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsimgan import cli
from fastsimgan.errors import InputError

DESCRIPTION = """Train a refiner on the built-in eyes (preset quick), train the gaze network on synthetic and on refined
eyes, test both on labelled eyes of the real side's stand-in, and print the table."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    """Folder of the run; it must not exist."""
    seeds: int = 2
    """Networks trained on each set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code."""
    return cli.run(demo, DemoConfig, prog="python -m fastsimgan.demo", description=DESCRIPTION, argv=argv)


def demo(config: DemoConfig) -> None:
    """Train, evaluate, report."""
    if config.out.exists():
        raise InputError(f"{config.out}: --out must not exist yet (remove it, or name another)")
    started = time.monotonic()
    from fastsimgan.config import preset
    from fastsimgan.evaluate import EvaluateConfig, evaluate_command
    from fastsimgan.train import train

    train(preset("quick", out=config.out))
    evaluate_command(
        EvaluateConfig(refiner=config.out, seeds=config.seeds, steps=DEMO_STEPS, json=config.out / "evaluation.json")
    )
    cli.LOG.info(
        f"contact sheet: {config.out / 'contact_sheet.png'}   ({(time.monotonic() - started) / 60:.1f} minutes)"
    )


DEMO_STEPS = 300  # of each task network: fewer than evaluate's own, so that the demo ends in minutes

if __name__ == "__main__":
    sys.exit(main())
