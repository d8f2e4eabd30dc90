"""Tests that need a CUDA device: a pretend one (`python -m tests.pretend_cuda -m pytest tests/cuda`), or a real one."""

from __future__ import annotations

import os

import pytest
import torch

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"


@pytest.fixture(autouse=True)
def _cuda(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and no pretend one (make cuda-check)")
    if request.node.get_closest_marker("pretend") and not PRETEND:
        pytest.skip("it asks the pretend device (python -m tests.pretend_cuda)")
