"""Compile every ``.cu`` file with nvcc for a list of architectures and report what each kernel needs.

The kernels include no torch header, so neither torch with CUDA nor a GPU is needed: nvcc alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"

_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Row(NamedTuple):
    kernel: str
    arch: str
    registers: int  # a thread
    smem: int  # static shared memory, bytes a block
    spills: int  # bytes, stores and loads together


def rows(architectures: Iterable[int] = (80, 90, 100)) -> list[Row]:
    """One row for each kernel of ``csrc/*.cu`` and each architecture (80 is sm_80). Needs nvcc on PATH.

    Raises:
        subprocess.CalledProcessError: a file does not compile; nvcc's own message is in its ``stderr``.
    """
    return [row for arch in architectures for source in sorted(CSRC.glob("*.cu")) for row in _compile(source, arch)]


def _compile(source: Path, arch: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", str(source)]
        command += ["-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    for found in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Row(
            kernel=_readable(found["kernel"]),
            arch=f"sm_{found['arch']}",
            registers=int(found["registers"]),
            smem=int(shared[1]) if shared else 0,
            spills=int(found["stores"]) + int(found["loads"]),
        )


def _readable(symbol: str) -> str:
    """``history_swap_kernel<unsigned char, float, 4>`` of its mangled name, where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    name = subprocess.run([tool, symbol], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+<[^()]*>)\(", name)
    return re.sub(r"\((?:int|bool)\)", "", found[1]) if found else name.split("(")[0].strip()
