"""A run of refinement on the disk: fixed work units, leases, manifests, and one commit of the whole.

The records of a run, in the folder ``.fastsimgan`` (`run_paths` says where):

- ``run.json``: what makes two runs the same one (input, refiner, settings), and versions. Written before any work.
- ``claims/00000007``: locked (flock) by the worker at work unit 7. The system frees the lock when the worker dies.
- ``blocks/00000007.jsonl``: work unit 7's manifest, renamed into place when all of its files are: the unit's commit.
- ``tmp/``: files on the way to their names. ``done.json``: totals, written last, before the output gets its name.

Work units are fixed at the start and so are the batches inside one, so that whoever does a unit, and however often,
writes the same bytes under the same names. Leases only save work; correctness does not lean on them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from fastsimgan.data.formats.listing import STATE
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.lease import Lease, run_lock, take_lease
from fastsimgan.refinement.manifest import (
    Counts,
    ManifestHeader,
    ManifestLine,
    Totals,
    encode_manifest,
    read_header,
    read_lines,
)
from fastsimgan.refinement.records import to_json
from fastsimgan.refinement.run_paths import partial_of, state_of
from fastsimgan.storage.names import printable


class RunDirectory:
    """One output in the making, or made. Any number of processes may have it open (`run_opening.open_run`).

    Args:
        output: where the result is, or will be.
        identity: what makes two runs the same one, as ``run.json`` has it.
        work_units: how many there are.
        is_file: the output is a file, not a folder.
        complete: it is made, and has its name.
    """

    def __init__(
        self, output: Path, identity: dict[str, Any], work_units: int, *, is_file: bool, complete: bool
    ) -> None:
        self.output = output
        self.identity = identity
        self.work_units = work_units
        self.is_file = is_file
        self.complete = complete
        self.partial = partial_of(output)
        self.state = state_of(output, is_file) if complete else self.partial / STATE
        self._prefix = uuid.uuid4().hex
        self._names = count()

    # --- work units

    def committed(self) -> set[int]:
        """The work units that are done. One listing, no manifest is read."""
        with self.writing():
            return {int(name[:8]) for name in os.listdir(self.state / "blocks")}

    def is_committed(self, work_unit: int) -> bool:
        """Whether a work unit is done."""
        return self.manifest(work_unit).exists()

    def manifest(self, work_unit: int) -> Path:
        """Where a work unit's manifest is, or will be."""
        return self.state / "blocks" / f"{work_unit:08d}.jsonl"

    def lease(self, work_unit: int) -> Lease | None:
        """Take a work unit; None if it is done, another worker is at it, or all was published meanwhile.

        Raises:
            UnavailableError: on a file system without locks.
        """
        path = self.state / "claims" / f"{work_unit:08d}"
        with self.writing():
            lease = take_lease(path, work_unit, self.output)
        # The lease's file goes when the run is published: what it says of manifests then is no longer true.
        if lease is not None and (self.is_committed(work_unit) or not path.exists()):
            lease.release()
            return None
        return lease

    def commit(self, header: ManifestHeader, lines: Iterable[ManifestLine]) -> None:
        """Write a work unit's manifest. All of its files must have their names by now."""
        with self.writing():
            self.write_file(self.manifest(header.work_unit), encode_manifest(header, lines), flush=True)

    def headers(self) -> Iterator[ManifestHeader]:
        """The first line of every manifest, in the order of the work units.

        Raises:
            InputError: if one is damaged.
        """
        for work_unit in sorted(self.committed()):
            yield read_header(self.manifest(work_unit))

    def totals(self) -> Totals:
        """Sums over the committed work units."""
        found = {"work_units": 0, "images": 0, "failed": 0, "others": 0}
        change = 0.0
        for header in self.headers():
            found["work_units"] += 1
            for key in ("images", "failed", "others"):
                found[key] += getattr(header, key)
            change += header.change
        return Totals(Counts(**found), change)

    def failures(self) -> Iterator[tuple[str, str]]:
        """Name and reason of each image left out, in order. Reads only the manifests that have some."""
        for header in self.headers():
            if header.failed:
                for line in read_lines(self.manifest(header.work_unit)):
                    if line.error is not None:
                        yield line.name, line.error

    # --- files

    def temporary(self) -> Path:
        """A new name under ``tmp/``, that of no other thread, process or machine."""
        return self.state / "tmp" / f"{self._prefix}.{next(self._names)}"

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
        run_paths.rename(temporary, path)

    def writing(self) -> AbstractContextManager[None]:
        """Turn what the system raises on writing into an InputError that names the output."""
        return run_paths.writing(self.output)

    # --- the whole

    def locked(self) -> AbstractContextManager[Callable[[], bool]]:
        """Hold the run's own lock, as `run_lock` has it."""
        return run_lock(self.state)

    def published(self) -> bool:
        """Whether the output has its name by now; one that is just being published is waited for, 10 s at most.

        If it has, this is from now on the finished run.
        """
        deadline = time.monotonic() + 10
        while not self.complete and (self.state / "done.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self.complete and run_paths.is_published(self.output, self.is_file):
            self._finished()
        return self.complete

    def publish(self, totals: Totals) -> None:
        """Give the output its name. Call it with the lock held and all committed; can be repeated after a kill.

        A folder appears by one rename. A file appears by one rename, and its records beside it as
        ``OUT.fastsimgan`` by another.
        """
        with self.writing():
            done = json.dumps(to_json(totals)) + "\n"
            self.write_file(self.state / "done.json", done.encode("ascii"), flush=True)
            for inner in ("claims", "tmp"):
                shutil.rmtree(self.state / inner, ignore_errors=True)
            final = state_of(self.output, self.is_file)
            if self.is_file:
                if (self.partial / self.output.name).exists():
                    if os.path.lexists(self.output):
                        raise InputError(f"{printable(self.output)}: output must not exist yet; it appeared meanwhile")
                    run_paths.rename(self.partial / self.output.name, self.output)
                if final.exists():  # records of an output that its owner has removed
                    shutil.rmtree(final)
                run_paths.rename(self.state, final)
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                run_paths.rename(self.partial, self.output)
        self._finished()

    def _finished(self) -> None:
        self.complete = True
        self.state = state_of(self.output, self.is_file)

    def discard_if_empty(self) -> None:
        """Remove what a run that failed in its first work unit left, unless another worker is at it."""
        with suppress(OSError, InputError):
            if self.complete or self.committed():
                return
            for name in os.listdir(self.state / "claims"):
                lease = self.lease(int(name))
                if lease is None:
                    return
                lease.release()
            shutil.rmtree(self.partial)
