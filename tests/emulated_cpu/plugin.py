"""For pytest, `-p tests.emulated_cpu.plugin`: fastsimgan finds the emulated processor's extension before its own."""

from __future__ import annotations

from pathlib import Path

import fastsimgan

fastsimgan.__path__.insert(0, str(Path(__file__).resolve().parent / "extension"))


def pytest_sessionstart() -> None:
    import torch

    # where torch finds no AVX, on ARM as well, "cpp" would not be tried
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
