"""Which nvcc builds the CUDA kernels, and why none does. Needs no torch.

One that fits has the major version of torch's CUDA and makes a program of a small kernel here: a host compiler that is
too new for it, or a toolkit without its headers or its library, is found now and not in the middle of an install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)  # built for those of them that nvcc knows; with PTX of the last
PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(__half* x, __nv_bfloat16* y) { *x = *x, *y = *y; }
int main() { probe<<<1, 1>>>(nullptr, nullptr); }
"""


class Found(NamedTuple):
    """Either a compiler and what it compiles for, as CMAKE_CUDA_ARCHITECTURES has it, or a reason why there is none."""

    nvcc: str = ""
    architectures: tuple[str, ...] = ()
    reason: str = ""


def find_nvcc(cuda: str, named: str = "") -> Found:
    """The first nvcc that fits CUDA version ``cuda`` (torch's, "13.0").

    Looks at ``named`` alone where it is given, else at CUDACXX alone where that is set, else in CUDA_HOME, CUDA_PATH,
    on PATH, in /usr/local/cuda and in /usr/local/cuda-X of torch's version.
    """
    reasons = []
    for path in candidates(cuda, named):
        found = look_at(path, cuda)
        if found.nvcc:
            return found
        reasons.append(found.reason)
    return Found(reason=reasons[0] if reasons else "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")


def candidates(cuda: str, named: str = "") -> list[str]:
    """Where nvcc may be, each once, best first."""
    chosen = named or os.environ.get("CUDACXX", "")
    if chosen:
        return [shutil.which(chosen) or chosen]
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    inside = [Path(folder, "bin") for folder in folders if folder]
    inside += os.get_exec_path()
    inside += [Path("/usr/local", name, "bin") for name in ("cuda", f"cuda-{cuda}", f"cuda-{cuda.partition('.')[0]}")]
    found = (shutil.which("nvcc", path=str(folder)) for folder in inside)
    return list(dict.fromkeys(path for path in found if path))


def look_at(nvcc: str, cuda: str) -> Found:
    """Whether this one fits. A reason names no path of ours, since it goes into a library."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Found(reason=f"nvcc --version does not run: {type(error).__name__}")
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None:
        return Found(reason="nvcc --version names no release")
    if version[1] != cuda.partition(".")[0]:
        return Found(
            reason=f"nvcc must have the major version of torch's CUDA {cuda}, got nvcc {version[1]}.{version[2]}"
        )
    known = known_architectures(nvcc)
    if not known:
        return Found(reason=f"nvcc {version[1]}.{version[2]} knows none of sm_{', sm_'.join(map(str, ARCHITECTURES))}")
    if (reason := compile_probe(nvcc, known[0])) is not None:
        return Found(reason=f"nvcc {version[1]}.{version[2]} compiles nothing here: {reason}")
    return Found(nvcc, (*(f"{number}-real" for number in known[:-1]), str(known[-1])))


def known_architectures(nvcc: str) -> list[int]:
    """Those of `ARCHITECTURES` that this nvcc compiles for: 12.6 knows no sm_100."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, timeout=60).stdout.split()
    return [number for number in ARCHITECTURES if f"compute_{number}" in listed]


def compile_probe(nvcc: str, architecture: int) -> str | None:
    """None where a small program compiles and links (CMake does the same, and ends where it fails), else the error."""
    command = [nvcc, "-std=c++20", f"-arch=sm_{architecture}", "probe.cu", "-o", "probe"]
    if host := os.environ.get("CUDAHOSTCXX"):  # CMake reads it too
        command += ["-ccbin", host]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(PROBE)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            return type(error).__name__
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|cannot find", line)]
    return (errors or lines or [f"exit code {done.returncode}"])[0][:200]
