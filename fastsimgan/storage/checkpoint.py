"""Checkpoints: one directory a step, complete or absent, each file under a checksum; nothing is ever unpickled.

A checkpoint holds ``state.safetensors``, ``state.json`` and ``SHA256SUMS`` (``sha256sum -c`` reads it).
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.storage.atomic import remove_atomically, writing

_log = logging.getLogger(__name__)

_TENSORS, _FACTS, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"

STOPPED = "-stopped"
"""Ends the name of a checkpoint that is only there because training was stopped. It goes when the next one comes, so
that a run that was stopped ends with the same checkpoints as one that was not."""


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/name`` and `remove_old` checkpoints; newer is what comes later by name.

    Whenever the process dies, what stands under a final name is whole (see `storage.atomic`).

    Args:
        folder: where the checkpoints of a run live; made if absent.
        name: sorts after the names of earlier checkpoints; does not start with a dot.
        tensors: flat names to tensors.
        facts: JSON-able values kept beside them.
        keep: at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        _TENSORS: save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        _FACTS: (json.dumps(facts, indent=2) + "\n").encode(),
    }
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in files.items())
    final = folder / name
    with writing(final) as temporary:
        temporary.mkdir()
        for file, data in (files | {_SUMS: sums.encode()}).items():
            (temporary / file).write_bytes(data)
        if final.exists():  # a damaged one, that a resumed run passed over
            remove_atomically(final)
    _log.debug("%s is written, %d bytes", final, sum(map(len, files.values())))
    remove_old(folder, keep)
    return final


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints. One of a stop does not count; it stays while it is the newest."""
    found = list_checkpoints(folder)
    regular = [path for path in found if not path.name.endswith(STOPPED)]
    for path in found[:-1]:
        if path not in regular[-keep:]:
            remove_atomically(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint; InputError if a checksum does not match."""
    try:
        data, facts, sums = ((path / file).read_bytes() for file in (_TENSORS, _FACTS, _SUMS))
    except OSError as error:
        raise InputError(f"{path}: not a whole checkpoint: {error}") from error
    for file, content in ((_TENSORS, data), (_FACTS, facts)):
        if f"{hashlib.sha256(content).hexdigest()}  {file}\n".encode() not in sums:
            raise InputError(f"{path / file}: its sha256 must be the one in {_SUMS}: the checkpoint is damaged")
    return load(data), json.loads(facts)


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
