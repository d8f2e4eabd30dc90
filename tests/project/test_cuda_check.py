"""`python -m bench.cuda_check` itself: what it takes, what it skips, what it makes of that."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from bench import cuda_check
from bench.cuda_check import Check, Side, Skipped

ROOT = Path(__file__).resolve().parents[2]


def pretend_python(path: Path, answer: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def test_oldest_is_what_pyproject_and_the_stable_abi_promise() -> None:
    major, minor, *_ = cuda_check.numbers(cuda_check.oldest_version())
    target = re.search(r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)0", (ROOT / "CMakeLists.txt").read_text())
    assert target and (major, minor) == (int(target[1], 16), int(target[2], 16))


def test_what_cannot_be_had_is_skipped_and_fails_only_if_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VENVS", str(tmp_path / "venvs"))
    python = pretend_python(tmp_path / "python", '["2.99.0+cpu", null, ""]')
    for flags, code in [((), 0), (("--require",), 1)]:
        assert cuda_check.main(["--python", str(python), *flags]) == code
        assert f"skipped: {python}: torch 2.99.0+cpu was built without CUDA" in capsys.readouterr().out
    assert not (tmp_path / "venvs").exists()
    monkeypatch.setenv("CUDA_PYTHONS", "/no/python")
    with pytest.raises(SystemExit) as end:
        cuda_check.main([])
    assert end.value.code == 2 and "must be a program, got /no/python" in capsys.readouterr().err


def test_without_an_index_the_newest_that_is_here_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(*arguments: object) -> str:
        raise Skipped("no index")

    monkeypatch.setattr(cuda_check, "pip", no_index)
    with pytest.raises(Skipped, match="no index"):
        cuda_check.newest_version(tmp_path)
    for version in (cuda_check.oldest_version(), "2.13.1", "2.9.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ready").touch()
    assert cuda_check.newest_version(tmp_path) == "2.13.1"


def test_a_step_that_fails_is_a_failure_and_the_table_says_so(tmp_path: Path) -> None:
    side = Side(Path("python"), "2.99.0", "13.0", "", tmp_path)
    side.tree.mkdir()
    check = Check()
    assert check.step(side, "good", ["true"]) and not check.failed(require=True)
    check.skip("2.99.0", "absent", "no nvcc")
    assert check.failed(require=True) and not check.failed(require=False)
    assert not check.step(side, "bad", ["sh", "-c", "exit 7"]) and check.failed(require=False)
    check.add(side, "slow", "passed", time.monotonic() - 61)
    assert [line.split(maxsplit=3) for line in check.table().splitlines()[1:]] == [
        ["2.99.0", "good", "0", "passed"],
        ["2.99.0", "absent", "0", "skipped: no nvcc"],
        ["2.99.0", "bad", "0", "FAILED: exit code 7"],
        ["2.99.0", "slow", "61", "passed"],
    ]


def test_the_copy_of_the_sources_has_no_library_of_the_tree(tmp_path: Path) -> None:
    cuda_check.copy_sources(tmp_path / "tree")
    assert (tmp_path / "tree" / "fastsimgan" / "kernels" / "refiner_loss.py").exists()
    assert (tmp_path / "tree" / "tests" / "pretend_cuda" / "runtime.cpp").exists()
    assert not list((tmp_path / "tree").rglob("*.so"))
