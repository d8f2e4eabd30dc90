"""A folder or shards as one packed file."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from fastsimgan.data.formats.labels import Labels
from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.data.formats.packed_writer import WRITERS
from fastsimgan.data.formats.stored_image import Header, StoredImage
from fastsimgan.data.formats.webdataset import read_members
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.manifest import ManifestLine, Written, read_lines, sha256
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sinks.base import COPIED, Sink, UnitWriter, flush, name_in_tree
from fastsimgan.refinement.sinks.shards import OrderedTar
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.sources.unit_parts import Decoded, Part, Sample
from fastsimgan.storage.names import printable

PIXELS = b"pixels"  # instead of a member's type: it goes into the images, not into the tar


class PackedSink(Sink):
    """A folder or shards as one ``.npz`` or HDF5 file. All images must have the size and kind of the first good one.

    A unit leaves two pieces: its images' pixels, and a tar of its other files. At the end they become

    - ``images`` ``[N, H, W]`` or ``[N, H, W, 3]`` and ``name`` ``[N]``, in the source's order;
    - an array for each key that all images have in their JSON sidecars or in a table, see `Labels`;
    - ``files/NAME``: every file that is not refined, byte for byte.

    Args:
        run: whose output it is.
        source: what is refined.
        kind: "npz" or "hdf5".
    """

    def __init__(self, run: RunDirectory, source: Source, kind: str) -> None:
        self.run = run
        self.source = source
        self.kind = kind
        self.pieces = run.partial / "pieces"
        self._first: tuple[Header, Path] | None = None
        self._lock = threading.Lock()

    def open_unit(self, work_unit: int) -> UnitWriter:
        """What writes a unit, from its beginning."""
        return PackedWriter(self, work_unit, self.source.shard(work_unit))

    def check(self, header: Header, where: Path) -> None:
        """Raise InputError if an image is not of the run's size and kind, or has alpha, which would be lost."""
        if header.alpha:
            raise InputError(
                f"{printable(where)}: images must have no alpha for {self.kind}, where it has no place, got {header}; "
                "--to folder and --to shards keep it"
            )
        if header.format == "HDF5":
            raise InputError(
                f"{printable(where)}: a file of arrays must stay one, as it may hold labels beside the picture, for "
                f"which {self.kind} has no place; --to folder keeps them"
            )
        with self._lock:
            if self._first is None:
                self._first = self._find_first(len(header.shape))
        first, its_name = self._first
        if (header.shape, header.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{printable(where)}: images must be of one size and kind for {self.kind}, got {header}, "
                f"and {printable(its_name)} is {first}"
            )

    def _find_first(self, dimensions: int) -> tuple[Header, Path]:
        """Header and name of the first good image; the same for every worker, whatever unit it does."""
        for work_unit in range(self.source.work_units):
            for sample in self.source.samples(work_unit):
                if sample.image is not None:
                    with suppress(InputError):
                        data = sample.parts[sample.image].read()
                        header = self.source.decode(sample, data, None).header
                        if len(header.shape) == dimensions:
                            return header, sample.where
        raise AssertionError("an image of these dimensions was decoded")

    def finish(self) -> dict[str, str] | None:
        """Put the file together; returns the SHA-256 of its label arrays and files.

        Raises:
            InputError: at a damaged piece.
        """
        run, final = self.run, self.run.partial / self.run.output.name
        if not final.exists() and not (run.state / "done.json").exists():
            temporary = run.temporary()
            with run.writing():
                temporary.parent.mkdir(exist_ok=True)
                carried = self._assemble(temporary)
                flush(temporary)
            if open_arrays(temporary).file_sha256() != carried:
                raise InputError(f"{printable(run.output)}: files must be those of the input; the copy differs")
            run_paths.rename(temporary, final)
        shutil.rmtree(self.pieces, ignore_errors=True)
        return open_arrays(final if final.exists() else run.output).label_sha256()

    def _assemble(self, path: Path) -> dict[str, str]:
        """Write the file; returns name and SHA-256 of every file in it, as the manifests have them."""
        names: list[str] = []
        carried: dict[str, str] = {}
        images = Written()
        for header in self.run.headers():
            images = header.written if header.images else images
            for line in read_lines(self.run.manifest(header.work_unit)):
                if line.sha256 is not None:
                    if line.is_image:
                        names.append(line.name)
                    else:
                        carried[line.name] = line.sha256
        assert images.shape is not None and images.dtype is not None
        shape = (len(names), *images.shape)
        dtype = np.dtype(images.dtype)
        with WRITERS[self.kind](path, self.run.output) as new:
            new.images(shape, dtype, self._pixels(shape, dtype))
            new.array("name", np.array(names))
            labels = Labels(names, inside=self.source.in_shards)
            for work_unit in range(self.source.work_units):
                for info, data in read_members(self.piece(work_unit, "tar")):
                    labels.take(info.name, data)
                    new.file(info.name, data)
            for name, array in labels.arrays().items():
                new.array(name, array)
        return carried

    def piece(self, work_unit: int, kind: str) -> Path:
        """Where a unit's pixels ("raw") or other files ("tar") wait."""
        return self.pieces / f"{work_unit:08d}.{kind}"

    def _pixels(self, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
        row = int(np.prod(shape[1:]))
        for work_unit in range(self.source.work_units):
            with self.piece(work_unit, "raw").open("rb") as file:
                while (flat := np.fromfile(file, dtype, max(1, COPIED // row) * row)).size:
                    yield flat.reshape(-1, *shape[1:])


class PackedWriter(UnitWriter):
    """Writes one unit's two pieces, in the source's order.

    Args:
        sink: whose unit it is.
        work_unit: its number.
        shard: out of which the samples are; None where they have their own names.
    """

    def __init__(self, sink: PackedSink, work_unit: int, shard: Path | None) -> None:
        self.sink = sink
        self.run = sink.run
        self.work_unit = work_unit
        self.shard = shard
        self._tar = _TarAndPixels(sink.run)
        self._header: Header | None = None
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def put(self, decoded: Decoded) -> list[ManifestLine]:
        """Write a sample with its refined image, if it has one; returns its lines. Any thread, in any order."""
        members, lines = [], []
        for index, part in enumerate(decoded.sample.parts):
            if part.is_folder:
                continue
            info = tarfile.TarInfo(self._name(part))
            source_sha256 = None
            if index == decoded.sample.image:
                assert decoded.image is not None
                data = self._take(decoded.image)
                info.type = PIXELS
                source_sha256 = decoded.sha256
            else:
                data = part.read()
            info.size = len(data)
            members.append((info, data))
            lines.append(ManifestLine(info.name, sha256=sha256(data), source_sha256=source_sha256))
        self._tar.add(decoded.sample.position, members)
        return lines

    def _take(self, image: StoredImage) -> bytes:
        self._header = image.header
        return np.ascontiguousarray(image.pixels).tobytes()

    def leave_out(self, sample: Sample) -> list[str]:
        """Names of a bad sample's files, none of which the output will hold."""
        self._tar.add(sample.position, [])
        return [self._name(part) for part in sample.parts]

    def close(self) -> Written:
        """Give the pieces their names."""
        with self.run.writing():
            self._tar.close()
            for temporary, kind in ((self._tar.path, "tar"), (self._tar.pixels, "raw")):
                flush(temporary)
                run_paths.rename(temporary, self.sink.piece(self.work_unit, kind))
        digest = self._tar.digest.hexdigest()
        if self._header is None:
            return Written(sha256=digest)
        return Written(sha256=digest, shape=self._header.shape, dtype=self._header.dtype)

    def _name(self, part: Part) -> str:
        name = part.name if self.shard is None else name_in_tree(self.shard, part)
        if part.info is not None and not part.info.isdir():
            with self._lock:
                if name in self._names:
                    raise InputError(
                        f"{printable(self.shard or '')}: members must differ in name, got {printable(name)} twice"
                    )
                self._names.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{printable(self.sink.source.path)}: names must be UTF-8 for {self.sink.kind}, got {printable(name)}"
            ) from None
        return name


class _TarAndPixels(OrderedTar):
    """A tar, and beside it a file of all images' pixels."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self.digest = hashlib.sha256()
        self.pixels = run.temporary()
        with run.writing():
            self._raw = self.pixels.open("xb")

    def write(self, info: tarfile.TarInfo, data: bytes) -> None:
        """Write the next member, or the next image."""
        if info.type == PIXELS:
            self.digest.update(data)
            self._raw.write(data)
        else:
            super().write(info, data)

    def close(self) -> None:
        """End both."""
        super().close()
        self._raw.close()
