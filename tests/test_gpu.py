"""The GPU session's command: its exit codes where there is nothing to run."""

from __future__ import annotations

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 3
    assert capsys.readouterr().out == "no GPU\n"


def test_a_part_without_content_says_so(capsys):
    assert gpu.main(["train"]) == 2
    assert capsys.readouterr().out == "part train has nothing yet\n"
