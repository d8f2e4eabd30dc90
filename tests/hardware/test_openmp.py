"""How OpenMP's threads wait: settled before torch is loaded, in commands, workers and tests; the user's word counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Invert, make_shards

from fastsimgan.__main__ import COMMANDS
from fastsimgan.hardware import openmp
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine

ROOT = Path(__file__).resolve().parents[2]
OWNED = (*openmp.SETTINGS, "OMP_WAIT_POLICY")


def python(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Python with no setting of ours in its environment but ``settings``."""
    environment = {name: value for name, value in os.environ.items() if name not in OWNED}
    environment |= {"PYTHONPATH": str(ROOT)} | settings
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def settings_after(code: str, **settings: str) -> dict[str, str]:
    """What the environment holds of ours after ``code``."""
    code += f"\nimport json, os; print(json.dumps({{n: os.environ[n] for n in {OWNED!r} if n in os.environ}}))"
    found: dict[str, str] = json.loads(python("-c", code, **settings).stdout)
    return found


def test_these_tests_wait_as_the_commands_do() -> None:
    assert {name: os.environ.get(name) for name in OWNED if name in os.environ}


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_one_of_several_processes_has_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_every_command_settles_it_before_torch_is_loaded() -> None:
    code = (
        "import importlib, os, sys\n"
        f"for name in {sorted(COMMANDS)!r}:\n"
        "    importlib.import_module(f'fastsimgan.{name}')\n"
        "    assert 'torch' not in sys.modules and 'GOMP_SPINCOUNT' in os.environ, name"
    )
    assert settings_after(code) == openmp.SETTINGS


def test_torchs_openmp_reads_it() -> None:
    import torch

    if not any("libgomp" in path.name for path in Path(torch.__file__).parent.joinpath("lib").iterdir()):
        pytest.skip("this torch has another OpenMP than GNU's")
    done = python("-m", "fastsimgan.env", OMP_DISPLAY_ENV="verbose")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
    assert "GOMP_SPINCOUNT=1000" in done.stdout


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        ("import fastsimgan", {}, openmp.SETTINGS),
        ("import fastsimgan", {"GOMP_SPINCOUNT": "77"}, openmp.SETTINGS | {"GOMP_SPINCOUNT": "77"}),
        ("import fastsimgan", {"KMP_BLOCKTIME": "200"}, openmp.SETTINGS | {"KMP_BLOCKTIME": "200"}),
        ("import fastsimgan", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("import torch, fastsimgan", {}, {}),
    ],
)
def test_the_users_own_value_stays(code: str, given: dict[str, str], expected: dict[str, str]) -> None:
    assert settings_after(code, **given) == expected


def load_and_tell(job: Job, worker: int, workers: int) -> Invert:
    told = {name: os.environ[name] for name in OWNED if name in os.environ}
    (job.output.parent / f"told-{worker}.json").write_text(json.dumps(told))
    return Invert()


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "77"}])
def test_worker_processes_have_it(given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process that starts them has not: it may have loaded torch first."""
    for name in OWNED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "model").write_bytes(b"weights")
    refine(
        Job(tmp_path / "model", make_shards(tmp_path / "in", 60), tmp_path / "out", batch_size=5),
        workers=2,
        loader=load_and_tell,
    )
    told = [json.loads(path.read_text()) for path in tmp_path.glob("told-*.json")]
    assert told and all(one == openmp.SETTINGS | given for one in told)


RAY = """
import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": %r}})

@ray.remote
def ours():  # nothing is set where this worker is started: the driver has not imported fastsimgan
    import os, sys

    before = "torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT")
    import fastsimgan.refinement.ray_workers

    return *before, os.environ.get("GOMP_SPINCOUNT")

print(ray.get(ours.remote()))
"""


@pytest.mark.slow
def test_rays_workers_have_it() -> None:
    """The task is of this package, so a worker imports it before anything of it runs, and Ray imports no torch."""
    pytest.importorskip("ray", reason="Ray is not installed")
    assert "(False, None, '1000')" in python("-c", RAY % str(ROOT)).stdout
