"""One worker of a run: do work units until all are committed, then publish.

All workers do the same, in this process, in others of this machine, and on other machines that share the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from fastsimgan.errors import InputError
from fastsimgan.refinement import loading
from fastsimgan.refinement.image_refiner import RefinerDriver
from fastsimgan.refinement.loading import Loader
from fastsimgan.refinement.report import Progress
from fastsimgan.refinement.session import Session
from fastsimgan.refinement.tuning import fitting
from fastsimgan.refinement.worker import Worker
from fastsimgan.storage.names import printable

LOOK_AGAIN = 0.5  # seconds between two looks at work units that other workers hold


def work(session: Session, loader: Loader, worker: int, workers: int, report: Callable[[Progress], None]) -> None:
    """Be one worker: do work units until all are committed, those of workers that die included; then publish.

    Args:
        session: the run, opened in this process.
        loader: loads the refiner, once there is something to do.
        worker: its number.
        workers: how many there are on this machine.
        report: called after each batch and each commit.

    Raises:
        InputError: at a bad image ("fail") or a full disk.
        Exception: whatever the loader raises.
    """
    try:
        _do_units(session, loader, worker, workers, report)
    except InputError:
        if not session.run.published():  # else another worker finished meanwhile, and its folders went with it
            raise


def _do_units(session: Session, loader: Loader, worker: int, workers: int, report: Callable[[Progress], None]) -> None:
    run = session.run
    working: Worker | None = None
    while not run.complete:
        left = sorted(set(range(run.work_units)) - run.committed())
        if not left:
            _publish(session)
            return
        if working is None:
            working = make_worker(session, loader, worker, workers)
        # each worker begins elsewhere, so that they seldom try for one unit; golden sections, for any number of them
        offset = int(len(left) * (worker * 0.618034 % 1))
        done = 0

        def count(progress: Progress) -> None:
            nonlocal done
            done += progress.work_units
            report(progress)

        working.run(left[offset:] + left[:offset], count)
        if not done:
            time.sleep(LOOK_AGAIN)


def make_worker(session: Session, loader: Loader, worker: int, workers: int) -> Worker:
    """Load the refiner, make it ready, and make the `Worker` that drives it."""
    refiner = RefinerDriver(loader(session.job, worker, workers))
    file, choice = session.source.array_file, session.choice
    if choice.compiled and file is not None:
        height, width = file.size
        refiner.warm_up(fitting(choice.batch_size, choice.pixels, height, width), height, width)
    return Worker(session, refiner, loading.cores(workers))


def _publish(session: Session) -> None:
    """Put the output together, all of which is committed, and give it its name, unless another worker has."""
    run = session.run
    with run.locked() as is_still_there:
        if not is_still_there():  # another worker published while we waited
            return
        totals = run.totals()
        if not totals.counts.images:
            _, reason = next(run.failures(), ("", "none was found"))
            raise InputError(
                f"{session.source.identity.path}: at least one image must be readable, got 0: {printable(reason)}"
            )
        session.source.refuse_changes(run.state)
        run.publish(replace(totals, labels=session.sink.finish()))
