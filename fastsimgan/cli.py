"""What every command shares: flags from a dataclass, messages, one-line errors, exit codes. Imports no torch.

Only parsing a command line needs tyro, and only this file imports it: a machine without it (one with a GPU and no
network) runs everything else. A settings class says what tyro should know by `flag` and `positional` in an
annotation, which is a string (``from __future__ import annotations``) until tyro looks at it.

What a command prints is its results, by ``print``, and messages, through `LOG`: what it found, how far it is, what it
warns of. ``--quiet`` leaves the messages out but for warnings, and progress bars.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastsimgan.errors import FastSimGANError, UnavailableError

Config = TypeVar("Config")

LOG = logging.getLogger("fastsimgan")
"""Messages, printed on standard output from INFO on, also where no command was parsed: set its level to change that.
Debugging ones come from all modules, by loggers of their own below this one."""


@dataclass(frozen=True)
class Messages:
    """Which messages a command prints. Results and errors are always printed."""

    quiet: bool = False
    """Print results, warnings and errors alone, and no progress bars."""
    verbose: bool = False
    """Print also what helps where something goes wrong: files that are written, what was chosen, and where in the code
    an error comes from."""

    @property
    def level(self) -> int:
        """Of the messages that are printed, at least."""
        return logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO


def flag(name: str | None = None, *, also: Sequence[str] = ()) -> Any:
    """For ``Annotated``: the setting's flag is ``--name``, whatever the field is called; and each of ``also``."""
    import tyro

    return tyro.conf.arg(name=name, aliases=tuple(f"--{other}" for other in also) or None)


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
    """Parse ``argv`` into ``config``, call ``command`` with it, and give the process's exit code (see `exit_code`).

    A misspelt flag is answered by tyro with the nearest right one (exit code 2). Without tyro the exit code is 3.

    Args:
        command: what to do; gives its exit code, None for 0.
        config: a dataclass, or several by the command's first word (``make``, ``score``).
        prog: the command, as help names it.
        description: what it does, for help.
        argv: the arguments; None is this process's own.
        default: what flags override; None is the dataclass's own defaults.
    """

    def parsed_and_called() -> int | None:
        settings, messages = _parse(config, prog, description, argv, default)
        # Pillow's, from half of the size on at which it refuses a picture: such pictures are refined in tiles
        warnings.filterwarnings("ignore", message=".*could be decompression bomb DOS attack")
        with _printing(messages.level):
            return _named(lambda: command(settings))

    return exit_code(parsed_and_called)


def parse_known(flags: type[Config], argv: Sequence[str], *, prog: str) -> Config:
    """The flags of a dataclass out of ``argv``, whatever else is there: what the defaults of others depend on.

    Raises:
        UnavailableError: tyro is not installed.
    """
    found, _ = _tyro(prog).cli(flags, prog=prog, args=argv, return_unknown_args=True, add_help=False)
    settings: Config = found
    return settings


def exit_code(command: Callable[[], int | None]) -> int:
    """Call ``command`` and give the process's exit code: its own, None for 0, or an error's.

    An error that this package raises on purpose becomes one line on standard error; any other keeps its traceback,
    since it is a defect. Where nobody reads what is printed any more (``... | head``), the command ends in silence with
    exit code 141, as if by SIGPIPE.
    """
    try:
        try:
            return _named(command)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (unread := [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]):
            raise  # another pipe
        for stream in unread:  # that Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def say(line: str) -> None:
    """A line of an engine to `LOG`; it says itself whether it is a warning."""
    text = line.removeprefix("warning: ")
    LOG.log(logging.INFO if text == line else logging.WARNING, "%s", text)


def quiet() -> bool:
    """Whether no messages are printed: then there are no progress bars either."""
    return LOG.level > logging.INFO


def _named(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except FastSimGANError as error:
        LOG.debug("the error comes from here", exc_info=True)
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


def _parse(config: Any, prog: str, description: str, argv: Sequence[str] | None, default: Any) -> tuple[Any, Messages]:
    tyro = _tyro(prog)
    flags: Any = Annotated[Messages, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="")]

    def with_messages(settings: Any) -> Any:
        return tuple[Annotated[settings, tyro.conf.arg(name="")], flags]

    parsed_as: Any
    if isinstance(config, Mapping):
        choices: list[Any] = [
            Annotated[with_messages(each), tyro.conf.subcommand(word)] for word, each in config.items()
        ]
        parsed_as = functools.reduce(operator.or_, choices)
    else:
        parsed_as = with_messages(config)
    given: dict[str, Any] = {} if default is None else {"default": (default, Messages())}
    found: tuple[Any, Messages] = tyro.cli(parsed_as, prog=prog, description=description, args=argv, **given)
    return found


def _tyro(prog: str) -> Any:
    try:
        import tyro
    except ModuleNotFoundError:
        raise UnavailableError(f"{prog} needs tyro, which is not installed: pip install tyro") from None
    return tyro


class _Lines(logging.Handler):
    """Prints messages on standard output, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text)
        else:
            print(text)
        sys.stdout.flush()  # someone waits for it

    def format(self, record: logging.LogRecord) -> str:
        """``warning: `` before what is one; before what --verbose adds, where it comes from."""
        text = super().format(record)
        if record.levelno == logging.DEBUG:
            return f"{record.name.removeprefix('fastsimgan.')}: {text}"
        return f"warning: {text}" if record.levelno == logging.WARNING else text


@contextmanager
def _printing(level: int) -> Iterator[None]:
    """Where messages from ``level`` on are printed."""
    before = LOG.level
    LOG.setLevel(level)
    try:
        yield
    finally:
        LOG.setLevel(before)


def _is_unread(stream: Any) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError):  # it is no file, or closed
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left; torch has a class for it, which only its import brings."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


LOG.addHandler(_Lines())
LOG.setLevel(logging.INFO)
LOG.propagate = False  # they are printed already
