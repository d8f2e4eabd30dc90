"""What every command shares: flags from a dataclass, one-line errors, exit codes. Imports no torch.

Only parsing a command line needs tyro, and only this file imports it: a machine without it (one with a GPU and no
network) runs everything else. A settings class says what tyro should know by `flag` and `positional` in an
annotation, which is a string (``from __future__ import annotations``) until tyro looks at it.
"""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from fastsimgan.errors import FastSimGANError, UnavailableError

Config = TypeVar("Config")


def flag(name: str) -> Any:
    """For ``Annotated``: the setting's flag is ``--name``, whatever the field is called."""
    import tyro

    return tyro.conf.arg(name=name)


def positional() -> Any:
    """For ``Annotated``: the setting is given by its place, with no flag."""
    import tyro

    return tyro.conf.Positional


def run(
    command: Callable[[Config], int | None],
    config: type[Config] | Mapping[str, type[Any]],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    default: Config | None = None,
) -> int:
    """Parse ``argv`` into ``config`` and call ``command`` with it; return the process's exit code.

    ``config`` is a dataclass, or several by the command's first word (``make``, ``score``).

    A misspelt flag is answered by tyro with the nearest right one (exit code 2). An error that this package
    raises on purpose becomes one line on standard error and that error's own exit code; any other exception
    keeps its traceback, since it is a defect. Without tyro the exit code is 3.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        error = UnavailableError(f"{prog} needs tyro, which is not installed: pip install tyro")
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    parsed_as: Any = config
    if isinstance(config, Mapping):
        choices: list[Any] = [Annotated[each, tyro.conf.subcommand(word)] for word, each in config.items()]
        parsed_as = functools.reduce(operator.or_, choices)
    given: dict[str, Any] = {} if default is None else {"default": default}
    # Pillow's, from half of the size on at which it refuses a picture: such pictures are refined in tiles
    warnings.filterwarnings("ignore", message=".*could be decompression bomb DOS attack")
    parsed = tyro.cli(parsed_as, prog=prog, description=description, args=argv, **given)
    try:
        return command(parsed) or 0
    except FastSimGANError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        short = str(error).partition(" Of the allocated memory")[0]
        print(f"error: {short} Free some, or compute elsewhere: --device cpu", file=sys.stderr)
        return UnavailableError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left; torch has a class for it, which only its import brings."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
