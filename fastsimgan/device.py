"""The device asked for by name."""

from __future__ import annotations

import torch

from fastsimgan.errors import InputError, UnavailableError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU; anything else is taken at its word.

    Raises:
        InputError: not a device's name.
        UnavailableError: CUDA was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device must be "auto", "cpu" or "cuda", got {name!r}') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"device {name!r} was asked for, and torch {torch.__version__} sees no CUDA device here")
    return device
