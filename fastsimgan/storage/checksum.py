"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


def hash_file(path: Path, complaint: str = "cannot be read") -> str:
    """SHA-256 of a file. Raises InputError with ``complaint`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{printable(path)}: {complaint}: {error.strerror}") from error
