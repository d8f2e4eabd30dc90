"""With no CUDA device, Triton kernels run in its interpreter, which must be chosen before they are imported. And how
torch's threads wait must be settled before torch is imported, as it is in the commands."""

from __future__ import annotations

import os

import pytest

import fastsimgan  # noqa: F401

# isort: split
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def poisoned_memory():
    """Every uninitialised float tensor holds NaN: what a kernel forgets to write cannot look right by chance."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
