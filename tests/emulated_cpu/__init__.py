"""A processor with AVX2, AVX-512, VNNI and AMX for machines without them: see README.md."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EVERYTHING = "avx2 avx512 vnni amx"
"""What the emulated processor can have."""

_COMPILER = shutil.which("c++")
# As CMakeLists.txt has them. No product is fused with an addition: whether it is depends on the compiler and the
# processor.
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-trapping-math"]
_FLAGS += ["-ffp-contract=off"]
_FORMS = {
    "emulated": ["-Wno-psabi", f"-I{HERE}"],
    # what the processor's own instructions give, on one that has them all but AMX
    "native": ["-Wno-maybe-uninitialized"],
    "sanitized": ["-Wno-psabi", f"-I{HERE}", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
_INSTRUCTIONS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "vnni": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    "amx": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}


def missing() -> str | None:
    """Why nothing can be built here; None if it can."""
    if sys.platform != "linux":
        return "libraries are built for Linux alone"
    return None if _COMPILER else "no C++ compiler"


def _compile(
    name: str,
    sources: list[Path],
    flags: list[str],
    more: dict[Path, list[str]] | None = None,
    links: tuple[str, ...] = (),
) -> Path:
    """A shared library of ``sources``, kept under ``build/emulated_cpu`` while csrc/ and this folder do not change.

    Args:
        name: of the library, ``{name}.so``.
        flags: for all sources, and for linking.
        more: flags for single sources.
        links: libraries that it needs.

    Raises:
        RuntimeError: a source does not compile, in the compiler's words.
    """
    assert _COMPILER is not None
    digest = hashlib.sha256(repr((flags, more, links, _version())).encode())
    for path in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h"), *HERE.glob("*.h"), *sources]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulated_cpu" / digest.hexdigest()[:16]
    library = folder / f"{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        unfinished = folder / f"{os.getpid()}-{source.parent.name}-{source.stem}.o"
        _run([_COMPILER, *flags, *(more or {}).get(source, []), "-c", str(source), "-o", str(unfinished)])
        return unfinished

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    unfinished = folder / f"{os.getpid()}-{name}.so"
    _run([_COMPILER, *flags, "-shared", *map(str, objects), *links, "-o", str(unfinished)])
    for path in objects:
        path.unlink()
    unfinished.rename(library)
    return library


def ops(form: str = "emulated") -> Path:
    """The library of the residual blocks' ops, from csrc/ as it stands.

    Args:
        form: "emulated"; "sanitized", the same with AddressSanitizer and UndefinedBehaviorSanitizer; or "native", which
            asks the processor and executes what it has, but fuses no product with an addition either.
    """
    import torch

    sources = sorted((ROOT / "csrc").glob("residual_block_*.cpp"))
    features = (ROOT / "csrc" if form == "native" else HERE) / "cpu_features.cpp"
    found = re.search(r"TORCH_TARGET_VERSION=\w+", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    torch_root = Path(torch.__file__).parent
    flags = [*_FLAGS, *_FORMS[form], f"-D{found[0]}", "-isystem", str(torch_root / "include")]
    more = {path: _INSTRUCTIONS.get(path.stem.rpartition("_")[2], []) for path in sources} if form == "native" else {}
    return _compile(f"ops-{form}", [features, *sources], flags, more, (str(torch_root / "lib" / "libtorch_cpu.so"),))


def probes(form: str) -> Path:
    """The library of probes.cpp: each intrinsic as a function over arrays.

    Args:
        form: as of `ops`; or "amx", which is "native" on a processor that has AMX too.
    """
    flags = [*_FLAGS, *_FORMS["native" if form == "amx" else form]]
    if form in ("native", "amx"):
        flags += [*_INSTRUCTIONS["vnni"], "-mavx512bf16", *(_INSTRUCTIONS["amx"] if form == "amx" else [])]
    if form != "native":
        flags.append("-DAMX")
    return _compile(f"probes-{form}", [HERE / "probes.cpp"], flags)


def environment(has: str = EVERYTHING, form: str = "emulated") -> dict[str, str]:
    """What a process needs to have its fastsimgan._C from `ops`, beside the environment it has.

    Args:
        has: the instruction sets of the emulated processor, of `EVERYTHING`. AVX-512 is of no use without AVX2, VNNI
            and AMX are of none without AVX-512.
        form: as of `ops`.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(path), "EMULATED_CPU": has, "EMULATED_CPU_LIBRARY": str(ops(form))}
    if form == "sanitized":
        # the second, or the first does not find what throws exceptions
        both = (_run([_COMPILER, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so"))
        found["LD_PRELOAD"] = " ".join(both)
        # what is not written yet is a NaN, in every type; what Python keeps until its end is no leak
        found["ASAN_OPTIONS"] = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
        found["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return found


@functools.cache
def _version() -> str:
    return _run([_COMPILER, "--version"])


def _run(command: list[str | None]) -> str:
    done = subprocess.run([part or "" for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[-3]}: {(done.stderr or done.stdout).strip()[-3000:]}")
    return done.stdout
