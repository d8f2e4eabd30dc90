"""A stop is answered whatever becomes of those who read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, time
from fastsimgan.training import graceful_stop

graceful_stop.PATIENCE = 0.0
with graceful_stop.StopRequest() as stop, stop.ending_within(lambda: "saved"):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
"""


def test_sigterm_ends_a_long_step_though_nobody_reads_what_it_says() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=pipe, stderr=pipe
        )
    assert done.returncode == 143


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_it_says_what_is_saved(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("SIGTERM", name)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    number = signal.Signals[name].value
    assert (done.returncode, done.stderr) == (128 + number, f"\nerror: stopped by signal {number}, saved\n")


def test_under_nohup_the_terminal_may_go() -> None:
    program = PROGRAM.replace("SIGTERM", "SIGHUP").replace("time.sleep(100)", "time.sleep(0.5)")
    ignoring = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{program}"
    subprocess.run([sys.executable, "-c", ignoring], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
