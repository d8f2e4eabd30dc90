"""The GPU session's command: its exit codes, its steps' shares of the time, what is kept, and what is not run twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, limits
from bench.gpu import Step


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go; there is a GPU, of which nothing is asked but its name, and no build."""
    monkeypatch.setattr(limits, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    return tmp_path / "results"


def read(results: Path) -> dict:
    (file,) = results.glob("*.json")
    return json.loads(file.read_text())


def codes(results: Path) -> dict[str, int | None]:
    return {name: step["exit_code"] for name, step in read(results)["steps"].items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 3
    assert capsys.readouterr().out == "no GPU\n"


def test_an_unknown_part_is_answered_with_the_list(capsys):
    assert gpu.main(["ops", "trian"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: PART must be one of these, got trian:\n")
    assert all(f"  {part} " in said for part in gpu.PARTS)


def test_the_json_is_there_after_every_step(results):
    """Whatever may end the session itself, SIGKILL too."""
    look = (
        f"import glob, json; (file,) = glob.glob({str(results)!r} + '/*.json'); print(*json.load(open(file))['steps'])"
    )
    steps = [Step("first", python(""), 1), Step("second", python("import sys; sys.exit(1)"), 1)]
    gpu.run_part("ops", results, steps=[*steps, Step("third", python(look), 1)])
    assert read(results)["steps"]["third"]["last_line"] == "first second"


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_names_files_that_are_there(part):
    steps = gpu.steps_of(part)
    assert len({step.name for step in steps}) == len(steps)
    for word in {word for step in steps for word in step.command}:
        if word.startswith(("tests/", "bench/")):
            assert (gpu.ROOT / word).is_file(), word
        if word.startswith("bench."):
            assert (gpu.ROOT / f"{word.replace('.', '/')}.py").is_file(), word


def test_every_test_that_needs_a_gpu_is_in_a_part():
    named = {word for part in gpu.PARTS for step in gpu.steps_of(part) for word in step.command}
    for file in sorted((gpu.ROOT / "tests").rglob("test_*.py")):
        if gpu.NEEDS_A_GPU.search(file.read_text()):
            assert str(file.relative_to(gpu.ROOT)) in named, file.name


def test_a_failure_takes_nothing_from_what_comes_after(results, capsys):
    keep = "from bench import limits; limits.keep('speed', ['a row'], us=3.5)"
    steps = [
        Step("tool", ("nowhere/cmake",), 1),
        Step("absent", python(""), 1, missing="cmake is missing"),
        Step("not here", python(""), 1, left_out="there is one GPU"),
        Step("dies", python(f"{keep}; import os; os._exit(7)"), 1),
        Step("works", python("print('all is well')"), 1),
    ]
    assert gpu.run_part("ops", results, steps=steps) == 1
    assert codes(results) == {"tool": 127, "absent": 127, "not here": None, "dies": 7, "works": 0}
    found = read(results)
    assert found["steps"]["dies"]["figures"] == [{"title": "speed", "lines": ["a row"], "us": 3.5}]
    assert found["finished"] and found["part"] == "ops" and found["device"] == "NVIDIA H100"
    said = capsys.readouterr().out
    assert "Traceback" not in said
    table = said[said.index("step   ") :]
    for row in ("absent                            127      0.0  cmake is missing", "all is well", "\na row\n"):
        assert row in table
    assert next(results.glob("*.log")).read_text() == said


def test_a_slow_step_has_its_share_of_the_time_and_no_more(results, monkeypatch):
    monkeypatch.setattr(gpu.Session.__init__, "__defaults__", (8.0,))
    # what the slow one starts is stopped with it
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    steps = [Step("slow", python(slow), 1), Step("works", python(""), 3)]
    assert gpu.run_part("ops", results, steps=steps) == 1
    assert codes(results) == {"slow": 124, "works": 0}
    assert read(results)["steps"]["slow"]["last_line"] == "stopped: its 2 s were over"


def test_without_time_left_steps_are_not_run_and_that_is_a_failure(results, monkeypatch):
    monkeypatch.setattr(gpu.Session.__init__, "__defaults__", (0.0,))
    assert gpu.run_part("ops", results, steps=[Step("a", python(""), 1)]) == 1
    assert read(results)["steps"]["a"]["last_line"] == "not run: no time was left"


def test_what_has_passed_is_not_run_again_and_other_sources_begin_anew(results, monkeypatch, tmp_path):
    count = tmp_path / "count"
    once = Step("once", python(f"open({str(count)!r}, 'a').write('x')"), 1)
    fails = Step("later", python("import sys; sys.exit(1)"), 1)
    assert gpu.run_part("ops", results, steps=[once, fails]) == 1
    assert gpu.run_part("ops", results, steps=[once, Step("later", python(""), 1)]) == 0
    assert count.read_text() == "x" and codes(results) == {"once": 0, "later": 0}
    assert gpu.run_part("ops", results, steps=[once], again=True) == 0
    assert count.read_text() == "xx"
    monkeypatch.setattr(gpu, "sources", lambda: "0" * 64)
    assert gpu.run_part("ops", results, steps=[once]) == 0
    assert count.read_text() == "xxx" and len(list(results.glob("*.json"))) == 2


def test_a_defect_or_a_stop_leaves_what_was_found(results, monkeypatch):
    process = gpu._process

    def broken(command, *rest):
        if "stop" in command[-1]:
            raise KeyboardInterrupt
        return process(command, *rest)

    monkeypatch.setattr(gpu, "_process", broken)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_part("ops", results, steps=[Step("works", python(""), 1), Step("stopped", python("stop"), 1)])
    assert codes(results) == {"works": 0}
    assert not read(results)["finished"] and "KeyboardInterrupt" in read(results)["error"]


def test_steps_see_the_extension_that_was_built_and_not_the_trees(results, tmp_path):
    """The tree's own may be another Python's, or have no CUDA; it stays where it is."""
    package = Path(gpu.ROOT / "fastsimgan")
    before = {file.name: file.stat().st_mtime_ns for file in package.glob("*.so")}
    made = gpu.BUILD / "made"
    made.mkdir(parents=True)
    (made / "_C.py").write_text("raise ImportError('the one that was built')\n")
    code = "import fastsimgan; from fastsimgan.ops import _extension as op; print(fastsimgan.__file__, op.NOT_LOADED)"
    done = subprocess.run(python(code), env=gpu.environment(), cwd=gpu.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str(gpu.BUILD / "python/fastsimgan/__init__.py")
    assert "the one that was built" in done.stdout
    assert before == {file.name: file.stat().st_mtime_ns for file in package.glob("*.so")}


def test_tools_are_this_pythons_own_first(tmp_path, monkeypatch):
    for folder in ("own", "path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cmake").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "own/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert gpu.tool("cmake") == str(tmp_path / "own/cmake")
    (tmp_path / "own/cmake").unlink()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.tool("cmake") == str(tmp_path / "path/cmake")
    (tmp_path / "path/cmake").unlink()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert gpu.tool("cmake") is None
    assert "cmake is missing" in gpu.steps_of("ops")[0].missing


# How time is taken.


def test_calls_take_turns_and_keep_their_results_until_their_next_turn():
    made = []

    class Result:
        pass

    def call(number: int) -> Result:
        made.append(number)
        return Result()

    turns = limits.Turns([lambda number=number: call(number) for number in range(3)])
    kept = [turns() for _ in range(4)]
    assert made == [0, 1, 2, 0]
    assert list(turns._results) == kept[1:]


def test_buffers_are_more_than_the_second_level_cache_holds(monkeypatch):
    monkeypatch.setattr(limits, "l2_bytes", lambda device: 50_000_000)
    monkeypatch.setattr(limits, "SMALL", False)
    cuda = torch.device("cuda")
    for size in (1_000, 11_800_000, 60_000_000):
        assert limits.copies(size, cuda) * size >= 150_000_000
    assert limits.copies(10**9, cuda) == limits.copies(1_000, torch.device("cpu")) == 1


def test_no_side_of_a_comparison_has_tf32_switches_of_its_own():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    for tf32 in (True, False):
        with limits.same_switches(tf32):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (tf32, tf32)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


def test_a_figure_goes_to_the_session_only_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv(limits.FIGURES, raising=False)
    limits.keep("a", ["row"], us=1.0)
    monkeypatch.setenv(limits.FIGURES, str(tmp_path / "figures"))
    limits.keep("b", ["row"], us=2.0, sides={"ours": [float("nan"), 1.0]})
    found = json.loads((tmp_path / "figures").read_text())
    assert found == {"title": "b", "lines": ["row"], "us": 2.0, "sides": {"ours": [None, 1.0]}}
    assert os.listdir(tmp_path) == ["figures"]
