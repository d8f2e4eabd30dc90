"""A stop is answered whatever becomes of those who read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_sigterm_says_what_is_saved() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (143, "\nerror: stopped by signal 15, saved\n")
