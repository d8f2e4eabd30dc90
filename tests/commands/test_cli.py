"""What every command does with an error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastsimgan import cli


@dataclass(frozen=True)
class Nothing:
    """No settings."""


def run(error: Exception) -> int:
    def command(_: Nothing) -> None:
        raise error

    return cli.run(command, Nothing, prog="command", description="", argv=[])


def test_a_device_without_memory_is_one_line_and_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. 1.00 GiB is free. Of the allocated memory 3 bytes ..."
    assert run(torch.OutOfMemoryError(text)) == 3
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. 1.00 GiB is free. "
        "Free some, or compute elsewhere: --device cpu\n"
    )


def test_any_other_error_is_a_defect_and_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="^defect$"):
        run(RuntimeError("defect"))
