"""In the place of fastsimgan._C: the residual blocks' ops for the emulated processor, and nothing else."""

from __future__ import annotations

import os

import torch

torch.ops.load_library(os.environ["EMULATED_CPU_LIBRARY"])


def build_info() -> dict[str, str | bool]:
    return {"torch": torch.__version__, "cuda": False, "no_cuda": "an emulated processor", "avx2": True, "amx": True}
