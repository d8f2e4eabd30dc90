"""What every command does with an error, with messages, and where nobody reads what it prints."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastsimgan import cli
from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Nothing:
    """No settings."""


def run(error: Exception, *argv: str) -> int:
    def command(_: Nothing) -> None:
        raise error

    return cli.run(command, Nothing, prog="command", description="", argv=argv)


def test_a_device_without_memory_is_one_line_and_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. 1.00 GiB is free. Of the allocated memory 3 bytes ..."
    assert run(torch.OutOfMemoryError(text)) == 3
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. 1.00 GiB is free. "
        "Free some, or compute elsewhere: --device cpu\n"
    )


@pytest.mark.parametrize("error", [RuntimeError("defect"), BrokenPipeError("of a worker")])
def test_any_other_error_is_a_defect_and_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match=f"^{error}$"):
        run(error)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["found", "warning: odd", "result"]),
        (("--quiet",), ["warning: odd", "result"]),
        (("--verbose",), ["cli: detail", "found", "warning: odd", "result"]),
    ],
)
def test_quiet_and_verbose_say_which_messages_are_printed(flags, expected, capsys) -> None:
    bars = []

    def command(_: Nothing) -> None:
        cli.LOG.getChild("cli").debug("%s", "detail")
        cli.say("found")
        cli.say("warning: odd")
        print("result")
        bars.append(not cli.quiet())

    assert cli.run(command, Nothing, prog="command", description="", argv=flags) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert bars == ["--quiet" not in flags] and not cli.quiet()


def test_verbose_says_where_an_error_comes_from(capsys) -> None:
    assert run(InputError("n must be 1, got 2"), "--verbose") == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.out and "in command\n" in captured.out
    assert captured.err == "error: n must be 1, got 2\n"


def test_messages_stand_above_a_progress_bar(monkeypatch) -> None:
    from tqdm import tqdm

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)

    def command(_: Nothing) -> None:
        with tqdm(total=2, file=terminal, mininterval=0) as bar:
            bar.update(1)
            cli.say("found")

    assert cli.run(command, Nothing, prog="command", description="", argv=()) == 0
    assert "found\n" in terminal.getvalue().split("\r")[:-1]  # on a line of its own, and the bar is drawn anew below


COMMANDS = {
    "help": "-m fastsimgan.train --help",
    "help of one of several": "-m fastsimgan.turing make --help",
    "results": "-m fastsimgan.env",
    "the list of commands": "-m fastsimgan",
    "the list of experiments": "-m fastsimgan.experiments",
    "messages": "-m fastsimgan.train --dry-run --batch-size 4 --hidden-channels 20 --blocks 1 --device cpu",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_has_gone_ends_a_command_in_silence(command: str) -> None:
    """As in ``... | head``, at its worst: the pipe is closed before anything is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT,
            env=environment,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_scripts_of_before_find_their_flags(tmp_path: Path) -> None:
    """`--width` and `--picture-every` are other spellings of flags that were renamed."""
    given = []

    def command(config: TrainConfig) -> None:
        given.append((config.hidden_channels, config.eval_every))

    for flags in (["--width", "40", "--picture-every", "7"], ["--hidden-channels", "40", "--eval-every", "7"]):
        assert cli.run(command, TrainConfig, prog="train", description="", argv=flags) == 0
    assert given == [(40, 7), (40, 7)]
