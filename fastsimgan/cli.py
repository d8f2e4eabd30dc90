"""What every command shares: flags from a dataclass, one-line errors, exit codes. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastsimgan.errors import FastSimGANError

Config = TypeVar("Config")


def run(
    command: Callable[[Config], int | None],
    config: type[Config],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    default: Config | None = None,
) -> int:
    """Parse ``argv`` into ``config`` and call ``command`` with it; return the process's exit code.

    A misspelt flag is answered by tyro with the nearest right one (exit code 2). An error that this package
    raises on purpose becomes one line on standard error and that error's own exit code; any other exception
    keeps its traceback, since it is a defect.
    """
    import tyro

    given: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(config, prog=prog, description=description, args=argv, **given)
    try:
        return command(parsed) or 0
    except FastSimGANError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
