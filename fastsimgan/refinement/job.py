"""What is to be refined, by what, into what; and whether that can be, before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsimgan.errors import InputError
from fastsimgan.refinement import tuning
from fastsimgan.refinement.run_paths import partial_of
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.open_source import open_source
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable

SUFFIXES = {"npz": (".npz",), "npy": (".npy",), "hdf5": (".h5", ".hdf5")}  # of outputs that are one file
_MAKES = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".tar": "shards"}  # what --to would make, by a name's suffix


@dataclass(frozen=True)
class Job:
    """What is to be refined, by what, into what."""

    refiner: Path
    input: Path
    output: Path
    batch_size: int | None = None  # None: as the run began, or what `tuning.choose` takes
    pixels: int | None = None  # in a batch; None likewise
    compiled: bool | None = None  # None likewise
    residual_block: str | None = None  # implementation of the op on CUDA; None likewise
    device: str = "auto"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    on_error: Literal["fail", "skip"] = "fail"
    images: str | None = None
    to: Literal["same", "folder", "shards", "npz", "hdf5"] = "same"
    link: bool = False
    trust_engine: bool = False
    key: str | None = None
    follow_links: bool = False


def output_kind(job: Job, source: Source) -> str:
    """What a job makes: "folder", "shards", "npz", "npy" or "hdf5"."""
    return source.kind if job.to == "same" else job.to


def refiner_sha256(path: Path) -> str:
    """SHA-256 of a refiner's file.

    Raises:
        InputError: if it is not there.
    """
    file = path / "refiner.safetensors" if path.is_dir() else path
    return hash_file(file, "the refiner cannot be read")


def check(job: Job) -> Source:
    """Open the input and look at the output. Writes nothing.

    Returns:
        The source as which the input is read.

    Raises:
        InputError: if the input cannot be refined or the output is no place for it.
    """
    batch_size = tuning.BATCH_SIZE if job.batch_size is None else job.batch_size
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    source = open_source(
        job.input,
        batch_size=batch_size,
        images=job.images,
        key=job.key,
        links="all" if job.follow_links else "files",
    )
    if job.link and not (source.linkable and job.to in ("same", "folder")):
        raise InputError("link must be off where labels are not files of a folder both before and after, got --link")
    to = output_kind(job, source)
    _check_place(job)
    _check_suffix(job, to)
    source = source.towards(to)
    if job.compiled and source.array_file is None:
        unpacked = " to files" if source.kind in SUFFIXES else ""
        raise InputError(
            "compile must be off where images are files, which may have any size and which codecs wait for, got "
            f"{printable(job.input)}{unpacked}"
        )
    return source


def _check_place(job: Job) -> None:
    """Raise InputError if input and output lie in each other's way."""
    old, new = Path(os.path.realpath(job.input)), Path(os.path.realpath(job.output))
    if old == new:
        raise InputError(f"{printable(job.output)}: output must not be the input")
    if new.is_relative_to(old):
        raise InputError(f"{printable(job.output)}: output must not be inside the input {printable(job.input)}")
    if old.is_relative_to(new) or old.is_relative_to(partial_of(new)):
        raise InputError(f"{printable(job.output)}: output must not contain the input {printable(job.input)}")


def _check_suffix(job: Job, to: str) -> None:
    """Raise InputError if the output is not called as what it will be."""
    suffix = job.output.suffix.lower()
    if to in SUFFIXES:
        if suffix not in SUFFIXES[to]:
            why = "as the input is one" if job.to == "same" else f"by --to {to}"
            raise InputError(
                f"{printable(job.output)}: output must end in {' or '.join(SUFFIXES[to])}, {why}, got {suffix!r}"
            )
    elif suffix in (".npz", ".npy", ".h5", ".hdf5", ".tar"):
        makes = _MAKES.get(suffix)
        hint = f" (--to {makes} makes {'a folder of them' if makes == 'shards' else 'one'})" if makes else ""
        raise InputError(f"{printable(job.output)}: output must be a folder, got the suffix {suffix}{hint}")
