"""Rules about the source itself: imports only downwards, and what the lint must never let in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastsimgan"


def imports(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, at the top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("fastsimgan.")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "kernels" not in path.parts}


def test_imports_form_no_circle() -> None:
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"imports in a circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_ops_open_the_door_to_the_kernels_and_the_extension() -> None:
    for name, path in MODULES.items():
        metal = {other for other in imports(path) if other.startswith(("fastsimgan.kernels", "fastsimgan._C"))}
        assert not metal or name.startswith("fastsimgan.ops."), f"{name} imports {', '.join(metal)}"


REFUSED = {
    "import pickle": "TID251",
    "from cloudpickle import loads": "TID251",
    "import joblib": "TID251",
    "eval(text)": "S307",
    "exec(text)": "S102",
    "import tarfile; tarfile.open(text).extractall()": "S202",
    "import torch; torch.load(text)": "TID251",
}


def test_lint_refuses() -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--output-format=concise",
        "--stdin-filename=fastsimgan/x.py",
        "-",
    ]
    source = "\n".join(["text = input()", *REFUSED, ""])
    done = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    for number, (line, rule) in enumerate(REFUSED.items(), start=2):
        found = [row for row in done.stdout.splitlines() if row.startswith(f"fastsimgan/x.py:{number}:")]
        assert any(f" {rule} " in row for row in found), f"{line}\n{done.stdout}"


def test_numpy_never_unpickles() -> None:
    """ruff has no rule for this one."""
    for path in [*MODULES.values(), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}:{node.lineno}"
