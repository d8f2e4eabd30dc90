"""What a run writes: each kind of output, block by block. A block's files have their names before it is committed."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastsimgan.blocks import Run, rename, writing
from fastsimgan.data.files import printable
from fastsimgan.data.listing import STATE
from fastsimgan.data.shards import sample_key
from fastsimgan.errors import InputError
from fastsimgan.inputs import ArraysInput, FolderInput, Part, RawUnit, ShardsInput

FLUSH = 1 << 20  # bytes copied at a time


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class FolderOutput:
    """A tree that mirrors the input: each file under its own name, sidecars byte for byte."""

    is_file = False

    def __init__(self, run: Run, source: FolderInput | ShardsInput, *, link: bool = False) -> None:
        self.run = run
        self.source = source
        self.link = link

    def open_block(self, block: int) -> FolderBlock:
        """A block to be filled by several threads."""
        return FolderBlock(self, self.source.shards[block] if isinstance(self.source, ShardsInput) else None)

    def finish(self) -> None:
        """Nothing is left to do, and there are no label arrays."""


class FolderBlock:
    """One block of a `FolderOutput`."""

    def __init__(self, output: FolderOutput, shard: Path | None) -> None:
        self.output = output
        self.shard = shard
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def put(self, unit: RawUnit, encoded: bytes | None) -> list[dict[str, Any]]:
        """Write a unit, its image as ``encoded``; returns its lines for the manifest. Any thread, any order."""
        lines = []
        for index, part in enumerate(unit.parts):
            if part.info is not None and part.info.isdir():
                continue
            name = self._name(part)
            target = self.output.run.partial / name
            if index == unit.image:
                assert encoded is not None
                with writing(self.output.run.output):
                    self.output.run.write_file(target, encoded)
                lines.append({"name": name, "sha256": sha256(encoded)})
            else:
                lines.append({"name": name, "sha256": carry(self.output.run, part, target, self.output.link)})
        return lines

    def leave_out(self, unit: RawUnit) -> list[str]:
        """Names of a bad unit's files, none of which the output will hold."""
        names = [self._name(part) for part in unit.parts]
        for name in names:  # an earlier try, killed before its commit, may have found it good
            (self.output.run.partial / name).unlink(missing_ok=True)
        return names

    def close(self) -> dict[str, Any]:
        """What else the manifest's first line is to say."""
        return {}

    def _name(self, part: Part) -> str:
        if part.path is not None:
            return part.name
        name = PurePosixPath(part.name)
        if name.is_absolute() or ".." in name.parts or STATE in name.parts[:1] or "\0" in part.name:
            raise InputError(
                f"{printable(self.shard or '')}: names must stay inside the output, got {printable(part.name)}"
            )
        assert self.shard is not None
        full = f"{self.shard.stem}/{name}"  # two shards may hold members of one name
        with self._lock:
            if full in self._names:
                raise InputError(
                    f"{printable(self.shard)}: members must differ in name, got {printable(str(name))} twice"
                )
            self._names.add(full)
        return full


def carry(run: Run, part: Part, target: Path, link: bool) -> str:
    """Copy or link a file that is not refined; returns its SHA-256."""
    if part.data is not None:
        with writing(run.output):
            run.write_file(target, part.data)
        return sha256(part.data)
    assert part.path is not None
    temporary = run.temporary()
    digest = hashlib.sha256()
    try:
        source = part.path.open("rb")
    except OSError as error:
        raise InputError(f"{printable(part.path)}: cannot be read: {error.strerror}") from error
    with source, writing(run.output):
        if link:
            os.link(os.path.realpath(part.path), temporary)
            while chunk := source.read(FLUSH):
                digest.update(chunk)
        else:
            with temporary.open("xb") as copy:
                while chunk := source.read(FLUSH):
                    digest.update(chunk)
                    copy.write(chunk)
        if link and target.exists() and os.path.samefile(target, temporary):
            temporary.unlink()  # rename does nothing between two links to one file
        else:
            rename(temporary, target)
    return digest.hexdigest()


class ShardsOutput:
    """One tar shard a block, members in the input's order. A folder's files that belong to no image lie beside."""

    is_file = False

    def __init__(self, run: Run, source: FolderInput | ShardsInput) -> None:
        self.run = run
        self.source = source

    def open_block(self, block: int) -> ShardBlock:
        """A block to be filled by several threads."""
        if isinstance(self.source, ShardsInput):
            return ShardBlock(self, self.source.shards[block].name)
        return ShardBlock(self, f"{block:08d}.tar")

    def finish(self) -> None:
        """Nothing is left to do, and there are no label arrays."""


class ShardBlock:
    """One shard. Units may come in any order; those that came too early wait in memory, encoded."""

    def __init__(self, output: ShardsOutput, name: str) -> None:
        self.output = output
        self.name = name
        self._temporary = output.run.temporary()
        with writing(output.run.output):
            self._tar = tarfile.open(self._temporary, "x:", format=tarfile.PAX_FORMAT, errors="surrogateescape")
        self._next = 0
        self._waiting: dict[int, list[tuple[tarfile.TarInfo, bytes]]] = {}
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    def put(self, unit: RawUnit, encoded: bytes | None) -> list[dict[str, Any]]:
        """Write a unit, its image as ``encoded``; returns its lines for the manifest. Any thread, any order."""
        members, lines = [], []
        if unit.image is None and unit.parts[0].path is not None:
            run, part = self.output.run, unit.parts[0]
            digest = carry(run, part, run.partial / part.name, link=False)
            self._add(unit.position, [])
            return [{"name": part.name, "beside": True, "sha256": digest}]
        if unit.image is not None and unit.parts[unit.image].path is not None:
            key = sample_key(unit.parts[unit.image].name)
            with self._lock:
                if key in self._keys:
                    raise InputError(
                        f"images must differ before the first dot of their names, as WebDataset has it, got two of "
                        f"{printable(key)}"
                    )
                self._keys.add(key)
        for index, part in enumerate(unit.parts):
            data = encoded if index == unit.image else part.read()
            assert data is not None
            members.append((_tar_info(part, len(data)), data))
            lines.append({"name": part.name, "sha256": sha256(data)})
        self._add(unit.position, members)
        return lines

    def leave_out(self, unit: RawUnit) -> list[str]:
        """Names of a bad unit's files, none of which the shard will hold."""
        self._add(unit.position, [])
        return [part.name for part in unit.parts]

    def close(self) -> dict[str, Any]:
        """Give the shard its name; returns what else the manifest's first line is to say."""
        assert not self._waiting
        with writing(self.output.run.output):
            self._tar.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            rename(self._temporary, self.output.run.partial / self.name)
        return {"file": self.name, "bytes": size, "sha256": digest}

    def _add(self, position: int, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        with self._lock:
            self._waiting[position] = members
            while self._next in self._waiting:
                for info, data in self._waiting.pop(self._next):
                    with writing(self.output.run.output):
                        self._tar.addfile(info, io.BytesIO(data) if info.isfile() else None)
                self._next += 1


def _tar_info(part: Part, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(part.name)
    if part.info is not None:
        old = part.info
        info.mode, info.uid, info.gid, info.mtime, info.type = old.mode, old.uid, old.gid, old.mtime, old.type
        info.uname, info.gname = old.uname, old.gname
    info.size = size
    return info


class ArraysOutput:
    """The input's file again, with refined images; other arrays are copied byte for byte at the end.

    Blocks are written into one file of raw pixels, each in its place: an ``.npy`` as it will be, the images of an
    ``.npz`` or HDF5 file without header.
    """

    is_file = True

    def __init__(self, run: Run, source: ArraysInput) -> None:
        self.run = run
        self.source = source
        arrays = source.arrays
        self.shape: tuple[int, ...] = arrays._shape
        self.row = int(np.prod(self.shape[1:])) * arrays.dtype.itemsize
        self.header = b""
        if source.kind == "npy":
            buffer = io.BytesIO()
            arrays._write_images(buffer, ())  # type: ignore[union-attr]
            self.header = buffer.getvalue()
        self.raw = run.partial / (run.output.name if source.kind == "npy" else "images.raw")

    def open_block(self, block: int) -> ArraysBlock:
        """A block, filled in order by one thread."""
        return ArraysBlock(self, block)

    def finish(self) -> dict[str, str]:
        """Put the file together; returns the label arrays' SHA-256, equal before and after.

        Raises InputError if an array to be copied is damaged.
        """
        arrays, run = self.source.arrays, self.run
        labels = arrays.label_sha256()
        with writing(run.output):
            if self.source.kind == "npy" or not self.raw.exists():
                return labels  # it is put together, and perhaps published, already
            temporary = run.temporary()
            temporary.parent.mkdir(exist_ok=True)
            arrays.write_again(temporary, self._pieces())
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if type(arrays)(temporary).label_sha256() != labels:
            raise InputError(f"{printable(run.output)}: label arrays must be those of the input; the copy differs")
        rename(temporary, run.partial / run.output.name)
        self.raw.unlink()
        return labels

    def read(self, block: int) -> np.ndarray:
        """A block's refined images, from the raw file."""
        first, end = self.source.range(block)
        with self.raw.open("rb") as file:
            file.seek(len(self.header) + first * self.row)
            flat = np.fromfile(file, self.source.arrays.stored_dtype, (end - first) * self.row // self._item)
        return flat.reshape(end - first, *self.shape[1:])

    @property
    def _item(self) -> int:
        return self.source.arrays.dtype.itemsize

    def _pieces(self) -> Iterator[np.ndarray]:
        for block in range(self.source.blocks):
            yield self.read(block)


class ArraysBlock:
    """One block of an `ArraysOutput`."""

    def __init__(self, output: ArraysOutput, block: int) -> None:
        self.output = output
        first, _ = output.source.range(block)
        self._position = len(output.header) + first * output.row
        self._digest = hashlib.sha256()
        with writing(output.run.output):
            # neither appended to nor cut: other workers write their own blocks
            self._file = os.fdopen(os.open(output.raw, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb", 0)
            if first == 0:
                os.pwrite(self._file.fileno(), output.header, 0)

    def put(self, images: np.ndarray) -> None:
        """Write the next images ``[n, H, W(, C)]`` of the block."""
        stored = np.ascontiguousarray(images.astype(self.output.source.arrays.stored_dtype, copy=False))
        data = stored.reshape(-1).view(np.uint8).data
        self._digest.update(data)
        with writing(self.output.run.output):
            while data:
                written = os.pwrite(self._file.fileno(), data, self._position)
                self._position += written
                data = data[written:]

    def close(self) -> dict[str, Any]:
        """Flush to the disk; returns what else the manifest's first line is to say."""
        with writing(self.output.run.output):
            os.fsync(self._file.fileno())
            self._file.close()
        return {"sha256": self._digest.hexdigest()}


Output = FolderOutput | ShardsOutput | ArraysOutput
