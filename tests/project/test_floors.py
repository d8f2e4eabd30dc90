"""The house keeps its floors: a folder imports only from folders below it; and nothing grows too long to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastsimgan"

#: From the ground up. Rooms of one floor do not import each other. CONTRIBUTING.md says what each is for.
FLOORS = (
    ("errors", "__version__", "_C"),
    ("storage",),
    ("hardware", "kernels"),
    ("ops",),
    ("models",),
    ("data",),
    ("data.formats",),
    ("data.simulators",),
    ("data.datasets",),
    ("metrics", "cli"),
    ("config",),
    ("inference",),
    ("reporting",),
    ("training", "refinement", "exporting", "evaluation"),
    ("experiments",),
    ("train", "refine", "export", "evaluate", "turing", "env", "data.__main__", "experiments.__main__"),
    ("demo",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HANDS_ON = {"__init__", "__main__"}  # the package's face and its list of commands

LONGEST = {"module": 400, "class": 200, "function": 60}
REASON = "# long: "


def modules() -> dict[str, str]:
    """Source of each module, by its name within the package."""
    files = {file.relative_to(PACKAGE): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): text for file, text in files.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in FLOOR)


def upward(module: str, source: str) -> list[str]:
    """What a module imports, inside its functions too, from a floor that is not below its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for name in (name.removeprefix("fastsimgan.") for name in names if name.startswith("fastsimgan.")):
            room, home = room_of(name), room_of(module)
            if room != home and FLOOR[room] >= FLOOR[home]:
                found.append(f"{module} imports {name}")
    return found


def too_long(module: str, source: str) -> Iterator[str]:
    """What has more lines than `LONGEST` allows, and no reason (`REASON`) on its first line or the one above."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module):
            kind, name, first, last = "module", module, 1, len(lines)
        elif isinstance(node, ast.ClassDef):
            kind, name, first, last = "class", node.name, node.lineno, node.end_lineno or 0
        elif isinstance(node, ast.FunctionDef):
            kind, name, first, last = "function", node.name, node.lineno, node.end_lineno or 0
        else:
            continue
        if last - first + 1 > LONGEST[kind] and REASON not in "\n".join(lines[max(0, first - 2) : first]):
            yield f"{module}: {kind} {name} has {last - first + 1} lines"


def test_imports_go_downwards() -> None:
    assert [wrong for name, text in modules().items() if name not in HANDS_ON for wrong in upward(name, text)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data.datasets.eye_set", "from fastsimgan.metrics.gaze_error import pitch_yaw"),
        ("training.loop", "    from fastsimgan.refinement import tuning"),
        ("hardware.device", "import fastsimgan.ops.history_swap"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str) -> None:
    source = f"def f() -> None:\n    pass\n{line}\n" if line.startswith("    ") else f"{line}\n"
    source = source.replace("    pass\n    from", "    from")
    assert len(upward(module, source)) == 1


def test_nothing_is_too_long_without_a_reason() -> None:
    assert [wrong for name, text in modules().items() for wrong in too_long(name, text)] == []


def test_what_is_too_long_is_seen() -> None:
    body = "    x = 1\n" * 61
    assert [*too_long("a", f"def f() -> None:\n{body}")] == ["a: function f has 62 lines"]
    assert [*too_long("a", f"# long: a table\ndef f() -> None:\n{body}")] == []
    assert len([*too_long("a", "x = 1\n" * 401)]) == 1
