"""The GPU session's command: its exit codes where there is nothing to run."""

from __future__ import annotations

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 3
    assert capsys.readouterr().out == "no GPU\n"
