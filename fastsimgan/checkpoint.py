"""Checkpoints: one directory a step, complete or absent; tensors in safetensors, never pickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fastsimgan.errors import InputError

_PREFIX = "step-"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-NNNNNNNN`` and remove all but the newest ``keep`` checkpoints.

    The directory is filled beside its final name, flushed to the disk and renamed: a crash leaves the old state.

    Args:
        folder: where the checkpoints of a run live; made if absent.
        step: the iteration that it holds the state after.
        tensors: flat names to tensors.
        facts: JSON-able values kept beside them.
        keep: at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    facts = {**facts, "step": step, "sha256": hashlib.sha256(data).hexdigest()}
    temporary = folder / f".writing-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _write(temporary / "state.safetensors", data)
    _write(temporary / "state.json", (json.dumps(facts, indent=2) + "\n").encode())
    final = folder / f"{_PREFIX}{step:08d}"
    if final.exists():  # the same step again, after a resume: what is there is the same state
        shutil.rmtree(final)
    temporary.rename(final)
    _flush_directory(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint; InputError if its checksum does not match."""
    try:
        facts = json.loads((path / "state.json").read_text())
        data = (path / "state.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole checkpoint: {error}") from error
    if (found := hashlib.sha256(data).hexdigest()) != facts.get("sha256"):
        raise InputError(f"{path}: sha256 must be {facts.get('sha256')}, got {found}: the file is damaged")
    return load(data), facts


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]:
    """The newest checkpoint in ``folder`` that is whole, and why any newer one was passed over.

    Raises:
        InputError: none is there, or none is whole.
    """
    refused: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, *load_checkpoint(path), refused
        except InputError as error:
            refused.append(str(error))
    raise InputError(f"{folder}: no whole checkpoint to resume from" + "".join(f"; {reason}" for reason in refused))


def flatten(prefix: str, state: dict[Any, Any]) -> dict[str, Tensor]:
    """``{"a": {"b": tensor}}`` to ``{"prefix.a.b": tensor}``; values that are not tensors are left out."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= flatten(f"{prefix}.{name}", value)
        elif isinstance(value, Tensor):
            flat[f"{prefix}.{name}"] = value
    return flat


def select(prefix: str, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries below ``prefix.``, with the prefix taken off."""
    return {name[len(prefix) + 1 :]: value for name, value in flat.items() if name.startswith(prefix + ".")}


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it and rename it there."""
    temporary = path.with_name(f".writing-{path.name}")
    _write(temporary, data)
    os.replace(temporary, path)
    _flush_directory(path.parent)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
