"""Which implementation of an op serves a call: the same rule for all ops, and the table of it that people see."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

import torch

from fastsimgan.errors import InputError, UnavailableError

# Read once, at import: the answers cannot change in a process, and torch.compile must not trace through them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

RACED = "what wins a race at start-up"
"""In `Dispatch.automatic`, behind the implementation without which there is none."""


@dataclass(frozen=True)
class Dispatch:
    """The implementations of one op. Each has the plain reference besides, which can always run.

    Args:
        op: its name.
        missing: gives each implementation but the reference, in the order of preference: None where it can run in this
            process, otherwise why it cannot.
        automatic: what "auto" prefers on each type of device, the first first; before `RACED`: what a race there may
            choose instead of the reference, which "auto" itself is.
    """

    op: str
    missing: Callable[[], Mapping[str, str | None]]
    automatic: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def implementations(self) -> dict[str, str | None]:
        """Each implementation, in the order ``"auto"`` prefers them: None where it can run, otherwise why it cannot."""
        return {**self.missing(), "reference": None}

    def choose(self, impl: str, candidates: Sequence[str], unmet: Callable[[str], str | None]) -> str:
        """The implementation that serves a call.

        Args:
            impl: what was asked for.
            candidates: what "auto" tries, in this order, before the reference.
            unmet: gives why an implementation cannot serve this call; None where it can.

        Raises:
            InputError: there is no such implementation.
            UnavailableError: it was asked for by name and cannot serve the call.
        """
        if impl == "reference":
            return impl
        if impl == "auto":
            for name in candidates:
                if unmet(name) is None:
                    return name
            return "reference"
        if impl not in self.missing():
            raise InputError(f"impl must be one of auto, {', '.join(self.implementations())}, got {impl!r}")
        if (reason := unmet(impl)) is not None:
            raise UnavailableError(f"{self.op} impl={impl!r}: {reason}")
        return impl

    def table(self, devices: Sequence[str]) -> list[tuple[str, str]]:
        """For people: each implementation and whether it can run, then what "auto" takes on each type of device."""
        reasons = self.implementations()
        rows = [(name, "can run" if reason is None else reason) for name, reason in reasons.items()]
        return rows + [(f"on {device}", self._taken(device, reasons)) for device in devices]

    def _taken(self, device: str, reasons: Mapping[str, str | None]) -> str:
        preferred = self.automatic.get(device, ())
        taken = next((name for name in preferred if name in reasons and reasons[name] is None), "reference")
        return RACED if RACED in preferred and taken != "reference" else taken


def _triton_missing() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if INTERPRETED:
        triton, numpy = (metadata.version(package) for package in ("triton", "numpy"))
        old, new = (tuple(int(part) for part in version.split(".")[:2]) for version in (triton, numpy))
        if old < (3, 7) and new >= (2, 4):  # which no longer makes a number of an array of one
            return f"the interpreter of triton {triton} needs numpy < 2.4, got {numpy}"
    return None


TRITON_MISSING = _triton_missing()


def triton_unusable() -> str | None:
    """Why no Triton kernel can run in this process; None where one can."""
    no_device = None if INTERPRETED or torch.cuda.is_available() else "no CUDA device"
    return TRITON_MISSING or no_device
