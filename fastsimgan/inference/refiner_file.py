"""``refiner.safetensors``: R's weights, and in the header the settings from which the network is built again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError
from fastsimgan.inference.graph_format import check_settings
from fastsimgan.models.refiner import RefinerNetwork
from fastsimgan.storage.atomic import write_atomically

FILE, BEST = "refiner.safetensors", "best.safetensors"
_FORMAT = "fastsimgan.refiner/1"
_DIGEST = "sha256"
IN_FEATURES = (
    "a refiner of a version before --computes carries the image in its features, for which float32 alone is good "
    "enough: train it again for 16 and 8 bits"
)


@dataclass(frozen=True)
class RefinerFile:
    """What ``refiner.safetensors`` holds."""

    module: RefinerNetwork
    settings: dict[str, Any]
    training: str  # JSON, the settings it was trained with
    sha256: str
    in_features: bool
    """Whether it carries the image as small differences of large features, as earlier versions had R begin at the
    identity. In float16 throughout such a refiner was up to 36 grey levels off."""


def read_refiner(path: Path) -> RefinerFile:
    """Read and check the folder of a run, or its ``refiner.safetensors``; InputError as `load_refiner` has it."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such refiner (a run's folder holds one after its first checkpoint)")
    try:
        data = file.read_bytes()
        tensors = load(data)
    except OSError as error:
        raise InputError(f"{file}: the refiner cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from error
    header, rest = _split(data)  # `load` has found it whole
    facts = header.get("__metadata__", {})
    if facts.get("format") != _FORMAT:
        raise InputError(f"{file}: format must be {_FORMAT!r}, got {facts.get('format')!r}")
    # files of earlier versions have none
    if (said := facts.get(_DIGEST)) is not None and said != (found := _digest(header, rest)):
        raise InputError(
            f"{file}: sha256 must be {said}, as when it was written, got {found}: it was damaged or altered"
        )
    try:
        settings = json.loads(facts["settings"])
        check_settings(settings)
        if list(tensors["last.weight"].shape[:2]) != [settings["channels"], settings["width"]]:
            raise ValueError("the header's channels and width are not those of the weights")
        if settings["blocks"] != sum(name.endswith(".conv1.weight") for name in tensors):
            raise ValueError("the header's number of blocks is not that of the weights")
        with torch.device("meta"):  # no memory is taken on the header's word
            module = RefinerNetwork(
                settings["channels"],
                hidden_channels=settings["width"],
                blocks=settings["blocks"],
                first_kernel=settings["first_kernel"],
                computes=settings.setdefault("computes", "image"),
            )
        module.load_state_dict(tensors, assign=True)
        training = facts.get("training", "{}")
        began_there = settings["computes"] == "image" and dict(json.loads(training)).get("identity_init") is True
        in_features = began_there and settings["width"] >= 20 * settings["channels"]  # narrower ones began at random
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: not a whole refiner: {type(error).__name__}: {reason}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{file}: weights must be finite, got NaN or Inf in {name}")
    return RefinerFile(module, settings, training, hashlib.sha256(data).hexdigest(), in_features)


def save_refiner(path: Path, module: RefinerNetwork, *, histogram: str, training: TrainConfig) -> None:
    """Write R's weights and its settings (in the header) to ``path``, at once or not at all.

    Args:
        path: a .safetensors file.
        module: R.
        histogram: "keep" or "equalise", what happens to an image before R.
        training: settings it was trained with, kept for the record.
    """
    settings = describe(module, histogram)
    if training.range is not None:
        settings["range"] = list(training.range)
    header = {"format": _FORMAT, "settings": json.dumps(settings), "training": training.to_header()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    write_atomically(path, _sealed(save(tensors, header)))


def describe(module: RefinerNetwork, histogram: str) -> dict[str, Any]:
    """The settings from which `load_refiner` builds the network again."""
    return {
        "channels": module.last.out_channels,
        "width": module.last.in_channels,
        "blocks": len(module.blocks),
        "first_kernel": module.first.kernel_size[0],
        "computes": module.computes,
        "histogram": histogram,
    }


def _sealed(file: bytes) -> bytes:
    """A safetensors file with a digest of all of it, and its metadata in order: the library writes them in another
    order in each process."""
    header, rest = _split(file)
    facts = header["__metadata__"] | {_DIGEST: _digest(header, rest)}
    header["__metadata__"] = dict(sorted(facts.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def _split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def _digest(header: dict[str, Any], rest: bytes) -> str:
    """SHA-256 over the header, without the digest itself, and the tensors."""
    facts = {name: value for name, value in header["__metadata__"].items() if name != _DIGEST}
    said = json.dumps(header | {"__metadata__": facts}, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(said + rest).hexdigest()
