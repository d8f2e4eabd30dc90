"""``python -m bench.aot``: compile every kernel ahead of time for sm_80, sm_90 and sm_100. Needs no GPU.

Each Triton launcher is called on meta tensors with its kernels replaced by recorders; what it would have launched, with
those types, constants and alignments, is then compiled to PTX and cubin by the assembler that Triton ships. The
``.cu`` files follow, where nvcc is installed. Prints registers, shared memory and spills; exit code 1 if any spills.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Row(NamedTuple):
    kernel: str
    arch: str
    registers: int  # a thread
    shared: int  # bytes a block
    spills: int  # bytes, stores and loads together


@dataclass
class Launch:
    """One recorded launch: what Triton's just-in-time compiler would be given."""

    kernel: Any
    label: str
    num_warps: int = 4
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[int], list[list[Any]]] = field(default_factory=dict)

    @classmethod
    def record(cls, kernel: Any, label: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
        kwargs = dict(kwargs)
        launch = cls(kernel, label, num_warps=kwargs.pop("num_warps", 4))
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for index, parameter in enumerate(kernel.params):
            value, name = given[parameter.name], parameter.name
            # As the just-in-time compiler specialises: 1 is a constant, and multiples of 16 are known to be so.
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                launch.signature[name] = "constexpr"
                launch.constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                launch.signature[name] = "*" + _TYPES[value.dtype]
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
            compiled = triton.compile(source, target=target, options={"num_warps": self.num_warps})
        assert compiled.asm["ptx"] and compiled.asm["cubin"]
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill", log.getvalue())
        assert registers and spills, f"no resource report from ptxas: {log.getvalue()!r}"
        return Row(
            self.label, f"sm_{capability}", int(registers[1]), compiled.metadata.shared, sum(int(n) for n in spills)
        )


@contextlib.contextmanager
def recording(module_name: str, label: str, launches: list[Launch]) -> Iterator[Any]:
    """The kernel module with each ``*_kernel`` replaced by a recorder that appends to ``launches``."""
    module = importlib.import_module(f"fastsimgan.kernels.{module_name}")

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*args: Any, **kwargs: Any) -> None:
                launches.append(Launch.record(self.kernel, f"{module_name}.{self.name} {label}", args, kwargs))

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


def all_launches() -> list[Launch]:
    """Every Triton kernel at the sizes that take its different paths: odd and even, 32-bit and 64-bit, each dtype."""
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    return [
        *refiner_loss("gaze float32", (512, 1, 35, 55), (9, 14), float32),
        *refiner_loss("odd float16", (1, 3, 35, 55), (1, 1), float16),
        *refiner_loss("hand bfloat16 2^32", (2**17, 1, 224, 224), (7, 7), bfloat16),
        *discriminator_loss("gaze float32", (512, 2, 9, 14), (512, 2, 9, 14), float32),
        *discriminator_loss("odd float16", (3, 2, 1, 1), (1, 2, 9, 14), float16),
        *discriminator_loss("many patches bfloat16", (2**17, 2, 56, 56), (512, 2, 56, 56), bfloat16),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description="Compile every kernel ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="Triton kernels whose label contains this, and no .cu file")
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")

    rows = [
        launch.compile(arch) for launch in all_launches() if arguments.only in launch.label for arch in arguments.arch
    ]
    skipped = "--only" if arguments.only else "" if shutil.which("nvcc") else "no nvcc"
    if not skipped:
        from bench import aot_cuda

        rows += [Row(*row) for row in aot_cuda.rows(arguments.arch)]

    width = max((len(row.kernel) for row in rows), default=0)
    print(f"{'kernel':{width}}  arch    registers  shared  spills")
    for row in rows:
        print(f"{row.kernel:{width}}  {row.arch:6}  {row.registers:9}  {row.shared:6}  {row.spills:6}")
    if skipped:
        print(f".cu files skipped: {skipped}")
    spilling = [row for row in rows if row.spills]
    print(f"{len(rows)} compiled with triton {triton.__version__}, {len(spilling)} spill")
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
