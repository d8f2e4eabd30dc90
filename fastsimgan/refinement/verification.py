"""Check a finished output against its manifests: every file there, none changed, none too many."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastsimgan.data.formats.listing import STATE
from fastsimgan.data.formats.numpy_file import FILES
from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.errors import InputError
from fastsimgan.refinement.run_directory import FORMAT, partial_of, read_header, read_json, read_lines, state_of
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable


def verify(output: Path) -> dict[str, Any]:
    """Read all of ``output`` again; returns the totals: ``blocks``, ``images``, ``failed``, ``others``.

    Raises InputError naming the first thing that is not as the manifests have it.
    """
    if not os.path.lexists(output):
        hint = f"; {printable(partial_of(output))} is unfinished" if partial_of(output).exists() else ""
        raise InputError(f"{printable(output)}: must exist{hint}")
    is_file = not output.is_dir()
    state = state_of(output, is_file)
    record = read_json(state / "run.json")
    if record.get("format") != FORMAT:
        raise InputError(f"{printable(state)}: format must be {FORMAT!r}, got {record.get('format')!r}")
    totals = read_json(state / "done.json")
    found: dict[str, Any] = {"blocks": 0, "images": 0, "failed": 0, "others": 0}
    files = 0
    identity = record["identity"]
    same = identity["input kind"] == identity["output kind"]  # a new kind of file calls its images so
    arrays = open_arrays(output, identity.get("array") if same else None) if is_file else None
    first = 0
    carried: dict[str, str] = {}  # into a packed file, by name
    for block in range(record["blocks"]):
        manifest = state / "blocks" / f"{block:08d}.jsonl"
        header = read_header(manifest)
        if header["block"] != block:
            raise InputError(f"{printable(manifest)}: must be block {block}'s, got {header['block']}'s")
        found["blocks"] += 1
        for key in ("images", "failed", "others"):
            found[key] += header[key]
        if arrays is not None:
            carried |= {
                line["name"]: line["sha256"] for line in read_lines(manifest) if not {"from", "error"} & line.keys()
            }
            images = arrays.read_range(first, first + header["images"])
            first += header["images"]
            digest = hashlib.sha256(np.ascontiguousarray(images).reshape(-1).view(np.uint8).data).hexdigest()
            _same(output, f"images {first - header['images']} to {first - 1}", header["sha256"], digest)
        elif "file" in header:
            files += 1 + _verify_shard(output, header, read_lines(manifest))
        else:
            files += _verify_files(output, read_lines(manifest))
    for key, value in found.items():
        if totals[key] != value:
            raise InputError(f"{printable(output)}: must have {totals[key]} {key}, as done.json has, got {value}")
    if arrays is not None:
        if first != len(arrays):
            raise InputError(f"{printable(output)}: must hold {first} images, got {len(arrays)}")
        held = arrays.file_sha256()
        for name in sorted(carried):
            _same(output, f"file {name}", carried[name], held.get(name, "none"))
        labels = arrays.label_sha256()
        for name in sorted(labels.keys() | totals["labels"].keys()):
            what = name if name == FILES else f"array {name}"
            _same(output, what, totals["labels"].get(name, "none"), labels.get(name, "none"))
    else:
        there = sum(1 for _ in _files(output))
        if there != files:  # all that the manifests list was found
            raise InputError(f"{printable(output)}: must hold the {files} files of its manifests, got {there}")
    return found


def _verify_files(output: Path, lines: Iterator[dict[str, Any]]) -> int:
    count = 0
    for line in lines:
        if "error" not in line:
            _same(output / line["name"], "file", line["sha256"], hash_file(output / line["name"]))
            count += 1
    return count


def _verify_shard(output: Path, header: dict[str, Any], lines: Iterator[dict[str, Any]]) -> int:
    """Returns the number of files beside the shard that its manifest lists."""
    shard = output / header["file"]
    _same(shard, "file", header["sha256"], hash_file(shard))
    beside = []
    images = 0
    with tarfile.open(shard, "r:", errors="surrogateescape") as tar:
        for line in lines:
            if line.get("beside"):
                beside.append(line)
            elif "error" not in line:
                member = tar.next()
                name = None if member is None else member.name
                if member is None or name != line["name"]:
                    raise InputError(f"{printable(shard)}: next member must be {line['name']}, got {name}")
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                _same(shard, f"member {line['name']}", line["sha256"], hashlib.sha256(data).hexdigest())
                images += "from" in line
        if (extra := tar.next()) is not None:
            raise InputError(f"{printable(shard)}: must hold no other members, got {printable(extra.name)}")
    if images != header["images"]:
        raise InputError(f"{printable(shard)}: must hold {header['images']} images, got {images}")
    return _verify_files(output, iter(beside))


def _same(path: Path, what: str, expected: str, got: str) -> None:
    if expected != got:
        raise InputError(f"{printable(path)}: {printable(what)} must have SHA-256 {expected}, got {got}")


def _files(folder: Path) -> Iterator[str]:
    """Every file under ``folder``, our records apart."""
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.path != os.fspath(folder / STATE):
                        folders.append(entry.path)
                else:
                    yield entry.path
