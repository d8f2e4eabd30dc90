"""Workers of one run on all machines of a Ray cluster, which share a disk. Ray starts them, places them, and starts
those that die again; which work unit is whose is settled by leases, as among the workers of one machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastsimgan.errors import FastSimGANError, InputError, UnavailableError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.loading import Loader
from fastsimgan.refinement.local_workers import DEATHS
from fastsimgan.refinement.manifest import read_header
from fastsimgan.refinement.report import Progress
from fastsimgan.refinement.session import Session, open_session
from fastsimgan.refinement.worker_loop import work

LOOK = 1.0  # seconds between two looks at what has been committed


def supervise(
    session: Session,
    loader: Loader,
    workers: int,
    report: Callable[[int, Progress], None],
    *,
    address: str | None = None,
) -> None:
    """Have a job done by ``workers`` Ray tasks, spread over the cluster; returns when its output is published.

    A task whose process or machine dies is started again, `DEATHS` times at most, and the units that it held are free.

    Args:
        session, loader, workers: as for `local_workers.supervise`. Every machine must see the job's paths under the
            same names and have this package, and whatever module ``loader`` is of, installed.
        report: called with a worker's number and what is new: here the driver's count of commits.
        address: the cluster's; "auto": the one that this machine belongs to; None: RAY_ADDRESS's or else a new one, of
            this machine alone, that ends with the call. Not looked at if this process has called ``ray.init``.

    Raises:
        UnavailableError: without Ray or if there is no cluster at ``address``.
        FastSimGANError: if workers keep dying.
        InputError, UnavailableError: what a worker raises.
    """
    try:
        import ray
    except ImportError as error:
        raise UnavailableError(f"engine ray needs Ray: pip install fastsimgan[ray] ({error})") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UnavailableError(f"address must be a running Ray cluster's, got {address}: {error}") from error
    try:
        _supervise(ray, session, loader, workers, report)
    finally:
        if ours:
            ray.shutdown()


def _supervise(
    ray: Any, session: Session, loader: Loader, workers: int, report: Callable[[int, Progress], None]
) -> None:
    job, run = _absolute(session.asked), session.run
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus]
    if not nodes:
        raise UnavailableError("the Ray cluster must have a CPU to offer, got none")
    together = -(-workers // len(nodes))  # on one machine
    task = ray.remote(_task).options(
        num_cpus=max(1, min(nodes) // together),
        num_gpus=1 if job.device != "cpu" and ray.cluster_resources().get("GPU") else 0,
        max_retries=DEATHS,
        scheduling_strategy="SPREAD",
    )
    known = run.committed()

    def count() -> None:
        new = sorted(run.committed() - known)
        known.update(new)
        if new:
            images = sum(read_header(run.manifest(work_unit)).images for work_unit in new)
            report(-1, Progress(images=images, work_units=len(new)))

    left = [task.remote(job, loader, worker, together) for worker in range(workers)]
    try:
        while left:
            done, left = ray.wait(left, timeout=LOOK)
            for result in done:
                for worker, part in _result(ray, result).items():
                    report(worker, part)
            try:
                count()
            except InputError:
                if not run.published():  # else its records have moved
                    raise
    finally:
        for result in left:
            ray.cancel(result, force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=10)
    run.published()
    count()


def _result(ray: Any, result: Any) -> dict[int, Progress]:
    """What a task returned. Raises what it raised, as the local engine does."""
    try:
        found: dict[int, Progress] = ray.get(result)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, UnavailableError)):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except ray.exceptions.RayError as error:
        raise FastSimGANError(
            f"workers must not die: one did {DEATHS + 1} times (killed for memory? lower --batch-size): "
            f"{type(error).__name__}"
        ) from error


def _task(job: Job, loader: Loader, worker: int, together: int) -> dict[int, Progress]:
    """One worker. Its stages' seconds come back; its counts do not: a worker that died before it has told nothing."""
    last: dict[int, Progress] = {}

    def keep(part: Progress) -> None:
        last[worker] = replace(part, images=0, work_units=0)

    work(open_session(job, joins=True), loader, worker, together, keep)
    return last


def _absolute(job: Job) -> Job:
    """A worker has another working directory."""
    return replace(job, refiner=job.refiner.absolute(), input=job.input.absolute(), output=job.output.absolute())
