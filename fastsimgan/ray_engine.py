"""One run of refinement on many machines: the same blocks, handed out by Ray Data. Input and output lie on a disk that
all machines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsimgan import workers as local
from fastsimgan.blocks import Run
from fastsimgan.errors import UnavailableError
from fastsimgan.pipeline import Progress
from fastsimgan.workers import Job, Loader, Report, load, make_worker, start


class BlockRefiner:
    """A Ray actor: loads the refiner once and does the blocks that it is given."""

    def __init__(self, job: Job, loader: Loader) -> None:
        self.run, source, output = start(job)
        self.worker = make_worker(self.run, source, output, job, loader, 0, 1)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block; a block that is committed already, or that another worker holds, is left alone."""
        self.worker.run([int(row["block"])])
        return {"block": row["block"]}


def refine(
    job: Job,
    *,
    workers: int = 1,
    address: str | None = None,
    loader: Loader = load,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """`workers.refine` by ``workers`` actors of a Ray cluster. A dead actor's block is done again.

    Args:
        address: of the cluster; "auto": the one this machine belongs to; None: a new one, of this machine alone.

    Raises UnavailableError without Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UnavailableError(f"engine ray needs Ray: pip install 'ray[data]' ({error})") from None

    def hand_out(run: Run) -> None:
        left = sorted(set(range(run.blocks)) - run.committed())
        if not left:
            return
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        gpus = 1 if job.device != "cpu" and ray.cluster_resources().get("GPU") else 0
        blocks = ray.data.from_items([{"block": block} for block in left], override_num_blocks=len(left))
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(left)))
        actor: Any = BlockRefiner  # Ray's annotations know of functions only
        done = blocks.map(actor, fn_constructor_args=(job, loader), compute=pool, num_gpus=gpus)
        for _ in done.iter_rows():
            progress(Progress(blocks=1))

    return local.refine(job, loader=loader, progress=progress, elsewhere=hand_out)
