"""``python -m bench.gpu ops``: what a machine with a GPU can show, in under nine minutes and with no network.

Needs Python >= 3.11, torch >= 2.11 with CUDA, and nvcc. In order: the device's limits, the extension built in place,
the tests, the benchmarks, and compute-sanitizer over a few of the tests. Leaves ``bench/results/<device>-<date>.json``
(commit, versions, errors beside speeds) and a log of the same name that ends with a short table. Exit codes: 0 all
passed, 1 a step failed, 3 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import limits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BENCHMARKS = {
    "ops": ("bench_refiner_loss.py", "bench_discriminator_loss.py", "bench_history_swap.py"),
    "infer": ("bench_infer.py",),
}
TESTS = {
    "ops": ("test_refiner_loss.py", "test_discriminator_loss.py", "test_history_swap.py"),
    "infer": ("test_runtime.py", "test_export.py", "test_runtime_tensorrt.py"),
    "refine": ("test_pipeline.py", "test_refine.py"),
    "train": ("test_acceleration.py", "test_algorithm.py"),
    "hand": ("test_joints.py", "test_hand_simulator.py", "test_algorithm.py"),
}
SCRIPTS = {  # benchmarks that are no pytest suite
    "hand": (("-m", "bench.bench_hand_step"),),
    "refine": (("-m", "bench.bench_refine", "--packed", "1200000"),),
    "train": (("-m", "bench.bench_train_step", "--rounds", "20"), ("-m", "bench.bench_train_step", "--schedule")),
}
SANITISED = {"ops": "gaze and triton and float32 or test_gpu_equals_cpu"}  # small: a sanitizer is 10 to 50 times slower
TIME_LIMIT = 9 * 60  # seconds, of everything
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
PACKAGES = ("fastsimgan", "torch", "triton", "numpy", "pytest", "pytest-benchmark")


def output_of(*command: str) -> str | None:
    """First line a command prints, or None where it is missing or fails."""
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return text.strip().splitlines()[0] if text.strip() else ""


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


class Session:
    """Runs the steps one after another, everything they print going to the log and to the terminal."""

    def __init__(self, log: TextIO) -> None:
        self.log = log
        self.deadline = time.monotonic() + TIME_LIMIT
        self.steps: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def step(self, name: str, command: Sequence[str]) -> bool:
        """Run ``command`` within what is left of the time; True if it passed."""
        self.say(f"== {name}: {' '.join(command)}")
        begin = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                text, _ = process.communicate(timeout=max(1.0, self.deadline - begin))
                code = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                text, _ = process.communicate()
                code = 124
                text += f"\nstopped: {TIME_LIMIT} s are over\n"
        self.say(text.rstrip())
        last = text.strip().splitlines()[-1] if text.strip() else ""
        self.steps[name] = {"exit_code": code, "seconds": round(time.monotonic() - begin, 1), "last_line": last}
        return code == 0


def measure_limits() -> dict[str, float]:
    return {
        "copy_GB_per_s": limits.copy_bandwidth("cuda") / 1e9,
        "float32_TFLOP_per_s": limits.matrix_rate("cuda", torch.float32) / 1e12,
        "float16_TFLOP_per_s": limits.matrix_rate("cuda", torch.float16) / 1e12,
        "bfloat16_TFLOP_per_s": limits.matrix_rate("cuda", torch.bfloat16) / 1e12,
    }


def run_part(part: str, session: Session) -> list[dict[str, Any]]:
    """Build, test, measure; returns what each benchmark stored."""
    if importlib.util.find_spec("triton") is None:
        session.say("skipped for want of triton: the Triton kernels")
    # CMake itself, not setup.py: the setuptools of such a machine may be older than pyproject.toml asks for.
    configure = ["cmake", "-S", ".", "-B", "build/gpu", f"-DFASTSIMGAN_PYTHON={sys.executable}", "-DFASTSIMGAN_CUDA=on"]
    session.step("configure", configure)
    session.step("build", ["cmake", "--build", "build/gpu", "--parallel"])
    tests = [f"tests/{name}" for name in TESTS[part]]
    session.step("tests", [*PYTEST, "-rs", "-s", *tests])
    for number, script in enumerate(SCRIPTS.get(part, ()), 1):
        session.step(f"benchmark {number}", [sys.executable, *script])
    benchmarks = [f"bench/{name}" for name in BENCHMARKS.get(part, ())]
    if not benchmarks:
        return []
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "benchmarks.json"
        command = [*PYTEST, *benchmarks, f"--benchmark-json={stored}", "--benchmark-columns=median,iqr"]
        session.step("benchmarks", command)
        entries = json.loads(stored.read_text())["benchmarks"] if stored.exists() and stored.stat().st_size else []

    if part not in SANITISED:
        session.say("no compute-sanitizer: this part has no kernels of its own")
    elif shutil.which("compute-sanitizer") is None:
        session.say("skipped for want of compute-sanitizer: memcheck and racecheck")
    else:
        for tool in ("memcheck", "racecheck"):
            command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", "--target-processes=all"]
            session.step(tool, [*command, *PYTEST, *tests, "-k", SANITISED[part]])
    return [
        {"name": entry["name"], **entry["extra_info"], "median_us": entry["stats"]["median"] * 1e6} for entry in entries
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests and benchmarks that need a GPU.")
    parser.add_argument("part", choices=tuple(TESTS), nargs="?", default="ops")
    part = parser.parse_args(argv).part
    if not torch.cuda.is_available():
        print("no GPU")
        return 3

    device = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.UTC)
    stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + now.strftime("-%Y%m%d-%H%M%S")
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{stem}.log", "w") as log:
        session = Session(log)
        session.say(f"{device}, {now.isoformat(timespec='seconds')}, part {part}")
        measured = measure_limits()
        for name, value in measured.items():
            session.say(f"limit {name}: {value:.1f}")
        torch.cuda.empty_cache()  # the steps are other processes
        benchmarks = run_part(part, session)
        result = {
            "device": device,
            "date": now.isoformat(timespec="seconds"),
            "part": part,
            "commit": output_of("git", "rev-parse", "HEAD"),
            "first_change": output_of("git", "status", "--porcelain", "--untracked-files=no"),  # "" at a clean commit
            "versions": versions(),
            "limits": measured,
            "steps": session.steps,
            "benchmarks": benchmarks,
        }
        (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")

        session.say(f"\n{'step':12} exit  seconds  last line")
        for name, step in session.steps.items():
            session.say(f"{name:12} {step['exit_code']:4}  {step['seconds']:7}  {step['last_line']}")
        for entry in benchmarks:
            for name, side in entry.get("sides", {}).items():
                if "images_per_s" in side:
                    speed = f"{side['images_per_s']:10.0f} images/s  {side['share_of_matrix_rate']:6.1%} of matrix rate"
                    error = f"at most {side['most_levels']} levels"
                else:
                    speed = f"{side['median_us']:10.1f} us  {side['share_of_copy']:6.1%} of copy"
                    error = f"error {side['error']:.1e}"
                session.say(f"{entry['title']:40} {name:22} {speed}  {error}")
        session.say(f"wrote {(RESULTS / stem).relative_to(ROOT)}.json")
        return 1 if any(step["exit_code"] for step in session.steps.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
