"""For pytest, `-p tests.emulated_cpu.plugin`: fastsimgan finds the emulated processor's extension before its own."""

from __future__ import annotations

from pathlib import Path

import fastsimgan

fastsimgan.__path__.insert(0, str(Path(__file__).resolve().parent / "extension"))


def pretend_to_torch() -> None:
    """Where torch finds no AVX, on ARM as well, "cpp" would not be tried. Before fastsimgan's ops are imported."""
    import torch

    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"


def pytest_sessionstart() -> None:
    pretend_to_torch()
