"""A machine with a GPU and without a network has torch, triton and pytest, and little else: what works there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = (
    "tyro",
    "hypothesis",
    "scipy",
    "h5py",
    "cv2",
    "simplejpeg",
    "matplotlib",
    "torchmetrics",
    "ray",
    "datasets",
)
WITHOUT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {NOT_THERE} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a Python that lacks `NOT_THERE`."""
    command = [sys.executable, "-c", WITHOUT + code]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis brings one
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_module_can_be_imported_and_commands_say_what_they_need() -> None:
    done = run(
        "import importlib, pkgutil, fastsimgan\n"
        "for module in pkgutil.walk_packages(fastsimgan.__path__, 'fastsimgan.'):\n"
        "    name = module.name.removeprefix('fastsimgan.')\n"
        "    if not name.startswith(('kernels', 'libfastsimgan', '_C')) and not name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "from fastsimgan import train, turing\n"
        "from fastsimgan.data.__main__ import main\n"
        "print([command([]) for command in (train.main, turing.main, main)])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[3, 3, 3]\n"
    assert done.stderr.splitlines() == [
        f"error: python -m fastsimgan.{name} needs tyro, which is not installed: pip install tyro"
        for name in ("train", "turing", "data")
    ]


def test_what_is_missing_is_named_where_it_is_needed() -> None:
    done = run(
        "from fastsimgan.errors import UnavailableError\n"
        "from fastsimgan.metrics.statistics import binomial_p, t_quantile, wilson_interval\n"
        "from fastsimgan.reporting.html_report import Report\n"
        "from fastsimgan.reporting.plots import check_matplotlib\n"
        "assert '<h1>a</h1>' in Report('a').html()\n"  # Jinja2 comes with torch
        "for call in (lambda: t_quantile(0.9, 3), lambda: wilson_interval(1, 2), lambda: binomial_p(1, 2),\n"
        "             lambda: check_matplotlib('--plot')):\n"
        "    try:\n"
        "        call()\n"
        "    except UnavailableError as error:\n"
        "        print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    *intervals, plot = done.stdout.splitlines()
    assert len(intervals) == 3 and all(line.startswith("intervals need SciPy: pip install scipy") for line in intervals)
    assert plot == '--plot needs matplotlib: pip install "fastsimgan[eval]"'


def test_every_test_and_benchmark_is_collected() -> None:
    flags = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "tests", "bench"]
    done = run(f"import pytest\nsys.exit(pytest.main({flags}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::test_every_test_and_benchmark_is_collected" in done.stdout
    for name in ("ops/test_refiner_loss.py", "data/test_open_images.py", "hardware/test_memory.py"):
        assert f"tests/{name}::" in done.stdout, name


def test_importing_loads_no_compiler() -> None:
    """Dynamo and sympy are as much work to import as torch itself: for those who compile."""
    code = (
        "import sys, fastsimgan.inference, fastsimgan.training.loop\nprint({'torch._dynamo', 'sympy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
