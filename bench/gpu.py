"""``python -m bench.gpu PART ...``: what a machine with a GPU can show, each part in under nine minutes.

Needs Python >= 3.11, torch >= 2.11 with CUDA, pytest and pytest-benchmark; cmake, a C++ compiler and nvcc for csrc's
kernels. No network, tyro or hypothesis. A part is a list of steps, each a process of its own, the most telling first;
each may take its share of the time that is left, so that a slow one takes nothing from the others.

Leaves ``bench/results/<device>-<sources>-<part>.json`` (commit, versions, figures and errors), written anew after every
step, and a log of the same name that ends with a table. Called again on the same device with the same sources, a part
goes on: steps that have passed are not run again (``--again``: all are).

Exit codes: 0 all passed; 1 a step failed or there was no time for it; 2 no such part; 3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from bench import limits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "gpu" / f"py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}"
TIME_LIMIT = (30 if limits.PRETEND else 8.5) * 60  # seconds, of a part; a pretend device is nobody's who waits for it
PYTEST = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:logging")  # Dynamo logs by the thousand
NEEDS_A_GPU = re.compile(r"^\s*@pytest\.mark\.gpu\b|marks=pytest\.mark\.gpu\b", re.MULTILINE)
PACKAGES = ("fastsimgan", "torch", "triton", "numpy", "onnx", "onnxruntime", "pytest", "pytest-benchmark", "tyro")

PARTS = {  # most telling first
    "ops": "the extension built with nvcc; the losses and the history: GPU tests, speed, compute-sanitizer",
    "kernels": "where a training iteration and a batch of refining spend the device's time, kernel by kernel",
    "train": "an iteration of training against plain PyTorch; the paper's whole schedule; two GPUs",
    "infer": "R through every backend",
    "refine": "packed images from disk to disk; two GPUs",
    "resume": "a run killed and resumed against one that was not, bit by bit, with and without --deterministic",
    "hand": "an iteration on 224x224 depth hands",
}


@dataclass(frozen=True)
class Step:
    """One process. ``share``: of the time, relative to the other steps'. ``left_out``: why it is not for this machine.
    ``missing``: what it cannot do without and is not here; it fails. ``builds``: it makes what the others run, and is
    quick if that is there: it is run every time."""

    name: str
    command: tuple[str, ...]
    share: float
    left_out: str | None = None
    missing: str | None = None
    builds: bool = False


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


def sources() -> str:
    """SHA-256 of all that is built, run and tested: two states with the same one have the same results."""
    digest = hashlib.sha256()
    for folder in ("fastsimgan", "kernels", "csrc", "bench", "tests", "CMakeLists.txt", "pyproject.toml"):
        path = ROOT / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".txt", ".toml") and file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def tool(name: str) -> str | None:
    """A program of this Python's environment (a wheel's, perhaps of one that this environment sees), else of PATH or
    the CUDA toolkit's folder; None if it is nowhere."""
    places = [Path(sys.executable).with_name(name)]
    spec = importlib.util.find_spec(name) if name in ("cmake", "ninja") else None
    for package in (spec.submodule_search_locations or []) if spec else []:
        places += [Path(package) / "data" / "bin" / name, Path(package).parent.parent.parent.parent / "bin" / name]
    if (on_path := shutil.which(name)) is not None:
        places.append(Path(on_path))
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        places += [Path(home) / "bin" / name] if home else []
    return next((str(place) for place in places if os.access(place, os.X_OK) and place.is_file()), None)


def test_file(name: str) -> str:
    """Where the tests of that name are; no two have one name."""
    (file,) = (ROOT / "tests").rglob(f"test_{name}.py")
    return str(file.relative_to(ROOT))


def steps_of(part: str) -> list[Step]:
    """What ``part`` runs here, most telling first."""
    small = limits.SMALL
    packed = ("--packed", "1200000")
    if small:
        packed = ("--packed", "200", "--precisions", "float32", "--compile", "off")
    two = None if torch.cuda.device_count() > 1 else "there is one GPU"

    def tests(*names: str, share: float) -> list[Step]:
        """Those that need a GPU first: there are few of them, and on no other machine were they run."""
        files = tuple(map(test_file, names))
        marked = tuple(file for file in files if NEEDS_A_GPU.search((ROOT / file).read_text()))
        gpu = [Step("tests, GPU", (sys.executable, *PYTEST, "-s", "-m", "gpu", *marked), share / 3)] if marked else []
        return [*gpu, Step("tests, others", (sys.executable, *PYTEST, "-m", "not gpu", *files), 2 * share / 3)]

    def on_cuda(name: str, share: float) -> Step:
        """Tests of tests/cuda that are for real devices as well."""
        command = (sys.executable, *PYTEST, *(() if limits.PRETEND else ("-m", "not pretend")))
        return Step(f"tests/cuda, {name}", (*command, f"tests/cuda/test_{name}_on_cuda.py"), share)

    def benchmark(name: str, share: float, *flags: str) -> Step:
        options = ("--benchmark-columns=median,iqr", *flags, *(("-m", "not large") if small else ()))
        return Step(" ".join((name, *flags)), (sys.executable, *PYTEST, f"bench/bench_{name}.py", *options), share)

    def script(name: str, share: float, *flags: str, left_out: str | None = None) -> Step:
        title = " ".join((name, *flags))
        return Step(title, (sys.executable, "-m", f"bench.bench_{name}", *flags), share, left_out)

    losses = ("refiner_loss", "discriminator_loss", "history_swap")
    measured = Step("limits", (sys.executable, "-m", "bench.limits"), 0.5)
    of_part: dict[str, list[Step]] = {
        "ops": [
            *tests(*losses, "history_buffer", "residual_block_race", share=3),
            on_cuda("residual_block_race", 1),
            *(benchmark(name, 1) for name in losses),
            benchmark("residual_block", 2),
            *(_sanitised(checker, losses) for checker in ("memcheck", "racecheck")),
        ],
        "kernels": [script("kernels", 3)],
        "train": [
            script("train_step", 1.5, "--rounds", "2" if small else "20"),
            on_cuda("training", 1.5),
            *tests("acceleration", "simgan", "loop", share=2),
            script("two_gpus", 1, "train", left_out="a pretend device has no NCCL" if limits.PRETEND else two),
            script("train_step", 5, "--schedule"),
        ],
        "infer": [
            *(benchmark("infer", 2, "-k", size) for size in (("gaze",) if small else ("gaze", "hand"))),
            on_cuda("inference", 1),
            *tests("refiner", "export", "tensorrt_backend", share=2),
        ],
        "refine": [
            script("refine", 2, *packed, "--device", "cuda"),
            *tests("worker", "refine", "exactly_once", share=2),
            script("two_gpus", 1, "refine", left_out=two),
        ],
        # 128: below it there is nothing to learn, and every size is compiled for itself
        "hand": [
            script("hand_step", 4, *(() if small else ("--first", "128"))),
            *tests("joints", "hand_simulator", "simgan", share=2),
        ],
        "resume": [script("resume", 4), *tests("resume", share=1)],
    }
    return [*_build(), measured, *of_part[part]]


def _build() -> list[Step]:
    # CMake itself, not setup.py: the setuptools of such a machine may be older than pyproject.toml asks for.
    cmake, ninja, nvcc = tool("cmake"), tool("ninja"), tool("nvcc")
    missing = None if cmake else f"cmake is missing: neither beside {Path(sys.executable).name} nor on PATH"
    configure = [cmake or "cmake", "-S", str(ROOT), "-B", str(BUILD / "cmake"), "-DFASTSIMGAN_CUDA=on"]
    configure += [f"-DFASTSIMGAN_PYTHON={sys.executable}", f"-DFASTSIMGAN_OUTPUT={BUILD / 'made'}"]
    if ninja and not (BUILD / "cmake" / "Makefile").exists():
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if nvcc:
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    build = (cmake or "cmake", "--build", str(BUILD / "cmake"), "--parallel")
    return [
        Step("configure", tuple(configure), 1, missing=missing, builds=True),
        Step("build", build, 2, missing=missing, builds=True),
    ]


def _sanitised(checker: str, suites: Sequence[str]) -> Step:
    program = tool("compute-sanitizer")
    files = map(test_file, suites)
    # small: a sanitizer is 10 to 50 times slower
    chosen = ("-k", "gaze and triton and float32 or test_gpu_equals_cpu")
    command = (program or "", f"--tool={checker}", "--error-exitcode=1", "--target-processes=all", sys.executable)
    reason = None if program else "compute-sanitizer is neither on PATH nor in the CUDA toolkit's folder"
    if limits.PRETEND:
        reason = "no sanitizer looks at a pretend device"
    return Step(checker, (*command, *PYTEST, *files, *chosen), 1.5, reason)


def environment() -> dict[str, str]:
    """That of the steps: the package of this tree with the extension that was built for this Python and this torch.

    The tree's own, which may be another Python's or have no CUDA, stays as it is: the steps see a folder of links to
    the package's files, and the new extension among them. PYTHONSAFEPATH keeps the tree off the front of the path.
    """
    package = BUILD / "python" / "fastsimgan"
    package.mkdir(parents=True, exist_ok=True)
    made = BUILD / "made"
    links = {file.name: file for file in (ROOT / "fastsimgan").iterdir() if file.suffix != ".so"}
    links |= {file.name: file for file in (made.iterdir() if made.is_dir() else ())}
    links.pop("__pycache__", None)
    for link in [*package.iterdir(), *(package / name for name in links)]:
        target = links.get(link.name)
        if target is not None and link.is_symlink() and link.resolve() == target.resolve():
            continue  # another part may be running on it
        if link.is_symlink():
            link.unlink()
        if target is not None:
            link.symlink_to(target.resolve())
    path = [str(package.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


class Session:
    """Runs a part's steps one after another, everything they print going to the log and to the terminal."""

    def __init__(self, part: str, results: Path, again: bool, seconds: float = TIME_LIMIT) -> None:
        self.device = limits.device_name(torch.device("cuda"))
        of = sources()
        stem = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + f"-{of[:10]}-{part}"
        results.mkdir(parents=True, exist_ok=True)
        self.file = results / f"{stem}.json"
        before: dict[str, Any] = {}
        if self.file.exists() and not again:
            before = json.loads(self.file.read_text())
        self.result: dict[str, Any] = {
            "device": self.device,
            "devices": torch.cuda.device_count(),
            "pretend": limits.PRETEND,
            "small": limits.SMALL,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "part": part,
            "commit": output_of("git", "rev-parse", "HEAD"),
            "first_change": output_of("git", "status", "--porcelain", "--untracked-files=no"),  # "" at a clean commit
            "sources": of,
            "versions": versions(),
            "finished": False,
            "steps": before.get("steps", {}),
        }
        self.log: TextIO = open(self.file.with_suffix(".log"), "a" if before else "w")
        self.deadline = time.monotonic() + seconds
        self.write()

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def write(self) -> None:
        """The result as it stands: whatever happens later, this much is there."""
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.result, indent=1) + "\n")
        unfinished.replace(self.file)

    def run(self, steps: Sequence[Step]) -> None:
        """Run them, each within its share of what is left."""
        for number, step in enumerate(steps):
            before = self.result["steps"].get(step.name, {})
            if before.get("exit_code") == 0 and not step.builds:
                self.say(f"== {step.name}: passed before, in {before['seconds']} s")
                continue
            if (reason := step.missing or step.left_out) is not None:
                self.say(f"== {step.name}: {'failed' if step.missing else 'left out'}: {reason}")
                code = 127 if step.missing else None
                self.result["steps"][step.name] = {"exit_code": code, "seconds": 0.0, "last_line": reason}
                continue
            coming = sum(other.share for other in steps[number:] if not (other.missing or other.left_out))
            seconds = max(0.0, self.deadline - time.monotonic()) * step.share / coming
            self.result["steps"][step.name] = self._run(step, seconds)
            self.write()

    def _run(self, step: Step, seconds: float) -> dict[str, Any]:
        self.say(f"== {step.name} (at most {seconds:.0f} s): {' '.join(step.command)}")
        begin = time.monotonic()
        lines: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.jsonl"
            variables = dict(os.environ) if step.builds else environment()
            variables[limits.FIGURES] = str(figures)
            code = _process(step.command, variables, seconds, lines, self.say)
            entries = figures.read_text().splitlines() if figures.exists() else []
        spoken = [line.strip() for line in lines if line.strip()]
        return {
            "exit_code": code,
            "seconds": round(time.monotonic() - begin, 1),
            "last_line": spoken[-1] if spoken else "",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "figures": [json.loads(entry) for entry in entries if entry.endswith("}")],
        }

    def table(self) -> None:
        """Of all steps, and of what they measured."""
        self.say(f"\n{self.device}, part {self.result['part']}")
        if limits.SMALL:
            self.say("at small sizes: the figures show that everything runs, and nothing else")
        self.say(f"{'step':32} exit  seconds  last line")
        for name, step in self.result["steps"].items():
            code = "-" if step["exit_code"] is None else step["exit_code"]
            self.say(f"{name[:32]:32} {code:>4}  {step['seconds']:7}  {step['last_line'][:150]}")
        for step in self.result["steps"].values():
            for figure in step.get("figures", ()):
                for line in figure.get("lines", ()):
                    self.say(line)
        self.say(f"wrote {_shown(self.file)}")

    def failed(self) -> bool:
        """Whether any step was run in vain, or not for want of time."""
        return any(step["exit_code"] not in (0, None) for step in self.result["steps"].values())


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if ROOT in path.parents else path)


def _process(
    command: Sequence[str], variables: dict[str, str], seconds: float, lines: list[str], say: Callable[[str], None]
) -> int:
    """Run ``command`` and give its exit code, each line to ``lines`` and ``say``.

    124 if ``seconds`` are over, 127 if it cannot be started. What it started itself ends with it.
    """
    if seconds < 1:
        lines.append("not run: no time was left")
        say(lines[-1])
        return 124
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        lines.append(f"cannot be started: {error}")
        say(lines[-1])
        return 127

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            say(lines[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        stopped = f"stopped: its {seconds:.0f} s were over"
    finally:  # also where this process is asked to stop
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # ninja ends its compilers, which are in groups of their own
                process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(10)
    lines.append(stopped)
    say(stopped)
    return 124


def run_part(part: str, results: Path = RESULTS, again: bool = False, steps: Sequence[Step] | None = None) -> int:
    """Run a part, or the given ``steps`` under its name; the exit code, 0 or 1."""
    session = Session(part, results, again)
    session.say(f"{session.device}, {session.result['date']}, part {part}: {PARTS[part]}")
    try:
        session.run(steps_of(part) if steps is None else steps)
        session.result["finished"] = True
    except BaseException as error:  # a defect here, or Ctrl-C or SIGTERM: what was found so far is kept
        session.result["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        session.write()
        session.table()
        session.log.close()
    return int(session.failed())


def main(argv: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {name:8} {what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Tests and benchmarks that need a GPU.",
        epilog=f"parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="*", default=["ops"], metavar="PART", help="one or more of those below")
    parser.add_argument("--again", action="store_true", help="run what has passed before as well")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.part if part not in PARTS]:
        print(f"error: PART must be one of these, got {unknown[0]}:\n{listed}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU")
        return 3

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return max([run_part(part, again=given.again) for part in given.part])


if __name__ == "__main__":
    sys.exit(main())
