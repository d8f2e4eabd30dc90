"""Errors that a user can cause or should see, each with the exit code its command ends with.

Every message is one line that names the argument or file, the rule, and the value:
``capacity must be at least n=256, got 100``.
"""

from __future__ import annotations


class FastSimGANError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InputError(FastSimGANError, ValueError):
    """A file, folder, array or argument that breaks a stated rule. Nothing has been written."""

    exit_code = 2


SKIP = "--on-error skip leaves bad images out, if they are at most 1 %"
"""The way out of a bad image, for commands that have that flag."""


BAD_SHARE = 0.01
"""Of the images: with more left out, a command fails."""


class UnavailableError(FastSimGANError, RuntimeError):
    """An explicit request that this machine cannot meet (an implementation, a device, an optional package)."""

    exit_code = 3


class TrainingError(FastSimGANError, RuntimeError):
    """Training cannot go on: a loss or a gradient is not finite."""

    exit_code = 4


class Stopped(FastSimGANError):
    """SIGTERM or SIGINT asked for an end; what was under way has been saved. Its exit code is 128 + the signal's."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(f"stopped by signal {signal}, {message}")
        self.exit_code = 128 + signal
