"""Ahead-of-time compilation of the Triton kernels, a quick part of it: `python -m bench.aot` does them all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_hopper_without_spills():
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--arch", "90", "--only", "gaze float32"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("refiner_loss.forward", "refiner_loss.finish", "refiner_loss.scale", "discriminator_loss.forward"):
        assert f"{kernel}_kernel gaze float32" in done.stdout
    assert "5 compiled" in done.stdout and "0 spill" in done.stdout
