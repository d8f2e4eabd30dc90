"""With no CUDA device, Triton kernels run in its interpreter, which must be chosen before they are imported.
How torch's threads wait must be settled before torch is imported, as it is in the commands; and how many there are,
where tests run in several processes (pytest-xdist): one each, or they wait for each other.

On the pretend device (`tests/pretend_cuda`) CUDA is there and no hardware is: what tests/cuda holds runs there, what
needs a GPU does not, and Triton is interpreted.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

import fastsimgan  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import torch

from fastsimgan import cli

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"
HAS_GPU = torch.cuda.is_available() and not PRETEND
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
MADE_FOR_PRETEND = Path(__file__).resolve().parent / "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            if PRETEND and MADE_FOR_PRETEND in item.path.parents:
                continue
            reason = "a pretend CUDA device, and no GPU" if PRETEND else "no CUDA device"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=importlib.util.find_spec("tyro") is None)
def commands_need_tyro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tyro a test skips where it runs a command. (In a process of its own it must ask for tyro itself.)"""

    def skip(*_: Any, **__: Any) -> NoReturn:
        pytest.skip("tyro is not installed")

    monkeypatch.setattr(cli, "run", skip)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A refiner's file, as far as a run of refinement with a refiner of `builders` is concerned: it is hashed."""
    path = tmp_path / "refiner.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def small_work_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A work unit is ten files, or ten images of five rows and seven columns."""
    from fastsimgan.refinement.sources import unit_parts

    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 10)
    monkeypatch.setattr(unit_parts, "BYTES_PER_UNIT", 10 * 35)


@pytest.fixture
def poisoned_memory():
    """Every uninitialised float tensor holds NaN: what a kernel forgets to write cannot look right by chance."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
