"""``metrics.jsonl``: one line for each step of training."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fastsimgan.storage.atomic import flush, write_atomically


class MetricsLog:
    """Appends lines to a file, and drops those that will be written again.

    Args:
        path: the file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.monotonic()

    def record(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line."""
        row = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self._began, 3)}
        with self._path.open("a") as file:
            file.write(json.dumps(row | {name: round(value, 6) for name, value in metrics.items()}) + "\n")

    def cut(self, done: dict[str, int]) -> None:
        """Drop the lines written after ``done`` steps of each phase, and half a line at the end."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        rows = [(line, json.loads(line)) for line in whole]
        kept = [line for line, row in rows if row["step"] <= done[row["phase"]]]
        write_atomically(self._path, "".join(kept).encode())

    def flush(self) -> None:
        """Have the lines reach the disk."""
        flush(self._path)
