"""``python -m tests.pretend_cuda [PYTHON ARGUMENT ...]``: run Python with two pretend CUDA devices.

    python -m tests.pretend_cuda -m pytest tests/cuda -q
    python -m tests.pretend_cuda my_script.py

Builds the two libraries first (under ``build/pretend_cuda``), with nvcc.
Exit code 3, and why, where that cannot be done.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def environment() -> dict[str, str]:
    """What a process needs to see the pretend devices, beside the environment it has.

    Raises:
        RuntimeError: torch was built without CUDA, or the libraries cannot be built.
    """
    libraries = _build()
    path = [str(HERE / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    return {
        "LD_PRELOAD": str(libraries / "libpretend_cudart.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join(path),
        "FASTSIMGAN_PRETEND_CUDA": "1",
        "TRITON_INTERPRET": "1",  # Triton's kernels are computed by its interpreter
    }


def _build() -> Path:
    # nvcc, though nothing is for a GPU: it knows where its headers are, the wheels beside torch lack some of them
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH, and its headers are needed")
    sources = [HERE / "runtime.cpp", HERE / "driver.cpp"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    folder = ROOT / "build" / "pretend_cuda" / digest.hexdigest()[:16]
    for source, name in zip(sources, ("libpretend_cudart.so", "libcuda.so.1"), strict=True):
        if (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{os.getpid()}-{name}"
        command = [compiler, "-std=c++17", "-O1", "-shared", "-Xcompiler=-fPIC", "--cudart=none", str(source)]
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile: {(done.stderr or done.stdout).strip()}")
        unfinished.rename(folder / name)
    return folder


def main() -> int:
    check = "import sys, torch; sys.exit(torch.version.cuda is None)"
    if subprocess.run([sys.executable, "-c", check], stderr=subprocess.DEVNULL).returncode:
        print("pretend CUDA: this Python has no torch that was built with CUDA", file=sys.stderr)
        return 3
    try:
        known = environment()
    except RuntimeError as error:
        print(f"pretend CUDA: {error}", file=sys.stderr)
        return 3
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], os.environ | known)


if __name__ == "__main__":
    sys.exit(main())
