"""Workers in processes of their own on this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from fastsimgan.errors import FastSimGANError, InputError, UnavailableError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.loading import Loader
from fastsimgan.refinement.report import Progress
from fastsimgan.refinement.session import Session, open_session
from fastsimgan.refinement.worker_loop import work

DEATHS = 3  # in a row without a commit in between, after which a run is given up


def supervise(session: Session, loader: Loader, workers: int, report: Callable[[int, Progress], None]) -> None:
    """Keep ``workers`` processes at work until one has seen the output published; replace those that die.

    Args:
        session: the run; each process opens it for itself.
        loader: loads the refiner, in each process.
        workers: how many, at least 1.
        report: called with a worker's number and what is new.

    Raises:
        InputError, UnavailableError: what a worker raises.
        FastSimGANError: if workers keep dying.
    """
    context = multiprocessing.get_context("spawn")
    alive: dict[int, tuple[Any, Connection]] = {}
    deaths = 0

    def begin(worker: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_worker_main, args=(session.asked, loader, worker, workers, theirs), daemon=True
        )
        process.start()
        theirs.close()
        alive[worker] = process, ours

    try:
        for worker in range(workers):
            begin(worker)
        while alive:
            wait([connection for _, connection in alive.values()])
            for worker, (process, connection) in list(alive.items()):
                finished = False
                try:
                    while connection.poll():
                        kind, value = connection.recv()
                        if kind == "progress":
                            deaths = 0
                            report(worker, value)
                        elif kind == "error":
                            raise value[0](value[1])
                        else:
                            finished = True
                except EOFError:
                    del alive[worker]
                    process.join()
                    if not finished and process.exitcode != 0:
                        deaths += 1
                        if deaths > DEATHS:
                            raise FastSimGANError(
                                f"workers must not die: {deaths} in a row did, the last with exit code "
                                f"{process.exitcode} (-9: killed, perhaps for memory: lower --batch-size)"
                            ) from None
                        begin(worker)
    finally:
        for process, _ in alive.values():
            process.terminate()
        for process, _ in alive.values():
            process.join()


def _worker_main(job: Job, loader: Loader, worker: int, workers: int, connection: Connection) -> None:
    """A worker's process."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a killed parent takes nobody with it by itself
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        work(open_session(job, joins=True), loader, worker, workers, lambda part: connection.send(("progress", part)))
        connection.send(("done", None))
    except (InputError, UnavailableError) as error:
        connection.send(("error", (type(error), str(error))))
    except KeyboardInterrupt:
        os._exit(130)
    with suppress(OSError):
        connection.close()
