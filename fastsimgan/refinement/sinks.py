"""What a run writes: each kind of output, block by block. A block's files have their names before it is committed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_file import ARRAY_FORMATS, FORMATS, Header, StoredImage, decode_image, encode_image
from fastsimgan.data.formats.labels import Labels
from fastsimgan.data.formats.listing import STATE
from fastsimgan.data.formats.numpy_file import IMAGES, ArrayImages
from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.data.formats.packed_writer import WRITERS
from fastsimgan.data.formats.webdataset import read_members, sample_key, shard_stem
from fastsimgan.errors import InputError
from fastsimgan.refinement.run_directory import Run, read_lines, rename, writing
from fastsimgan.refinement.sources import ArraysInput, FolderInput, Part, RawUnit, ShardsInput
from fastsimgan.refinement.unpacked import UnpackedInput
from fastsimgan.storage.names import printable

FLUSH = 1 << 20  # bytes (or values) copied at a time
PIXELS = b"pixels"  # instead of a member's type: it goes into the images, not into the tar


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class FolderOutput:
    """A tree that mirrors the input: each file under its own name, sidecars byte for byte."""

    def __init__(self, run: Run, source: FolderInput | ShardsInput | UnpackedInput, *, link: bool = False) -> None:
        self.run = run
        self.source = source
        self.link = link

    def open_block(self, block: int) -> FolderBlock:
        """A block to be filled by several threads."""
        return FolderBlock(self.run, self.source.shard(block), self.link)

    def finish(self) -> None:
        """Nothing is left to do, and there are no label arrays."""


class FolderBlock:
    """One block of a `FolderOutput`, or the files beside the shards of a `ShardsOutput`."""

    def __init__(self, run: Run, shard: Path | None, link: bool) -> None:
        self.run = run
        self.shard = shard
        self.link = link
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def put(self, unit: RawUnit, image: StoredImage | None) -> list[dict[str, Any]]:
        """Write a unit with its refined image; returns its lines for the manifest. Any thread, any order."""
        encoded = None if image is None else encode_image(image)
        lines = []
        for index, part in enumerate(unit.parts):
            if part.info is not None and part.info.isdir():
                continue
            name = self._name(part)
            target = self.run.partial / name
            if index == unit.image:
                assert encoded is not None
                with writing(self.run.output):
                    self.run.write_file(target, encoded)
                lines.append({"name": name, "sha256": sha256(encoded)})
            else:
                lines.append({"name": name, "sha256": carry(self.run, part, target, self.link)})
        return lines

    def leave_out(self, unit: RawUnit) -> list[str]:
        """Names of a bad unit's files, none of which the output will hold."""
        names = [self._name(part) for part in unit.parts]
        for name in names:  # an earlier try, killed before its commit, may have found it good
            (self.run.partial / name).unlink(missing_ok=True)
        return names

    def close(self) -> dict[str, Any]:
        """What else the manifest's first line is to say."""
        return {}

    def _name(self, part: Part) -> str:
        if self.shard is None:
            return part.name
        full = name_in_tree(self.shard, part)
        with self._lock:
            if full in self._names:
                raise InputError(
                    f"{printable(self.shard)}: members must differ in name, got "
                    f"{printable(full.removeprefix(f'{shard_stem(self.shard)}/'))} twice"
                )
            self._names.add(full)
        return full


def name_in_tree(shard: Path, part: Part) -> str:
    """What a member of a shard is called outside it. Raises InputError if that would lead out of the output."""
    name = PurePosixPath(part.name)
    if name.is_absolute() or ".." in name.parts or STATE in name.parts[:1] or "\0" in part.name:
        raise InputError(f"{printable(shard)}: names must stay inside the output, got {printable(part.name)}")
    return f"{shard_stem(shard)}/{name}"  # two shards may hold members of one name


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
    """One tar shard a block, members in the input's order. A folder's files that belong to no image lie beside, and so
    do those that lay beside the input's shards.
    """

    def __init__(self, run: Run, source: FolderInput | ShardsInput | UnpackedInput) -> None:
        self.run = run
        self.source = source

    def open_block(self, block: int) -> ShardBlock | FolderBlock:
        """A block to be filled by several threads."""
        name = self.source.shard_name(block)
        return FolderBlock(self.run, None, link=False) if name is None else ShardBlock(self, name)

    def finish(self) -> None:
        """Nothing is left to do, and there are no label arrays."""


class ShardBlock:
    """One shard. Units may come in any order; those that came too early wait in memory, encoded."""

    def __init__(self, output: ShardsOutput | PackedOutput, name: str) -> None:
        self.output = output
        self.name = name
        self._temporary = output.run.temporary()
        with writing(output.run.output):
            self._tar = tarfile.open(self._temporary, "x:", format=tarfile.PAX_FORMAT, errors="surrogateescape")
        self._next = 0
        self._waiting: dict[int, list[tuple[tarfile.TarInfo, bytes]]] = {}
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    def put(self, unit: RawUnit, image: StoredImage | None) -> list[dict[str, Any]]:
        """Write a unit with its refined image; returns its lines for the manifest. Any thread, any order."""
        encoded = None if image is None else encode_image(image)
        members, lines = [], []
        if unit.image is None and unit.parts[0].path is not None:
            run, part = self.output.run, unit.parts[0]
            if part.name.endswith(".tar"):
                raise InputError(f"{printable(part.path or '')}: beside new shards must be no other .tar")
            digest = carry(run, part, run.partial / part.name, link=False)
            self._add(unit.position, [])
            return [{"name": part.name, "beside": True, "sha256": digest}]
        if unit.image is not None and unit.parts[unit.image].info is None:
            if PurePosixPath(unit.parts[unit.image].name).suffix.lower() in ARRAY_FORMATS:
                raise InputError(
                    f"{printable(unit.where)}: images must be {' '.join(FORMATS)} for shards; --to folder keeps others"
                )
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
                        self._write(info, data)
                self._next += 1

    def _write(self, info: tarfile.TarInfo, data: bytes) -> None:
        self._tar.addfile(info, io.BytesIO(data) if info.isfile() else None)


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

    Or, where ``kind`` ("npz", "hdf5") is not the input's, a new file with the same arrays. Blocks are written into one
    file of raw pixels, each in its place: an ``.npy`` as it will be, the images of an ``.npz`` or HDF5 file without
    header.
    """

    def __init__(self, run: Run, source: ArraysInput, kind: str) -> None:
        self.run = run
        self.source = source
        self.kind = kind
        arrays = source.arrays
        self.shape: tuple[int, ...] = arrays._shape
        self.row = int(np.prod(self.shape[1:])) * arrays.stored_dtype.itemsize
        self.header = b""
        if kind == "npy":
            buffer = io.BytesIO()
            arrays._write_images(buffer, ())  # type: ignore[union-attr]
            self.header = buffer.getvalue()
        self.raw = run.partial / (run.output.name if kind == "npy" else "images.raw")

    def open_block(self, block: int) -> ArraysBlock:
        """A block, filled by one thread, in any order."""
        return ArraysBlock(self, block)

    def finish(self) -> dict[str, str]:
        """Put the file together; returns the label arrays' SHA-256, equal before and after.

        Raises InputError if an array to be copied is damaged.
        """
        arrays, run = self.source.arrays, self.run
        if self.kind == "npy":
            return {}
        final = run.partial / run.output.name
        with writing(run.output):
            if not self.raw.exists():  # it is put together, and perhaps published, already
                return open_arrays(final if final.exists() else run.output, self._key).label_sha256()
            temporary = run.temporary()
            temporary.parent.mkdir(exist_ok=True)
            if self.kind == self.source.kind:
                arrays.write_again(temporary, self._pieces())
            else:
                self._convert(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        written = open_arrays(temporary, self._key)
        labels = written.label_sha256()
        same = labels == arrays.label_sha256() if self.kind == self.source.kind else _same_labels(written, arrays)
        if not same:
            raise InputError(f"{printable(run.output)}: label arrays must be those of the input; the copy differs")
        rename(temporary, final)
        self.raw.unlink()
        return labels

    def _convert(self, path: Path) -> None:
        arrays = self.source.arrays
        if IMAGES in (*arrays.label_names, *arrays.other_names):
            raise InputError(
                f"{printable(arrays.path)}: --key {printable(arrays.key)} must stay in a file of the same kind, as "
                "another array is called images"
            )
        with WRITERS[self.kind](path, self.run.output) as new:
            new.images(self.shape, arrays.stored_dtype, self._pieces())
            for name, array in (arrays.labels() | arrays.others()).items():
                new.array(name, array)
            for name, data in arrays.files():
                new.file(name, data)

    def read(self, block: int) -> np.ndarray:
        """A block's refined images, from the raw file."""
        first, end = self.source.range(block)
        with self.raw.open("rb") as file:
            file.seek(len(self.header) + first * self.row)
            flat = np.fromfile(file, self.source.arrays.stored_dtype, (end - first) * self.row // self._item)
        return flat.reshape(end - first, *self.shape[1:])

    @property
    def _key(self) -> str | None:
        """What the array of images is called in the output."""
        return self.source.arrays.key if self.kind == self.source.kind else None

    @property
    def _item(self) -> int:
        return self.source.arrays.stored_dtype.itemsize

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
        self._next = 0
        self._waiting: dict[int, np.ndarray] = {}
        with writing(output.run.output):
            # neither appended to nor cut: other workers write their own blocks
            self._file = os.fdopen(os.open(output.raw, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb", 0)
            if first == 0:
                os.pwrite(self._file.fileno(), output.header, 0)

    def put(self, number: int, images: np.ndarray) -> None:
        """Write batch ``number`` of the block, ``[n, H, W(, C)]``; one that comes too early waits."""
        self._waiting[number] = images
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def _write(self, images: np.ndarray) -> None:
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
        assert not self._waiting
        with writing(self.output.run.output):
            os.fsync(self._file.fileno())
            self._file.close()
        return {"sha256": self._digest.hexdigest()}


class PackedOutput:
    """A folder or shards as one ``.npz`` or HDF5 file. All images must have the size and kind of the first good one.

    A block leaves two pieces: its images' pixels, and a tar of its other files. At the end they become

    - ``images`` ``[N, H, W]`` or ``[N, H, W, 3]`` and ``name`` ``[N]``, in the input's order;
    - an array for each key that all images have in their JSON sidecars or in a table, see `Labels`;
    - ``files/NAME``: every file that is not refined, byte for byte.
    """

    def __init__(self, run: Run, source: FolderInput | ShardsInput, kind: str) -> None:
        self.run = run
        self.source = source
        self.kind = kind
        self.pieces = run.partial / "pieces"
        self._first: tuple[Header, Path] | None = None
        self._lock = threading.Lock()

    def open_block(self, block: int) -> PackedBlock:
        """A block to be filled by several threads."""
        return PackedBlock(self, block, self.source.shard(block))

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
        """Header and name of the first good image; the same for every worker, whatever block it does."""
        for block in range(self.source.blocks):
            for unit in self.source.units(block):
                if unit.image is not None:
                    with suppress(InputError):
                        data = unit.parts[unit.image].read()
                        header = decode_image(data, unit.where, key=getattr(self.source, "key", None), span=None).header
                        if len(header.shape) == dimensions:
                            return header, unit.where
        raise AssertionError("an image of these dimensions was decoded")

    def finish(self) -> dict[str, str]:
        """Put the file together; returns the SHA-256 of its label arrays and files.

        Raises InputError at a damaged piece.
        """
        run, final = self.run, self.run.partial / self.run.output.name
        if not final.exists() and not (run.state / "done.json").exists():
            temporary = run.temporary()
            with writing(run.output):
                temporary.parent.mkdir(exist_ok=True)
                carried = self._assemble(temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            if open_arrays(temporary).file_sha256() != carried:
                raise InputError(f"{printable(run.output)}: files must be those of the input; the copy differs")
            rename(temporary, final)
        shutil.rmtree(self.pieces, ignore_errors=True)
        return open_arrays(final if final.exists() else run.output).label_sha256()

    def _assemble(self, path: Path) -> dict[str, str]:
        """Write the file; returns name and SHA-256 of every file in it, as the manifests have them."""
        names: list[str] = []
        carried: dict[str, str] = {}
        header: dict[str, Any] = {}
        for found in self.run.headers():
            header = found if found["images"] else header
            for line in read_lines(self.run.manifest(found["block"])):
                if "error" not in line:
                    if "from" in line:
                        names.append(line["name"])
                    else:
                        carried[line["name"]] = line["sha256"]
        shape = (len(names), *header["shape"])
        dtype = np.dtype(header["dtype"])
        with WRITERS[self.kind](path, self.run.output) as new:
            new.images(shape, dtype, self._pixels(shape, dtype))
            new.array("name", np.array(names))
            labels = Labels(names, inside=isinstance(self.source, ShardsInput))
            for block in range(self.source.blocks):
                for info, data in read_members(self.piece(block, "tar")):
                    labels.take(info.name, data)
                    new.file(info.name, data)
            for name, array in labels.arrays().items():
                new.array(name, array)
        return carried

    def piece(self, block: int, kind: str) -> Path:
        """Where a block's pixels ("raw") or other files ("tar") wait."""
        return self.pieces / f"{block:08d}.{kind}"

    def _pixels(self, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
        row = int(np.prod(shape[1:]))
        for block in range(self.source.blocks):
            with self.piece(block, "raw").open("rb") as file:
                while (flat := np.fromfile(file, dtype, max(1, FLUSH // row) * row)).size:
                    yield flat.reshape(-1, *shape[1:])


class PackedBlock(ShardBlock):
    """One block's two pieces, in the input's order."""

    output: PackedOutput

    def __init__(self, output: PackedOutput, block: int, shard: Path | None) -> None:
        super().__init__(output, "")
        self.block = block
        self.shard = shard
        self._header: Header | None = None
        self._digest = hashlib.sha256()
        self._pixels = output.run.temporary()
        with writing(output.run.output):
            self._raw = self._pixels.open("xb")

    def put(self, unit: RawUnit, image: StoredImage | None) -> list[dict[str, Any]]:
        """Write a unit with its refined image; returns its lines for the manifest. Any thread, any order."""
        members, lines = [], []
        for index, part in enumerate(unit.parts):
            if part.info is not None and part.info.isdir():
                continue
            info = tarfile.TarInfo(self._name(part))
            if index == unit.image:
                assert image is not None
                self._header = image.header
                info.type = PIXELS
                data = np.ascontiguousarray(image.pixels).tobytes()
            else:
                data = part.read()
            info.size = len(data)
            members.append((info, data))
            lines.append({"name": info.name, "sha256": sha256(data)})
        self._add(unit.position, members)
        return lines

    def leave_out(self, unit: RawUnit) -> list[str]:
        """Names of a bad unit's files, none of which the output will hold."""
        self._add(unit.position, [])
        return [self._name(part) for part in unit.parts]

    def close(self) -> dict[str, Any]:
        """Give the pieces their names; returns what else the manifest's first line is to say."""
        assert not self._waiting
        with writing(self.output.run.output):
            self._tar.close()
            for temporary, kind in ((self._temporary, "tar"), (self._pixels, "raw")):
                self._raw.flush()
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                rename(temporary, self.output.piece(self.block, kind))
            self._raw.close()
        of = {} if self._header is None else {"shape": self._header.shape, "dtype": self._header.dtype}
        return {"sha256": self._digest.hexdigest()} | of

    def _write(self, info: tarfile.TarInfo, data: bytes) -> None:
        if info.type == PIXELS:
            self._digest.update(data)
            self._raw.write(data)
        else:
            super()._write(info, data)

    def _name(self, part: Part) -> str:
        name = part.name if self.shard is None else name_in_tree(self.shard, part)
        if part.info is not None and not part.info.isdir():
            with self._lock:
                if name in self._keys:
                    raise InputError(
                        f"{printable(self.shard or '')}: members must differ in name, got {printable(name)} twice"
                    )
                self._keys.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{printable(self.output.source.path)}: names must be UTF-8 for {self.output.kind}, "
                f"got {printable(name)}"
            ) from None
        return name


def _same_labels(one: ArrayImages | HDF5Images, other: ArrayImages | HDF5Images) -> bool:
    """Whether two files of different kinds hold the same labels and files; text may be encoded in two ways."""

    def values(arrays: ArrayImages | HDF5Images) -> dict[str, Any]:
        return {
            name: array.tolist() if array.dtype.kind in "US" else (array.dtype, array.shape, array.tobytes())
            for name, array in (arrays.labels() | arrays.others()).items()
        }

    return values(one) == values(other) and one.file_sha256() == other.file_sha256()


Output = FolderOutput | ShardsOutput | ArraysOutput | PackedOutput
