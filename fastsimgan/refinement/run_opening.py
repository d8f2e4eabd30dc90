"""Start a run, go on with it, or find it complete; never touch what is another run's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fastsimgan.data.formats.listing import STATE
from fastsimgan.errors import InputError
from fastsimgan.refinement import run_paths
from fastsimgan.refinement.lease import run_lock
from fastsimgan.refinement.manifest import RunRecord
from fastsimgan.refinement.records import FORMAT, read_json, to_json
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.run_paths import partial_of, state_of, writing
from fastsimgan.storage.names import printable


class RunSource(Protocol):
    """What opening a run asks of its source."""

    @property
    def identity(self) -> Any:
        """A record (`records.to_json`) of what makes two sources the same; all of it known after either call below."""

    @property
    def work_units(self) -> int:
        """How many there are; known after either call below."""

    def prepare(self, state: Path) -> None:
        """Called once, in a new run, whose records go into ``state``."""

    def attach(self, state: Path) -> None:
        """Called in every other."""


def open_run(output: Path, settings: Any, source: RunSource, *, is_file: bool) -> RunDirectory:
    """Start a run, or go on with it, or find it complete.

    Args:
        output: where the result will be.
        settings: a record; with the source's identity, what makes two runs the same one.
        source: what is to be refined.
        is_file: the output is a file, not a folder.

    Raises:
        InputError: before anything is written, if there is another thing or another run at ``output`` or
            ``output.partial``.
    """
    for _ in range(3):
        finished = run_paths.is_published(output, is_file)
        with suppress(_OutrunError):
            try:
                return _open_run(output, settings, source, is_file)
            except InputError:
                # Where another worker published between our look and our start, the same calls find a finished run.
                if finished or not run_paths.is_published(output, is_file):
                    raise
    raise InputError(f"{printable(output)}: other workers keep finishing and beginning it: start again")


class _OutrunError(Exception):
    """Another worker published, or gave up, between our look and our lock."""


def identity_on_record(output: Path) -> dict[str, Any] | None:
    """What `open_run` will compare a run at ``output`` with; None where there is none yet.

    Raises:
        InputError: as `read_json`.
    """
    finished = [state_of(output, is_file) for is_file in (False, True) if os.path.lexists(output)]
    for state in (partial_of(output) / STATE, *finished):
        if (state / "run.json").exists():
            identity = read_json(state / "run.json").get("identity")
            return identity if isinstance(identity, dict) else {}
    return None


def _open_run(output: Path, settings: Any, source: RunSource, is_file: bool) -> RunDirectory:
    partial, state = partial_of(output), state_of(output, is_file)
    if run_paths.is_published(output, is_file):
        identity = _attach(output, state, settings, source)
        return RunDirectory(output, identity, source.work_units, is_file=is_file, complete=True)
    published = is_file and (partial / STATE / "done.json").exists()  # killed between its two renames
    if os.path.lexists(output) and not published:
        if is_file or not output.is_dir() or output.is_symlink() or any(output.iterdir()):
            raise InputError(
                f"{printable(output)}: output must not exist yet; nothing is ever overwritten, and this is no run's"
            )
    if os.path.lexists(partial) and not _may_be_a_run(partial):
        raise InputError(f"{printable(partial)}: must not exist yet, or be an unfinished run's, got something else")
    with _nothing_left_behind(partial):
        with writing(output):
            partial.parent.mkdir(parents=True, exist_ok=True)
            (partial / STATE).mkdir(parents=True, exist_ok=True)
        with run_lock(partial / STATE) as is_still_there:
            # Only under the lock does it hold still: who publishes has it, and takes the folder away with it.
            if run_paths.is_published(output, is_file) or not is_still_there():
                raise _OutrunError
            with writing(output):
                for inner in ("claims", "blocks", "tmp"):
                    (partial / STATE / inner).mkdir(exist_ok=True)
            if not (partial / STATE / "run.json").exists():
                return _begin(output, settings, source, is_file)
            identity = _attach(partial, partial / STATE, settings, source)
            return RunDirectory(output, identity, source.work_units, is_file=is_file, complete=False)


@contextmanager
def _nothing_left_behind(partial: Path) -> Iterator[None]:
    """Where a run fails to begin, remove the folders made for it."""
    made = [parent for parent in partial.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        if not (partial / STATE / "run.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        raise


def _may_be_a_run(partial: Path) -> bool:
    """A folder with our records, or an empty one, in which another worker may be about to make them."""
    return partial.is_dir() and ((partial / STATE).is_dir() or not any(partial.iterdir()))


def _begin(output: Path, settings: Any, source: RunSource, is_file: bool) -> RunDirectory:
    """A new run, from here on on record."""
    state = partial_of(output) / STATE
    with writing(output):
        source.prepare(state)
    identity = to_json(settings) | to_json(source.identity)
    run = RunDirectory(output, identity, source.work_units, is_file=is_file, complete=False)
    record = to_json(RunRecord(FORMAT, identity, source.work_units))
    with writing(output):
        run.write_file(state / "run.json", (json.dumps(record, indent=1) + "\n").encode())
    return run


def _attach(where: Path, state: Path, settings: Any, source: RunSource) -> dict[str, Any]:
    """This run's identity.

    Raises:
        InputError: if it is not the run on record in ``state``.
    """
    record = read_json(state / "run.json")
    known = to_json(source.identity)
    _compare(where, known, record, known)  # of another input's listing there is nothing to say
    source.attach(state)
    identity = to_json(settings) | to_json(source.identity)
    _compare(where, identity, record, identity.keys() | record["identity"].keys())
    return identity


def _compare(where: Path, identity: dict[str, Any], record: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise InputError naming the first of ``keys`` in which this run is not the one on record."""
    identity = json.loads(json.dumps(identity))
    if record.get("format") != FORMAT:
        raise InputError(f"{printable(where)}: format must be {FORMAT!r}, got {record.get('format')!r}")
    theirs = record["identity"]
    for key in sorted(keys, key=lambda key: (key == "features", key)):  # they follow from the precision
        if identity.get(key) != theirs.get(key):
            raise InputError(
                f"{printable(where)}: is another run's output: its {key} is {printable(str(theirs.get(key)))}, "
                f"here it is {printable(str(identity.get(key)))}"
            )
