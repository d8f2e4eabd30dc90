"""Tests that need a CUDA device: a pretend one (`python -m tests.pretend_cuda -m pytest tests/cuda`), or a real one."""

from __future__ import annotations

import os

import pytest
import torch

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device, and no pretend one (make cuda-check)"))
        elif item.get_closest_marker("pretend") and not PRETEND:
            item.add_marker(pytest.mark.skip(reason="it asks the pretend device (python -m tests.pretend_cuda)"))
