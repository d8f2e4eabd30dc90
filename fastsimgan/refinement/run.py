"""Refine a job: by this process, or by workers that a supervisor keeps at work elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.loading import Loader, load
from fastsimgan.refinement.local_workers import supervise as supervise_here
from fastsimgan.refinement.report import Progress, Report
from fastsimgan.refinement.session import Session, open_session
from fastsimgan.refinement.worker_loop import work


class Supervisor(Protocol):
    """Keeps workers at work until one has seen the output published."""

    def __call__(self, session: Session, loader: Loader, workers: int, report: Callable[[int, Progress], None]) -> None:
        """``report`` is called with a worker's number and what is new."""


def refine(
    job: Job,
    *,
    workers: int = 1,
    loader: Loader = load,
    progress: Callable[[Progress], None] = lambda progress: None,
    supervise: Supervisor | None = None,
) -> Report:
    """Open a job's run and do it, as `refine_session` does."""
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    return refine_session(open_session(job), workers=workers, loader=loader, progress=progress, supervise=supervise)


def refine_session(
    session: Session,
    *,
    workers: int = 1,
    loader: Loader = load,
    progress: Callable[[Progress], None] = lambda progress: None,
    supervise: Supervisor | None = None,
) -> Report:
    """Refine a run's input into its output, in this process or in ``workers`` others on this machine.

    A run that was begun before goes on; one that is complete is left as it is. Where all images are bad, or the first
    work unit fails, nothing is left behind; after any other failure, what is committed stays for the next start.

    Args:
        session: the opened run. It is complete afterwards.
        workers: at least 1.
        loader: loads the refiner, in each worker's process.
        progress: called after each batch and each commit.
        supervise: keeps the workers somewhere else (`ray_workers.supervise`).

    Raises:
        InputError: at a bad image ("fail"), a full disk, or if no image is good.
        UnavailableError: as the loader does.
        FastSimGANError: if workers keep dying.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    begin = time.perf_counter()
    report = Report()
    latest: dict[int, Progress] = {}

    def add(worker: int, part: Progress) -> None:
        latest[worker] = part
        report.now += part.images
        progress(part)

    run = session.run
    try:
        if not run.complete:
            if workers == 1 and supervise is None:
                work(session, loader, 0, 1, partial(add, 0))
            else:
                (supervise or supervise_here)(session, loader, workers, add)
            run.published()
    except BaseException:
        run.discard_if_empty()
        raise
    for part in latest.values():
        report.add_worker(part)
    report.take_totals(run.totals())
    report.seconds = time.perf_counter() - begin
    return report
