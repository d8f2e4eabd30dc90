"""WebDataset shards: one a work unit."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from pathlib import PurePosixPath

from fastsimgan.data.formats.image_file import encode_image
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, FORMATS
from fastsimgan.data.formats.webdataset import sample_key
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.manifest import ManifestLine, Written, sha256
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sinks.base import Sink, UnitWriter, carry
from fastsimgan.refinement.sinks.folder import FolderWriter
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.unit_parts import Decoded, Part, Sample
from fastsimgan.storage.names import printable


class ShardsSink(Sink):
    """One tar shard a unit, members in the source's order. A folder's files that belong to no image lie beside, and so
    do those that lay beside the source's shards.
    """

    def __init__(self, run: RunDirectory, source: Source) -> None:
        self.run = run
        self.source = source

    def open_unit(self, work_unit: int) -> UnitWriter:
        """What writes a unit, from its beginning."""
        name = self.source.shard_name(work_unit)
        return FolderWriter(self.run, None, link=False) if name is None else ShardWriter(self.run, name)


class OrderedTar:
    """A tar whose samples may come from any thread in any order; those that come too early wait, encoded, in memory."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.path = run.temporary()
        with run.writing():
            self._tar = tarfile.open(self.path, "x:", format=tarfile.PAX_FORMAT, errors="surrogateescape")
        self._next = 0
        self._waiting: dict[int, list[tuple[tarfile.TarInfo, bytes]]] = {}
        self._lock = threading.Lock()

    def add(self, position: int, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        """Add the members of sample ``position``; each position must come once."""
        with self._lock:
            self._waiting[position] = members
            while self._next in self._waiting:
                for info, data in self._waiting.pop(self._next):
                    with self.run.writing():
                        self.write(info, data)
                self._next += 1

    def write(self, info: tarfile.TarInfo, data: bytes) -> None:
        """Write the next member."""
        self._tar.addfile(info, io.BytesIO(data) if info.isfile() else None)

    def close(self) -> None:
        """End the tar, which holds all by now."""
        assert not self._waiting
        self._tar.close()


class ShardWriter(UnitWriter):
    """Writes one shard.

    Args:
        run: whose output it is.
        name: the shard's.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        self.run = run
        self.name = name
        self._tar = OrderedTar(run)
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    def put(self, decoded: Decoded) -> list[ManifestLine]:
        """Write a sample with its refined image, if it has one; returns its lines. Any thread, in any order."""
        sample = decoded.sample
        encoded = None if decoded.image is None else encode_image(decoded.image)
        if sample.image is None and sample.parts[0].path is not None:
            return [self._put_beside(sample)]
        if sample.image is not None and sample.parts[sample.image].info is None:
            self._check_name(sample, sample.parts[sample.image].name)
        members, lines = [], []
        for index, part in enumerate(sample.parts):
            is_image = index == sample.image
            data = encoded if is_image else part.read()
            assert data is not None
            members.append((_tar_info(part, len(data)), data))
            source_sha256 = decoded.sha256 if is_image else None
            lines.append(ManifestLine(part.name, sha256=sha256(data), source_sha256=source_sha256))
        self._tar.add(sample.position, members)
        return lines

    def leave_out(self, sample: Sample) -> list[str]:
        """Names of a bad sample's files, none of which the shard will hold."""
        self._tar.add(sample.position, [])
        return [part.name for part in sample.parts]

    def close(self) -> Written:
        """Give the shard its name."""
        with self.run.writing():
            self._tar.close()
            with self._tar.path.open("rb") as file:
                os.fsync(file.fileno())
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            run_paths.rename(self._tar.path, self.run.partial / self.name)
        return Written(file=self.name, bytes=size, sha256=digest)

    def _put_beside(self, sample: Sample) -> ManifestLine:
        """A file that belongs to no image lies beside the shard."""
        part = sample.parts[0]
        if part.name.endswith(".tar"):
            raise InputError(f"{printable(part.path or '')}: beside new shards must be no other .tar")
        digest = carry(self.run, part, self.run.partial / part.name, link=False)
        self._tar.add(sample.position, [])
        return ManifestLine(part.name, beside=True, sha256=digest)

    def _check_name(self, sample: Sample, name: str) -> None:
        """Raise InputError if an image cannot be called ``name`` in this shard."""
        if PurePosixPath(name).suffix.lower() in ARRAY_FORMATS:
            raise InputError(
                f"{printable(sample.where)}: images must be {' '.join(FORMATS)} for shards; --to folder keeps others"
            )
        key = sample_key(name)
        with self._lock:
            if key in self._keys:
                raise InputError(
                    f"images must differ before the first dot of their names, as WebDataset has it, got two of "
                    f"{printable(key)}"
                )
            self._keys.add(key)


def _tar_info(part: Part, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(part.name)
    if part.info is not None:
        old = part.info
        info.mode, info.uid, info.gid, info.mtime, info.type = old.mode, old.uid, old.gid, old.mtime, old.type
        info.uname, info.gname = old.uname, old.gname
    info.size = size
    return info
