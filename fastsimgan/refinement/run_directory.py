"""A run of refinement on the disk: fixed blocks, claims, manifests, and one commit of the whole.

While it is made, an output ``OUT`` is the folder ``OUT.partial``. Its records are in ``OUT.partial/.fastsimgan``:

- ``run.json``: what makes two runs the same one (input, refiner, settings), and versions. Written before any work.
- ``claims/00000007``: locked (flock) by the worker at block 7. The system frees the lock when the worker dies.
- ``blocks/00000007.jsonl``: block 7's manifest, renamed into place when all of its files are: the block's commit.
  Its first line counts, the others list each file with its SHA-256 before and after, or the reason why it failed.
- ``tmp/``: files on the way to their names. ``done.json``: totals, written last, before the output gets its name.

Blocks are fixed at the start and so are the batches inside a block, so that whoever does a block, and however often,
writes the same bytes under the same names. Claims only save work; correctness does not lean on them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from fastsimgan.data.formats.listing import STATE
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.storage.names import printable

FORMAT = "fastsimgan.run/1"


class Claim:
    """The right to do one block, until `release` or the process's end."""

    def __init__(self, block: int, descriptor: int) -> None:
        self.block = block
        self._descriptor: int | None = descriptor

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the block back; harmless a second time."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Run:
    """One output in the making, or made. Open it with `open_run`; any number of processes may have it open."""

    def __init__(self, output: Path, identity: dict[str, Any], blocks: int, *, is_file: bool, complete: bool) -> None:
        self.output = output
        self.identity = identity
        self.blocks = blocks
        self.is_file = is_file
        self.complete = complete
        self.partial = partial_of(output)
        self.state = state_of(output, is_file) if complete else self.partial / STATE
        self._prefix = uuid.uuid4().hex
        self._names = count()

    def committed(self) -> set[int]:
        """The blocks that are done. One listing, no manifest is read."""
        with self._writing():
            return {int(name[:8]) for name in os.listdir(self.state / "blocks")}

    def is_committed(self, block: int) -> bool:
        """Whether a block is done."""
        return self.manifest(block).exists()

    def manifest(self, block: int) -> Path:
        """Where a block's manifest is, or will be."""
        return self.state / "blocks" / f"{block:08d}.jsonl"

    def claim(self, block: int) -> Claim | None:
        """Claim a block; None if it is done, another worker is at it, or all was published meanwhile.

        Raises UnavailableError on a file system without locks.
        """
        path = self.state / "claims" / f"{block:08d}"
        with self._writing():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise UnavailableError(
                f"{printable(self.output)}: the file system must offer locks (flock), got {error.strerror}"
            ) from error
        claim = Claim(block, descriptor)
        # The claim's file goes when the run is published: what it says of manifests then is no longer true.
        if self.is_committed(block) or not path.exists():
            claim.release()
            return None
        return claim

    def temporary(self) -> Path:
        """A new name under ``tmp/``, that of no other thread, process or machine."""
        return self.state / "tmp" / f"{self._prefix}.{next(self._names)}"

    def commit(self, block: int, header: dict[str, Any], lines: Iterable[str]) -> None:
        """Write a block's manifest. All of its files must have their names by now."""
        body = "".join(line + "\n" for line in lines).encode("ascii")
        first = {"block": block, **header, "lines_sha256": hashlib.sha256(body).hexdigest()}
        with self._writing():
            self.write_file(self.manifest(block), json.dumps(first).encode("ascii") + b"\n" + body, flush=True)

    def write_file(self, path: Path, data: bytes, *, flush: bool = False) -> None:
        """Write ``path`` at once or not at all; what is there is replaced, by the same bytes in an honest run."""
        temporary = self.temporary()
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            if flush:
                os.fsync(file)
        finally:
            os.close(file)
        rename(temporary, path)

    def headers(self) -> Iterator[dict[str, Any]]:
        """The first line of every manifest, in the order of the blocks. Raises InputError if one is damaged."""
        for block in sorted(self.committed()):
            yield read_header(self.manifest(block))

    def totals(self) -> dict[str, Any]:
        """Sums over the committed blocks: ``images``, ``failed``, ``others``, ``change`` (a sum of means)."""
        totals: dict[str, Any] = {"blocks": 0, "images": 0, "failed": 0, "others": 0, "change": 0.0}
        for header in self.headers():
            totals["blocks"] += 1
            for key in ("images", "failed", "others", "change"):
                totals[key] += header[key]
        return totals

    def failures(self) -> Iterator[tuple[str, str]]:
        """Name and reason of each image left out, in order. Reads only the manifests that have some."""
        for header in self.headers():
            if header["failed"]:
                for entry in read_lines(self.manifest(header["block"])):
                    if "error" in entry:
                        yield entry["name"], entry["error"]

    @contextmanager
    def locked(self) -> Iterator[Callable[[], bool]]:
        """Hold the run's own lock, for what one process alone may do; yields `_locked`'s function."""
        with _locked(self.state) as is_still_there:
            yield is_still_there

    def published(self) -> bool:
        """Whether the output has its name by now; one that is just being published is waited for, 10 s at most."""
        deadline = time.monotonic() + 10
        while (self.state / "done.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return is_published(self.output, self.is_file)

    def publish(self, totals: dict[str, Any]) -> None:
        """Give the output its name. Call it with the lock held and all blocks committed; can be repeated after a kill.

        A folder appears by one rename. A file appears by one rename, and its records beside it as
        ``OUT.fastsimgan`` by another.
        """
        with self._writing():
            self.write_file(self.state / "done.json", (json.dumps(totals) + "\n").encode("ascii"), flush=True)
            for inner in ("claims", "tmp"):
                shutil.rmtree(self.state / inner, ignore_errors=True)
            final = state_of(self.output, self.is_file)
            if self.is_file:
                if (self.partial / self.output.name).exists():
                    if os.path.lexists(self.output):
                        raise InputError(f"{printable(self.output)}: output must not exist yet; it appeared meanwhile")
                    rename(self.partial / self.output.name, self.output)
                if final.exists():  # records of an output that its owner has removed
                    shutil.rmtree(final)
                rename(self.state, final)
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                rename(self.partial, self.output)
        self.complete = True
        self.state = final

    def discard_if_empty(self) -> None:
        """Remove what a run that failed in its first block left, unless another worker is at it."""
        with suppress(OSError, InputError):
            if self.complete or self.committed():
                return
            for name in os.listdir(self.state / "claims"):
                claim = self.claim(int(name))
                if claim is None:
                    return
                claim.release()
            shutil.rmtree(self.partial)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing(self.output):
            yield


def partial_of(output: Path) -> Path:
    """Where an output is while it is made."""
    return output.with_name(output.name + ".partial")


def state_of(output: Path, is_file: bool) -> Path:
    """Where the records of a finished output are."""
    return output.with_name(output.name + STATE) if is_file else output / STATE


def rename(old: Path, new: Path) -> None:
    """``os.rename``, after making the folders that ``new`` needs."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        new.parent.mkdir(parents=True, exist_ok=True)
        os.rename(old, new)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn what the system raises on writing (disk full, permission) into an InputError that names the output."""
    try:
        yield
    except OSError as error:
        where = f" ({printable(error.filename)})" if isinstance(error.filename, str) else ""
        hint = "; what is committed stays: start again to go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = error.strerror or printable(str(error))
        raise InputError(f"{printable(output)}: cannot be written: {reason}{where}{hint}") from error


def open_run(output: Path, settings: dict[str, Any], source: Any, *, is_file: bool) -> Run:
    """Start a run, or go on with it, or find it complete.

    Args:
        output: where the result will be.
        settings: JSON-able; with the source's identity, what makes two runs the same one.
        source: offers ``prepare(state)`` (called once, in a new run), ``attach(state)`` (in all others), ``identity``
            and ``blocks``, known after either.
        is_file: the output is a file, not a folder.

    Raises InputError, before anything is written, if there is another thing or another run at ``output`` or
    ``output.partial``.
    """
    for _ in range(3):
        finished = is_published(output, is_file)
        with suppress(_Outrun):
            try:
                return _open_run(output, settings, source, is_file)
            except InputError:
                # Where another worker published between our look and our start, the same calls find a finished run.
                if finished or not is_published(output, is_file):
                    raise
    raise InputError(f"{printable(output)}: other workers keep finishing and beginning it: start again")


class _Outrun(Exception):
    """Another worker published, or gave up, between our look and our lock."""


def identity_on_record(output: Path) -> dict[str, Any] | None:
    """What `open_run` will compare a run at ``output`` with; None where there is none yet. Raises as `read_json`."""
    finished = [state_of(output, is_file) for is_file in (False, True) if os.path.lexists(output)]
    for state in (partial_of(output) / STATE, *finished):
        if (state / "run.json").exists():
            identity = read_json(state / "run.json").get("identity")
            return identity if isinstance(identity, dict) else {}
    return None


def is_published(output: Path, is_file: bool) -> bool:
    """Whether a run's finished output, records and all, is there."""
    return (state_of(output, is_file) / "done.json").exists() and os.path.lexists(output)


def _open_run(output: Path, settings: dict[str, Any], source: Any, is_file: bool) -> Run:
    partial, state = partial_of(output), state_of(output, is_file)
    if is_published(output, is_file):
        identity = _attach(output, state, settings, source)
        return Run(output, identity, source.blocks, is_file=is_file, complete=True)
    published = is_file and (partial / STATE / "done.json").exists()  # killed between its two renames
    if os.path.lexists(output) and not published:
        if is_file or not output.is_dir() or output.is_symlink() or any(output.iterdir()):
            raise InputError(
                f"{printable(output)}: output must not exist yet; nothing is ever overwritten, and this is no run's"
            )
    made = [parent for parent in partial.absolute().parents if not parent.exists()]
    if os.path.lexists(partial) and not _may_be_a_run(partial):
        raise InputError(f"{printable(partial)}: must not exist yet, or be an unfinished run's, got something else")
    try:
        with writing(output):
            partial.parent.mkdir(parents=True, exist_ok=True)
            (partial / STATE).mkdir(parents=True, exist_ok=True)
        with _locked(partial / STATE) as is_still_there:
            # Only under the lock does it hold still: who publishes has it, and takes the folder away with it.
            if is_published(output, is_file) or not is_still_there():
                raise _Outrun
            with writing(output):
                for inner in ("claims", "blocks", "tmp"):
                    (partial / STATE / inner).mkdir(exist_ok=True)
            if not (partial / STATE / "run.json").exists():
                with writing(output):
                    source.prepare(partial / STATE)
                identity = {**settings, **source.identity}
                run = Run(output, identity, source.blocks, is_file=is_file, complete=False)
                record = {"format": FORMAT, "identity": identity, "blocks": source.blocks}
                with writing(output):
                    run.write_file(partial / STATE / "run.json", (json.dumps(record, indent=1) + "\n").encode())
                return run
            identity = _attach(partial, partial / STATE, settings, source)
            return Run(output, identity, source.blocks, is_file=is_file, complete=False)
    except BaseException:
        if not (partial / STATE / "run.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        raise


def read_header(path: Path) -> dict[str, Any]:
    """A manifest's first line. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.readline())
            if missing := {"block", "images", "failed", "others", "change", "lines_sha256"} - header.keys():
                raise ValueError(f"without {', '.join(sorted(missing))}")
            return header
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{printable(path)}: not a whole manifest: {type(error).__name__}: {error}") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A manifest's other lines. Raises InputError if their SHA-256 is not the one in the first line."""
    expected = read_header(path)["lines_sha256"]
    with path.open("rb") as file:
        file.readline()
        body = file.read()
    if hashlib.sha256(body).hexdigest() != expected:
        raise InputError(f"{printable(path)}: must have SHA-256 {expected} below its first line; it was changed")
    return map(json.loads, body.splitlines())


def _attach(where: Path, state: Path, settings: dict[str, Any], source: Any) -> dict[str, Any]:
    """This run's identity. Raises InputError if it is not the run on record in ``state``."""
    record = read_json(state / "run.json")
    _compare(where, source.identity, record, source.identity)  # of another input's listing there is nothing to say
    source.attach(state)
    identity = {**settings, **source.identity}
    _compare(where, identity, record, identity.keys() | record["identity"].keys())
    return identity


def _compare(where: Path, identity: dict[str, Any], record: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise InputError naming the first of ``keys`` in which this run is not the one on record."""
    identity = json.loads(json.dumps(identity))
    if record.get("format") != FORMAT:
        raise InputError(f"{printable(where)}: format must be {FORMAT!r}, got {record.get('format')!r}")
    theirs = record["identity"]
    for key in sorted(keys):
        if identity.get(key) != theirs.get(key):
            raise InputError(
                f"{printable(where)}: is another run's output: its {key} is {printable(str(theirs.get(key)))}, "
                f"here it is {printable(str(identity.get(key)))}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError if it cannot be read or is something else."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"must be an object, got {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)}: cannot be read: {printable(str(error))}") from error


def _may_be_a_run(partial: Path) -> bool:
    """A folder with our records, or an empty one, in which another worker may be about to make them."""
    return partial.is_dir() and ((partial / STATE).is_dir() or not any(partial.iterdir()))


@contextmanager
def _locked(state: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock in ``state``; yields a function that says whether this lock is still the one of that name."""
    path = state / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"{printable(state)}: cannot be written: {error.strerror}") from error

    def is_still_there() -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(path))
        except OSError:
            return False

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield is_still_there
    finally:
        os.close(descriptor)
