"""``python -m bench.cuda_check``: what can be checked of the CUDA path with no GPU, on the torch of both ends.

For the oldest torch that pyproject.toml allows and the newest that pip finds, both built with CUDA, each in a virtual
environment of its own under ``.venv-cuda/`` (5 to 6 GB each, and a minute where the wheels are near): the extension is
built with nvcc, every kernel compiled ahead of time by that torch's Triton, the tests in ``tests/cuda`` run on the
pretend device, and the libraries built against the one torch loaded into the other. And it is built once where nvcc is
not to be found, as on an ordinary PC. All of it happens in a copy of the sources, so that the tree keeps its own build.

``--python /path/to/python``, or CUDA_PYTHONS="/a/bin/python /b/bin/python", takes Pythons that have such a torch, and
leaves them as they are: packages that they lack go into a folder beside. CUDA_VENVS puts everything elsewhere.

What cannot be had (no index, no nvcc, no room) is skipped and said. Exit codes: 0 nothing failed, 1 something failed
or, with ``--require``, was skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "csrc", "fastsimgan", "kernels", "tests", "CMakeLists.txt", "pyproject.toml")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__", "results", ".*")
# What the package and its tests need beside torch: module, and what pip is asked for.
NEEDS = {
    "numpy": "numpy",
    "PIL": "pillow>=12.3",
    "safetensors": "safetensors>=0.8",
    "tqdm": "tqdm",
    "onnx": "onnx>=1.21",
    "pytest": "pytest",
}
OLD_NUMPY = "numpy<2.3"  # Triton 3.6's interpreter calls what a later numpy has dropped
ROOM = 14 << 30  # bytes that a new environment may take while pip unpacks it
PIP = ("--disable-pip-version-check", "--retries", "1", "--timeout", "30")
LIMIT = 15 * 60  # seconds, of a step

# What the Pythons under test are asked.
QUESTION = """
import importlib.util, json, torch
found = importlib.util.find_spec("triton")
print(json.dumps([torch.__version__, torch.version.cuda, __import__("triton").__version__ if found else ""]))
"""
LOOK = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))"
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
kernels = {key: has_kernel("fastsimgan::history_swap", key) for key in ("CPU", "CUDA")}
print("torch", torch.__version__, "has kernels:", kernels)
sys.exit(not all(kernels.values()))
"""
WHY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastsimgan._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
info = module.build_info()
print(info)
sys.exit(info["cuda"] or "nvcc" not in info["no_cuda"])
"""


class Skipped(Exception):
    """Why something cannot be checked here."""


@dataclass
class Check:
    """The steps so far, and what came of each."""

    rows: list[tuple[str, str, str, float]] = field(default_factory=list)  # torch, step, result, seconds

    def step(self, side: Side, name: str, command: Sequence[str], **environment: str) -> bool:
        """Run ``command`` in the side's copy of the sources, its output going to the terminal; True if it passed."""
        shown = " ".join("'...'" if "\n" in word else word for word in command)
        print(f"\n== torch {side.torch}: {name}: {shown}", flush=True)
        begin = time.monotonic()
        try:
            code = subprocess.run(
                command, cwd=side.tree, env=side.environment() | environment, timeout=LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        why = f"more than {LIMIT} s" if code == 124 else f"exit code {code}"
        self.add(side, name, "passed" if code == 0 else f"FAILED: {why}", begin)
        return code == 0

    def add(self, side: Side, name: str, result: str, begin: float) -> None:
        self.rows.append((side.torch, name, result, time.monotonic() - begin))

    def skip(self, torch: str, name: str, reason: object) -> None:
        print(f"\n== torch {torch}: {name}: skipped: {reason}", flush=True)
        self.rows.append((torch, name, f"skipped: {reason}", 0.0))

    def failed(self, *, require: bool) -> bool:
        bad = ("FAILED", "skipped") if require else ("FAILED",)
        return any(result.startswith(bad) for _, _, result, _ in self.rows)

    def table(self) -> str:
        head = ("torch", "step", "seconds", "result")
        rows = [(torch, name, f"{seconds:.0f}", result) for torch, name, result, seconds in self.rows]
        width = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
        return "\n".join(
            f"{a:{width[0]}}  {b:{width[1]}}  {c:>{width[2]}}  {result}" for a, b, c, result in [head, *rows]
        )


@dataclass
class Side:
    """One torch: the Python that has it, and the copy of the sources that is built against it."""

    python: Path
    torch: str  # "2.11.0"
    cuda: str  # "13.0"
    triton: str  # "3.6.0", "" where there is none
    folder: Path
    packages: Path | None = None  # what a Python of the user's lacks
    nvcc: str = ""
    built: bool = False

    @property
    def tree(self) -> Path:
        return self.folder / f"tree-{self.torch}"

    @property
    def libraries(self) -> Path:
        return self.folder / f"build-{self.torch}" / "fastsimgan"

    def environment(self) -> dict[str, str]:
        """Without what makes Triton interpret, and with nothing on the path but the working directory."""
        kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONHOME")}
        kept["PYTHONPATH"] = str(self.packages or "")
        if self.nvcc:  # the kernels and the pretend device look for it on PATH
            kept["PATH"] = os.pathsep.join([str(Path(self.nvcc).parent), kept.get("PATH", os.defpath)])
        return kept


def pip(python: Path, *arguments: str) -> str:
    """What pip prints. Raises Skipped with its last error: an index out of reach, a version that is not there."""
    command = [str(python), "-m", "pip", *arguments[:1], *PIP, *arguments[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Skipped(f"pip {' '.join(arguments)} took more than {LIMIT} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise Skipped(f"pip {' '.join(arguments)}: {errors[-1].removeprefix('ERROR: ')}")
    return done.stdout


def oldest_version() -> str:
    """The oldest torch that pyproject.toml allows, "2.11.0"."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml must ask for torch>=..."
    return found[1] if found[1].count(".") == 2 else f"{found[1]}.0"


def newest_version(folder: Path) -> str:
    """What `pip install torch` would bring into a new environment, this machine's constraints included.

    Raises Skipped where no index answers and no earlier environment is left.
    """
    command = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "torch")
    try:
        report = json.loads(pip(Path(sys.executable), *command))
    except Skipped as error:
        known = {path.parent.name for path in folder.glob("[0-9]*/ready")} - {oldest_version()}
        if not known:
            raise
        newest = max(known, key=numbers)
        print(f"which torch is the newest is not known ({error}): {newest}, which is here, is taken for it")
        return newest
    (version,) = (item["metadata"]["version"] for item in report["install"] if item["metadata"]["name"] == "torch")
    return str(version)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def environment_of(version: str, folder: Path) -> Path:
    """The Python of an environment with this torch: the one that is there, or a new one. Raises Skipped."""
    home = folder / version
    python, ready = home / "bin" / "python", home / "ready"
    if ready.exists() and subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0:
        return python
    shutil.rmtree(home, ignore_errors=True)  # half made, or of a Python that is gone
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < ROOM:
        raise Skipped(f"{folder} must have {ROOM >> 30} GiB free for torch {version}, got {free >> 30}")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip(python, "install", "--quiet", f"torch=={version}")
    ready.touch()
    return python


def side_of(python: Path, folder: Path, *, ours: bool) -> Side:
    """Look at a Python, and give it what it lacks. Raises Skipped if it has no torch with CUDA."""
    done = subprocess.run([str(python), "-c", QUESTION], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"{python}: {(done.stderr.splitlines() or ['no answer'])[-1]}")
    torch, cuda, triton = json.loads(done.stdout)
    if not cuda:
        raise Skipped(f"{python}: torch {torch} was built without CUDA")
    side = Side(python, torch.partition("+")[0], cuda, triton, folder)
    if not ours:
        side.packages = folder / f"packages-{side.torch}"
    missing = subprocess.run(
        [str(python), "-c", LOOK, *NEEDS], env=side.environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = [NEEDS[name] for name in missing]
    if triton and numbers(triton)[:2] < [3, 7]:
        wanted = [OLD_NUMPY if need == "numpy" else need for need in wanted]
    if wanted:
        where = ["--target", str(side.packages)] if side.packages else []
        pip(python, "install", "--quiet", *where, *wanted)
    return side


def copy_sources(tree: Path) -> None:
    """With their times, so that a build does only what has changed since the last."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=NOT_SOURCES)
        else:
            shutil.copy2(ROOT / name, tree / name)


def tool(name: str) -> str:
    """Of the environment that runs this, or on PATH. Raises Skipped."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Skipped(f"{name} is not installed")
    return found


def find_nvcc(cuda: str) -> str:
    """The one that CMakeLists.txt would take. Raises Skipped with the reason why none is."""
    path = ROOT / "csrc" / "find_nvcc.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its named tuple looks itself up
    spec.loader.exec_module(module)
    found = module.find_nvcc(cuda)
    if found.reason:
        raise Skipped(found.reason)
    return str(found.nvcc)


def build(check: Check, side: Side) -> None:
    """The extension with its CUDA kernels, into the copy of the sources."""
    copy_sources(side.tree)
    try:
        side.nvcc = find_nvcc(side.cuda)
    except Skipped as reason:
        check.skip(side.torch, "build", reason)
        return
    flags = ("-DFASTSIMGAN_CUDA=on", f"-DCMAKE_CUDA_COMPILER={side.nvcc}")
    side.built = run_cmake(check, side, "build", side.libraries, *flags)
    if side.built:
        for library in side.libraries.glob("*.so"):
            shutil.copy2(library, side.tree / "fastsimgan")


def build_without_nvcc(check: Check, side: Side) -> None:
    """Torch with CUDA on a machine that has no nvcc: the CPU's ops, and an extension that knows why it has no more."""
    libraries = side.folder / f"build-{side.torch}-no-nvcc" / "fastsimgan"
    if run_cmake(check, side, "build, no nvcc", libraries, "-DFASTSIMGAN_CUDA=auto", CUDACXX="/no/nvcc"):
        (extension,) = libraries.glob("_C.*")
        check.step(side, "it says why", [str(side.python), "-c", WHY, str(extension)])


def run_cmake(check: Check, side: Side, name: str, libraries: Path, *flags: str, **environment: str) -> bool:
    """Configure and build into the folder around ``libraries``; True if there is a library now."""
    try:
        cmake, ninja = tool("cmake"), tool("ninja")
    except Skipped as reason:
        check.skip(side.torch, name, reason)
        return False
    configure = [cmake, "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-S{side.tree}", f"-B{libraries.parent}"]
    configure += [f"-DFASTSIMGAN_PYTHON={side.python}", f"-DFASTSIMGAN_OUTPUT={libraries}", *flags]
    return check.step(side, f"{name}: configure", configure, **environment) and check.step(
        side, name, [cmake, "--build", str(libraries.parent)], **environment
    )


def compile_kernels(check: Check, side: Side) -> None:
    """Triton's kernels by this torch's Triton, the .cu files by nvcc where there is one."""
    if side.triton:
        check.step(side, f"kernels, triton {side.triton}", [str(side.python), "-m", "bench.aot"])
    else:
        check.skip(side.torch, "kernels", f"torch {side.torch} came without triton")


def pretend(check: Check, side: Side) -> None:
    """The tests of the CUDA path on a device that computes on the CPU."""
    if not side.built:
        check.skip(side.torch, "pretend device", "the extension has not been built with CUDA")
        return
    pytest = ("-m", "pytest", "tests/cuda", "-q", "-p", "no:cacheprovider")
    check.step(side, "pretend device", [str(side.python), "-m", "tests.pretend_cuda", *pytest])


def load_others(check: Check, sides: Sequence[Side]) -> None:
    """The stable ABI: what was built against one torch serves the others."""
    built = [side for side in sides if side.built]
    for side in built:
        for other in built:
            if other is not side:
                library = str(other.libraries / "libfastsimgan_ops.so")
                check.step(side, f"load what {other.torch} built", [str(side.python), "-c", LOAD, library])


def find_sides(check: Check, pythons: Sequence[str], folder: Path) -> list[Side]:
    """Every torch that can be had. What cannot is a row of the table."""
    sides: dict[str, Side] = {}
    for name in pythons or ("oldest", "newest"):
        begin = time.monotonic()
        try:
            python = Path(name)
            if not pythons:
                python = environment_of(oldest_version() if name == "oldest" else newest_version(folder), folder)
            side = side_of(python, folder, ours=not pythons)
        except Skipped as reason:
            check.skip(name, "environment", reason)
            continue
        if side.torch not in sides:
            check.add(side, "environment", "passed", begin)
            sides[side.torch] = side
    return list(sides.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_check", description="The CUDA path with no GPU.")
    parser.add_argument("--python", action="append", help="one that has torch with CUDA; may be given several times")
    parser.add_argument("--require", action="store_true", help="fail where anything must be skipped")
    arguments = parser.parse_args(argv)

    pythons = arguments.python or os.environ.get("CUDA_PYTHONS", "").split()
    for python in pythons:
        if not os.access(python, os.X_OK):
            parser.error(f"--python must be a program, got {python}")
    check = Check()
    folder = Path(os.environ.get("CUDA_VENVS") or ROOT / ".venv-cuda").resolve()
    sides = find_sides(check, pythons, folder)
    for side in sides:
        build(check, side)
        compile_kernels(check, side)
        pretend(check, side)
    load_others(check, sides)
    if sides:
        build_without_nvcc(check, sides[-1])
    print(f"\n{check.table()}")
    return 1 if check.failed(require=arguments.require) else 0


if __name__ == "__main__":
    sys.exit(main())
