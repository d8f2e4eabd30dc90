"""In which type the networks compute: float32, bfloat16, or float16 under a loss scale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """``name`` itself, or what "auto" means on ``device``; and the reason, for people."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU computes in it"
        return "float32", "this GPU has no bfloat16"
    if cpu_has_bfloat16():
        return "bfloat16", "this CPU has instructions for it"
    return "float32", "this CPU has no bfloat16 instructions"


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, and does not emulate it."""
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # not in this version of torch
        return False


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Where the networks run and their losses are taken: weights stay float32, matrix products are in ``precision``."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


@contextmanager
def convolutions(device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """Where networks are trained on ``device``; elsewhere nothing changes.

    Float32 convolutions on CUDA are computed in float32: by default cuDNN rounds their inputs to TF32, which has as few
    bits as float16.

    cuDNN times its algorithms for each shape, of which there is a handful, and takes the fastest; ``deterministic``: it
    takes one by rule that computes the same bits each time, and so do PyTorch's other operators and what
    `torch.compile` makes.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, not deterministic, deterministic=deterministic, allow_tf32=False):
        if not deterministic:
            yield
            return
        from torch._inductor import config as inductor

        knobs: Any = torch.utils.deterministic
        fill = knobs.fill_uninitialized_memory
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a matrix is first multiplied
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        with inductor.patch(deterministic=True):
            torch.use_deterministic_algorithms(True)
            knobs.fill_uninitialized_memory = False  # a launch for each new tensor
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(before[0], warn_only=before[1])
                knobs.fill_uninitialized_memory = fill
