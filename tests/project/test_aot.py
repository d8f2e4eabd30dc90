"""Ahead-of-time compilation of the Triton kernels, a quick part of it: `python -m bench.aot` does them all."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one the kernels belong to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def aot(only: str) -> list[str]:
    """The lines of `python -m bench.aot` for Hopper; it must be content with every kernel that ``only`` names."""
    done = python("-m", "bench.aot", "--arch", "90", "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 spill, 0 fail" in done.stdout
    return done.stdout.splitlines()


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("size", ["gaze", "hands"])
def test_loss_kernels_compile_for_hopper_without_spills(size):
    """As a batch of 512 launches them: some have failed to compile there that compiled for small ones."""
    lines = aot(f"_kernel {size} float32")
    for kernel in ("refiner_loss.forward", "refiner_loss.finish", "refiner_loss.scale", "discriminator_loss.forward"):
        assert any(line.startswith(f"{kernel}_kernel {size} float32") for line in lines)
    assert lines[-1].startswith("5 compiled")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("features", ["gaze bfloat16", "wide float16 throughout"])
def test_convolutions_run_on_hoppers_matrix_unit(features):
    lines = [line for line in aot(f"residual_block.convolution_kernel {features}") if line.startswith("residual_block")]
    assert len(lines) >= 4  # two forward, two backward
    for line in lines:
        assert line.endswith("wgmma.mma_async (HGMMA)"), line


DYING = """
import json, os, sys
for line in sys.stdin:
    number, capability = map(int, line.split())
    if number == 1:
        print("x.cpp:341: Assertion `hasOneUse()' failed.", file=sys.stderr, flush=True)
        os.abort()
    row = {"row": [f"kernel {number}", f"sm_{capability}", 32, 0, 0, ""]}
    print(json.dumps({"error": "RuntimeError: PassManager::run failed"} if number == 2 else row), flush=True)
"""

COMPILED_BY_IT = f"""
import subprocess, sys
from bench import aot

def start(log):
    command = [sys.executable, "-c", {DYING!r}]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

aot._start = start
aot.all_launches = lambda: [aot.Launch(None, f"kernel {{number}}") for number in range(5)]
sys.exit(aot.main(["--arch", "90", "--only", "kernel"]))
"""


@needs_triton
def test_a_compiler_that_dies_or_fails_is_a_failure_of_its_kernel_alone():
    done = python("-c", COMPILED_BY_IT)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = {line[:8]: line for line in done.stdout.splitlines()}
    for number in (0, 3, 4):
        assert "FAILED" not in lines[f"kernel {number}"]
    assert "FAILED: the compiler died, exit code -6; x.cpp:341: Assertion `hasOneUse()' failed." in lines["kernel 1"]
    assert "FAILED: RuntimeError: PassManager::run failed" in lines["kernel 2"]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("3 compiled") and last.endswith("0 spill, 2 fail")


def test_no_kernel_adds_up_sums_in_a_loop():
    """triton 3.6 rewrites ``total += tl.sum(tile)`` in a loop: it fails where ``total`` has a second use behind it,
    and gives wrong numbers where it is read inside. A tile that is added up and summed once needs no rewriting."""
    reductions = {"sum", "max", "min", "argmax", "argmin", "xor_sum", "reduce"}
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        loops = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.For | ast.While)]
        for node in [node for loop in loops for node in ast.walk(loop)]:
            if isinstance(node, ast.AugAssign):
                accumulates = True
            elif isinstance(node, ast.Assign):
                names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
                accumulates = any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
            else:
                continue
            functions = [call.func for call in ast.walk(node.value) if isinstance(call, ast.Call)]
            called = {function.attr for function in functions if isinstance(function, ast.Attribute)}
            if accumulates and called & reductions:
                found.append(f"{path.name}:{node.lineno}")
    assert not found
