"""``python -m bench.aot``: compile every kernel ahead of time for sm_80, sm_90 and sm_100. Needs no GPU.

Each Triton launcher is called on meta tensors with its kernels replaced by recorders; what it would have launched, with
those types, constants and alignments, is then compiled to PTX and cubin by the assembler that Triton ships. The
``.cu`` files follow, where nvcc is installed. Prints registers, shared memory, spills and the matrix unit's
instruction; exit code 1 if a kernel fails to compile or spills. Needs nothing but torch and triton.

Compilers run in processes of their own, one a core: an assertion inside Triton kills its process, and is then reported
as the failure of the kernel it was at.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The matrix unit's instruction in PTX, the newest first: Hopper's and Blackwell's take operands from shared memory.
PRODUCTS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_SASS = {80: "HMMA", 90: "HGMMA"}  # the same in machine code, where it was looked up
_MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block can have


class Row(NamedTuple):
    kernel: str
    arch: str
    registers: int  # a thread
    shared: int  # bytes a block
    spills: int  # bytes, stores and loads together
    products: str = ""  # how matrices are multiplied: one of PRODUCTS, and behind it machine code's own name for it


class Failure(NamedTuple):
    kernel: str
    arch: str
    reason: str


@dataclass
class Launch:
    """One recorded launch: what Triton's just-in-time compiler would be given."""

    kernel: Any
    label: str
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[int], list[list[Any]]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # the arguments that are tensors, by name
    grid: tuple[int, ...] = ()

    @classmethod
    def record(cls, kernel: Any, label: str, grid: tuple[int, ...], args: Sequence[Any], kwargs: Any) -> Launch:
        kwargs = dict(kwargs)
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launch = cls(kernel, label, {"num_warps": 4} | options, grid=grid)
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for index, parameter in enumerate(kernel.params):
            value, name = given[parameter.name], parameter.name
            # As the just-in-time compiler specialises: 1 is a constant, and multiples of 16 are known to be so.
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                launch.signature[name] = "constexpr"
                launch.constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                launch.signature[name] = "*" + _TYPES[value.dtype]
                launch.tensors[name] = value
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, int):
                launch.signature[name] = "i32" if value < 2**31 else "i64"
                aligned = value % 16 == 0
            else:
                launch.signature[name] = "fp32"
                aligned = False
            if aligned:
                launch.attributes[(index,)] = [["tt.divisibility", 16]]
        return launch

    def compile(self, capability: int) -> Row:
        """Compile for ``sm_<capability>``; raises what Triton raises."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        log = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as cache,  # a cubin from the user's cache would come without its log
            knobs.cache.scope(),
            knobs.nvidia.scope(),
            contextlib.redirect_stdout(log),
        ):
            knobs.cache.dir = cache
            knobs.nvidia.dump_ptxas_log = True
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options=self.options)
            ptx = compiled.asm["ptx"]
            products = next((name for name in PRODUCTS if name in ptx), "")
            if products and (instruction := _SASS.get(capability)):
                products += f" ({instruction if instruction in compiled.asm['sass'] else f'no {instruction}'})"
        assert ptx and compiled.asm["cubin"]
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill", log.getvalue())
        assert registers and spills, f"no resource report from ptxas: {log.getvalue()!r}"
        shared, most = compiled.metadata.shared, _MOST_SHARED[capability]
        assert shared <= most, f"it needs {shared} bytes of shared memory, and a block has {most} at most"
        spilled = sum(int(number) for number in spills)
        return Row(self.label, f"sm_{capability}", int(registers[1]), shared, spilled, products)


@contextlib.contextmanager
def recording(module_name: str, label: str, launches: list[Launch]) -> Iterator[Any]:
    """The kernel module with each ``*_kernel`` replaced by a recorder that appends to ``launches``."""
    module = importlib.import_module(f"fastsimgan.kernels.{module_name}")

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*args: Any, **kwargs: Any) -> None:
                name = f"{module_name}.{self.name} {label}"
                if before := sum(launch.label.startswith(name) for launch in launches):
                    name += f" #{before + 1}"
                launches.append(Launch.record(self.kernel, name, grid, args, kwargs))

            return record

    with contextlib.ExitStack() as stack:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(module, name, Recorder(name)))
        yield module


def refiner_loss(label: str, images: tuple[int, ...], patches: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    launches: list[Launch] = []
    with recording("refiner_loss", label, launches) as module:
        refined = torch.empty(images, dtype=dtype, device="meta")
        logits = torch.empty((images[0], 2, *patches), dtype=dtype, device="meta")
        loss, _, _, grad_logits, grad_refined = module.launch(
            logits, refined, refined, 0.5, 1.0, 1.0, torch.contiguous_format
        )
        module.scale_(loss, grad_logits, grad_refined, 1.0, dtype)
    return launches


def discriminator_loss(label: str, refined: tuple[int, ...], real: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    launches: list[Launch] = []
    with recording("discriminator_loss", label, launches) as module:
        module.launch(*(torch.empty(shape, dtype=dtype, device="meta") for shape in (refined, real)), 1.0, 1.0)
    return launches


def residual_block(label: str, shape: tuple[int, ...], features: torch.dtype, products: torch.dtype) -> list[Launch]:
    launches: list[Launch] = []
    maps = shape[1]
    with recording("residual_block", label, launches) as module:
        x = torch.empty(shape, dtype=features, device="meta").contiguous(memory_format=torch.channels_last)
        weight, bias = torch.empty((maps, maps, 3, 3), device="meta"), torch.empty(maps, device="meta")
        out, hidden = module.forward(x, weight, bias, weight, bias, products)
        module.backward(out, x, hidden, out, weight, weight)
    return launches


def all_launches() -> list[Launch]:
    """Every Triton kernel at the sizes that take its different paths: odd and even, 32-bit and 64-bit, each dtype."""
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    return [
        *refiner_loss("gaze float32", (512, 1, 35, 55), (9, 14), float32),
        *refiner_loss("gaze bfloat16", (512, 1, 35, 55), (9, 14), bfloat16),
        *refiner_loss("hands float32", (512, 1, 224, 224), (56, 56), float32),
        *refiner_loss("odd float16", (1, 3, 35, 55), (1, 1), float16),
        *refiner_loss("hand bfloat16 2^32", (2**17, 1, 224, 224), (7, 7), bfloat16),
        *discriminator_loss("gaze float32", (512, 2, 9, 14), (512, 2, 9, 14), float32),
        *discriminator_loss("hands float32", (512, 2, 56, 56), (512, 2, 56, 56), float32),
        *discriminator_loss("odd float16", (3, 2, 1, 1), (1, 2, 9, 14), float16),
        *discriminator_loss("many patches bfloat16", (2**17, 2, 56, 56), (512, 2, 56, 56), bfloat16),
        *residual_block("gaze bfloat16", (512, 64, 35, 55), float32, bfloat16),
        *residual_block("gaze bfloat16 throughout", (512, 64, 35, 55), bfloat16, bfloat16),
        *residual_block("hands float16", (128, 32, 224, 224), float32, float16),
        *residual_block("wide float16 throughout", (512, 128, 48, 48), float16, float16),
        *residual_block("odd bfloat16", (1, 48, 35, 55), float32, bfloat16),
        *residual_block("narrow float16 2^32", (2**13, 16, 224, 224), float32, float16),
    ]


# -- compilers in processes of their own -------------------------------------------------------------------------------


def serve() -> None:
    """A compiler: reads a launch's number and an architecture a line, answers each with a line of JSON."""
    launches = all_launches()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print goes to the log; the answers have a pipe of their own
    for line in sys.stdin:
        number, capability = map(int, line.split())
        try:
            answer: dict[str, Any] = {"row": launches[number].compile(capability)}
        except Exception as error:  # Triton has no common class for what its passes raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def compile_all(jobs: Sequence[tuple[int, int]], launches: Sequence[Launch], compilers: int) -> list[Row | Failure]:
    """A row or a failure for each job (number of a launch, architecture), in their order; none is tried twice.

    A compiler that dies takes nothing with it but the kernel it was at; the next job starts another one.
    """
    results: list[Row | Failure | None] = [None] * len(jobs)
    waiting = iter(range(len(jobs)))
    lock = threading.Lock()

    def work() -> None:
        compiler, log = None, None
        try:
            while True:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                if compiler is None:
                    log = tempfile.TemporaryFile("w+")
                    compiler = _start(log)
                assert compiler.stdin and compiler.stdout and log
                begin = log.seek(0, os.SEEK_END)
                number, capability = jobs[index]
                line = ""
                with contextlib.suppress(BrokenPipeError):
                    print(number, capability, file=compiler.stdin, flush=True)
                    line = compiler.stdout.readline()
                answer = json.loads(line) if line else {"error": f"the compiler died, exit code {compiler.wait()}"}
                if "row" in answer:
                    results[index] = Row(*answer["row"])
                else:
                    log.seek(begin)
                    reason = f"{answer['error'].strip()}; {_said(log.read())}".rstrip("; ")
                    results[index] = Failure(launches[number].label, f"sm_{capability}", reason)
                if not line:
                    _stop(compiler)
                    compiler = None
        finally:
            if compiler is not None:
                _stop(compiler)

    threads = [threading.Thread(target=work) for _ in range(min(compilers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [
        result or Failure(launches[number].label, f"sm_{capability}", "no compiler could be started")
        for result, (number, capability) in zip(results, jobs, strict=True)
    ]


def _start(log: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.aot", "--serve"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def _stop(compiler: subprocess.Popen[str]) -> None:
    assert compiler.stdin and compiler.stdout
    with contextlib.suppress(BrokenPipeError):
        compiler.stdin.close()
    compiler.stdout.close()
    compiler.wait()


def _said(log: str) -> str:
    """The line of a compiler's log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Assertion|LLVM ERROR|error:|fatal", line)]
    return next(iter(telling or lines[-1:]), "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description="Compile every kernel ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="Triton kernels whose label contains this, and no .cu file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    if arguments.serve:
        serve()
        return 0

    launches = all_launches()
    jobs = [
        (number, arch)
        for number, launch in enumerate(launches)
        if arguments.only in launch.label
        for arch in arguments.arch
    ]
    results = compile_all(jobs, launches, compilers=len(os.sched_getaffinity(0)))
    rows = [result for result in results if isinstance(result, Row)]
    failures = [result for result in results if isinstance(result, Failure)]
    skipped = "--only" if arguments.only else "" if shutil.which("nvcc") else "no nvcc"
    if not skipped:
        from bench import aot_cuda

        rows += [Row(*row) for row in aot_cuda.rows(arguments.arch)]

    width = max((len(row.kernel) for row in (*rows, *failures)), default=0)
    print(f"{'kernel':{width}}  arch    registers  shared  spills  products")
    for row in rows:
        line = f"{row.kernel:{width}}  {row.arch:6}  {row.registers:9}  {row.shared:6}  {row.spills:6}  {row.products}"
        print(line.rstrip())
    for failure in failures:
        print(f"{failure.kernel:{width}}  {failure.arch:6}  FAILED: {failure.reason}")
    if skipped:
        print(f".cu files skipped: {skipped}")
    spilling = [row for row in rows if row.spills]
    print(f"{len(rows)} compiled with triton {triton.__version__}, {len(spilling)} spill, {len(failures)} fail")
    return 1 if spilling or failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
