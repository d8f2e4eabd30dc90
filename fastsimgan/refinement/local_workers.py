"""One run of refinement by one process, or by several on this machine; and on other machines that share the disk.

All of them do the same: open the run, claim blocks until none is left, and publish the output once all are committed.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from fastsimgan.data.formats.hdf5_file import HDF5Images
from fastsimgan.data.formats.image_file import JPEG_QUALITY, codecs
from fastsimgan.errors import FastSimGANError, InputError, UnavailableError
from fastsimgan.refinement import tuning
from fastsimgan.refinement.run_directory import Run, identity_on_record, open_run, partial_of
from fastsimgan.refinement.sinks import ArraysOutput, FolderOutput, Output, PackedOutput, ShardsOutput
from fastsimgan.refinement.sources import ArraysInput, FolderInput, Input, ShardsInput, open_input
from fastsimgan.refinement.tuning import fitting
from fastsimgan.refinement.unpacked import UnpackedInput
from fastsimgan.refinement.worker import DeviceRefiner, ImageRefiner, Progress, Worker
from fastsimgan.storage.checksum import hash_file
from fastsimgan.storage.names import printable

SUFFIXES = {"npz": (".npz",), "npy": (".npy",), "hdf5": (".h5", ".hdf5")}  # of outputs that are one file
LOOK_AGAIN = 0.5  # seconds between two looks at blocks that other workers hold
DEATHS = 3  # in a row without a commit in between, after which a run is given up


@dataclass(frozen=True)
class Job:
    """What is to be refined, by what, into what."""

    refiner: Path
    input: Path
    output: Path
    batch_size: int | None = None  # None: as the run began, or what `tuning.choose` takes
    pixels: int | None = None  # in a batch; None likewise
    compiled: bool | None = None  # None likewise
    block: str | None = None  # implementation of the op residual_block on CUDA; None likewise
    device: str = "auto"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    on_error: Literal["fail", "skip"] = "fail"
    images: str | None = None
    to: Literal["same", "folder", "shards", "npz", "hdf5"] = "same"
    link: bool = False
    trust_engine: bool = False
    key: str | None = None
    follow_links: bool = False


@dataclass
class Report:
    """What a run has done, all its workers and all its starts together."""

    images: int = 0  # refined and written
    failed: int = 0  # left out
    others: int = 0
    mean_change: float = 0.0  # mean of |R(x) - x| over pixels and images, in grey levels of 255, whatever the bit depth
    now: int = 0  # images of this call
    seconds: float = 0.0  # of this call
    working: float = 0.0  # of the worker that was at work longest, once its refiner was loaded
    busy: dict[str, float] = field(default_factory=dict)  # seconds that the threads of each stage were at work
    threads: dict[str, int] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)  # that refined, by name
    peak_bytes: int = 0  # of a device's memory, of the worker that took most


Loader = Callable[[Job, int, int], ImageRefiner]  # of a job, a worker's number and how many share its machine
Supervisor = Callable[[Job, Loader, int, Callable[[int, Progress], None]], None]


def load(job: Job, worker: int = 0, workers: int = 1) -> ImageRefiner:
    """The job's refiner: several workers share the CUDA devices out among them, or else the cores."""
    import torch

    from fastsimgan.hardware.device import choose_device, short_of_memory
    from fastsimgan.inference import load_refiner
    from fastsimgan.inference.cuda_stream import SMALLER, StreamedRefiner
    from fastsimgan.inference.per_core import CoreRefiner

    device = job.device
    if workers > 1:
        torch.set_num_threads(cores(workers))
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{worker % torch.cuda.device_count()}"
    chosen = choose_device(device)
    load_it = partial(
        load_refiner, job.refiner, device=str(chosen), precision=job.precision, trust_engine=job.trust_engine
    )
    if chosen.type == "cpu":
        return CoreRefiner(load_it, cores(workers))
    if workers > 1:  # a process of its own, which has no business on another device
        torch.cuda.set_device(chosen)
    # whoever does a block must write the same bytes, so nothing may depend on what was faster
    with short_of_memory(chosen, SMALLER):
        return StreamedRefiner(load_it(compiled=bool(job.compiled), repeatable=True, block=job.block or "auto"))


def cores(workers: int) -> int:
    """Cores that this process may use, for each of ``workers``; at least 1, at most 16."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // workers))


def check(job: Job) -> Input:
    """Open the input and look at the output. Writes nothing.

    Raises InputError if the input cannot be refined or the output is no place for it.
    """
    batch_size = tuning.BATCH_SIZE if job.batch_size is None else job.batch_size
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    source = open_input(
        job.input,
        batch_size=batch_size,
        images=job.images,
        key=job.key,
        links="all" if job.follow_links else "files",
    )
    if job.link and not (isinstance(source, FolderInput) and job.to in ("same", "folder")):
        raise InputError("link must be off where labels are not files of a folder both before and after, got --link")
    old, new = Path(os.path.realpath(job.input)), Path(os.path.realpath(job.output))
    if old == new:
        raise InputError(f"{printable(job.output)}: output must not be the input")
    if new.is_relative_to(old):
        raise InputError(f"{printable(job.output)}: output must not be inside the input {printable(job.input)}")
    if old.is_relative_to(new) or old.is_relative_to(partial_of(new)):
        raise InputError(f"{printable(job.output)}: output must not contain the input {printable(job.input)}")
    suffix, to = job.output.suffix.lower(), output_kind(job, source)
    if to in SUFFIXES:
        if suffix not in SUFFIXES[to]:
            why = "as the input is one" if job.to == "same" else f"by --to {to}"
            raise InputError(
                f"{printable(job.output)}: output must end in {' or '.join(SUFFIXES[to])}, {why}, got {suffix!r}"
            )
    elif suffix in (".npz", ".npy", ".h5", ".hdf5", ".tar"):
        makes = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".tar": "shards"}.get(suffix)
        hint = f" (--to {makes} makes {'a folder of them' if makes == 'shards' else 'one'})" if makes else ""
        raise InputError(f"{printable(job.output)}: output must be a folder, got the suffix {suffix}{hint}")
    if to != "shards" and isinstance(source, ShardsInput):
        source.refuse_shared_names()
    if to == "npz" and isinstance(source, ArraysInput) and isinstance(source.arrays, HDF5Images):
        source.arrays.only_arrays("an .npz")
    if isinstance(source, ArraysInput) and to in ("folder", "shards"):
        source = UnpackedInput(source.arrays, batch_size, "files")
    if job.compiled and (isinstance(source, UnpackedInput) or not isinstance(source, ArraysInput)):
        raise InputError(
            f"compile must be off where images are files, which may have any size and which codecs wait for, got "
            f"{printable(job.input)} {'to files' if isinstance(source, UnpackedInput) else ''}".rstrip()
        )
    return source


def output_kind(job: Job, source: Input) -> str:
    """What a job makes: "folder", "shards", "npz", "npy" or "hdf5"."""
    return source.kind if job.to == "same" else job.to


def start(job: Job) -> tuple[Run, Input, Output]:
    """Open a job's run: new, to be gone on with, or complete. Raises InputError as `check` and `open_run` do."""
    asked, job = job, as_begun(job)
    source = check(job)
    to = output_kind(job, source)
    if None in (job.batch_size, job.pixels, job.compiled, job.block):  # a new run
        settled = _settle(job, source)
        source = source if settled.batch_size in (job.batch_size, tuning.BATCH_SIZE) else check(settled)
        job = settled
    settings = {
        "refiner sha256": refiner_sha256(job.refiner),
        "precision": job.precision,
        "batch size": job.batch_size,
        "output kind": to,
        "link": job.link,
        "JPEG quality": JPEG_QUALITY,
        "codecs": codecs(),
    }
    if tuning.on_cuda(job.device):  # a CPU rounds otherwise
        settings["device"] = "cuda"
    if job.pixels != tuning.PIXELS_PER_BATCH:
        settings["pixels in a batch"] = job.pixels
    if job.compiled:
        settings["compiled"] = True
    if job.block != tuning.BLOCK:
        settings["residual block"] = job.block
    try:
        run = open_run(job.output, settings, source, is_file=to in SUFFIXES)
    except InputError:
        if (begun := as_begun(asked)) in (asked, job):
            raise
        return start(begun)  # another worker, which takes other batches by itself, began the run meanwhile
    output: Output
    if isinstance(source, UnpackedInput):
        output = ShardsOutput(run, source) if to == "shards" else FolderOutput(run, source)
    elif isinstance(source, ArraysInput):
        output = ArraysOutput(run, source, to)
    elif to in SUFFIXES:
        output = PackedOutput(run, source, to)
    elif to == "shards":
        output = ShardsOutput(run, source)
    else:
        output = FolderOutput(run, source, link=job.link)
    return run, source, output


def as_begun(job: Job) -> Job:
    """``job`` with what it leaves open as the run at its output was begun; as it is where there is none yet."""
    if (record := identity_on_record(job.output)) is None:
        return job
    known = {
        "batch_size": record.get("batch size", tuning.BATCH_SIZE),
        "pixels": record.get("pixels in a batch", tuning.PIXELS_PER_BATCH),
        "compiled": record.get("compiled", False),
        "block": record.get("residual block", tuning.BLOCK),
    }
    return replace(job, **{name: value for name, value in known.items() if getattr(job, name) is None})


def _settle(job: Job, source: Input) -> Job:
    """``job`` with what it leaves open chosen for this machine."""
    images = None
    if isinstance(source, ArraysInput) and not isinstance(source, UnpackedInput):
        images = len(source.arrays), *source.arrays.shape[1:]
    choice = tuning.choose(job.device, job.refiner, images, job.precision)
    return replace(
        job,
        batch_size=choice.batch_size if job.batch_size is None else job.batch_size,
        pixels=choice.pixels if job.pixels is None else job.pixels,
        compiled=choice.compiled if job.compiled is None else job.compiled,
        block=choice.block if job.block is None else job.block,
    )


def refiner_sha256(path: Path) -> str:
    """SHA-256 of a refiner's file. Raises InputError if it is not there."""
    file = path / "refiner.safetensors" if path.is_dir() else path
    return hash_file(file, "the refiner cannot be read")


def work(job: Job, loader: Loader, worker: int, workers: int, report: Callable[[Progress], None]) -> None:
    """Be one worker, one of ``workers`` on this machine: do blocks until all are committed, those of workers that die
    included; then publish.

    Raises InputError at a bad image ("fail") or a full disk, and whatever the loader raises.
    """
    run, source, output = start(job)
    try:
        _do_blocks(run, source, output, job, loader, worker, workers, report)
    except InputError:
        if not run.published():  # else another worker finished meanwhile, and its folders went with it
            raise


def _do_blocks(
    run: Run, source: Input, output: Output, job: Job, loader: Loader, worker: int, workers: int,
    report: Callable[[Progress], None],
) -> None:  # fmt: skip
    refining: Worker | None = None
    while not run.complete:
        left = sorted(set(range(run.blocks)) - run.committed())
        if not left:
            _publish(run, output)
            return
        if refining is None:
            refining = make_worker(run, source, output, job, loader, worker, workers)
        # each worker begins elsewhere, so that they seldom try for one block; golden sections, for any number of them
        offset = int(len(left) * (worker * 0.618034 % 1))
        done = 0

        def count(progress: Progress) -> None:
            nonlocal done
            done += progress.blocks
            report(progress)

        refining.report = count
        refining.run(left[offset:] + left[:offset])
        if not done:
            time.sleep(LOOK_AGAIN)


def make_worker(run: Run, source: Input, output: Output, job: Job, loader: Loader, worker: int, workers: int) -> Worker:
    """Load the refiner; the `Worker` that it makes claims blocks of ``run``."""
    job = as_begun(job)
    assert job.batch_size is not None and job.pixels is not None
    refiner = loader(job, worker, workers)
    if job.compiled and isinstance(source, ArraysInput) and isinstance(refiner, DeviceRefiner):
        height, width = source.arrays.shape[1:]
        refiner.warm_up(fitting(job.batch_size, job.pixels, height, width), height, width)
    return Worker(
        run,
        source,
        output,
        refiner,
        batch_size=job.batch_size,
        on_error=job.on_error,
        threads=cores(workers),
        pixels=job.pixels,
        record={
            "device": str(getattr(refiner, "device_name", "cpu")),
            "backend": str(getattr(refiner, "backend_name", "")),
            "versions": versions(),
        },
    )


def versions() -> dict[str, str]:
    """Of what decides about the bytes written."""
    return {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "torch")}


def _publish(run: Run, output: Output) -> None:
    with run.locked() as is_still_there:
        if not is_still_there():  # another worker published while we waited
            return
        totals = run.totals()
        if not totals["images"]:
            _, reason = next(run.failures())
            raise InputError(
                f"{run.identity['input']}: at least one image must be readable, got 0: {printable(reason)}"
            )
        labels = output.finish()
        run.publish(totals | ({} if labels is None else {"labels": labels}))


def refine(
    job: Job,
    *,
    workers: int = 1,
    loader: Loader = load,
    progress: Callable[[Progress], None] = lambda progress: None,
    supervise: Supervisor | None = None,
) -> Report:
    """Refine a job's input into its output, in this process or in ``workers`` others on this machine.

    ``supervise`` keeps the workers somewhere else (`ray_workers.supervise`).

    A run that was begun before goes on; one that is complete is left as it is. Where all images are bad, or the first
    block fails, nothing is left behind; after any other failure, what is committed stays for the next start.
    Raises InputError, UnavailableError, and FastSimGANError if workers keep dying.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    begin = time.perf_counter()
    report = Report()

    stages: dict[int, Progress] = {}

    def add(worker: int, part: Progress) -> None:
        stages[worker] = part
        report.now += part.images
        progress(part)

    run: Run | None = None
    try:
        run, *_ = start(job)
        if not run.complete:
            if workers == 1 and supervise is None:
                work(job, loader, 0, 1, partial(add, 0))
            else:
                (supervise or _supervise)(job, loader, workers, add)
            run, *_ = start(job)
    except BaseException:
        if run is not None:
            run.discard_if_empty()
        raise
    totals = run.totals()
    for part in stages.values():
        report.working = max(report.working, part.seconds)
        report.backends |= {part.backend} - {""}
        report.peak_bytes = max(report.peak_bytes, part.peak_bytes)
        for stage, seconds in part.busy.items():
            report.busy[stage] = report.busy.get(stage, 0.0) + seconds
        for stage, threads in part.threads.items():
            report.threads[stage] = report.threads.get(stage, 0) + threads
    report.images, report.failed, report.others = totals["images"], totals["failed"], totals["others"]
    report.mean_change = totals["change"] / max(1, report.images)
    report.seconds = time.perf_counter() - begin
    return report


def _supervise(job: Job, loader: Loader, workers: int, report: Callable[[int, Progress], None]) -> None:
    """Keep ``workers`` processes at work until one has seen the output published; replace those that die."""
    context = multiprocessing.get_context("spawn")
    alive: dict[int, tuple[Any, Connection]] = {}
    deaths = 0

    def begin(worker: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker_main, args=(job, loader, worker, workers, theirs), daemon=True)
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
        work(job, loader, worker, workers, lambda part: connection.send(("progress", part)))
        connection.send(("done", None))
    except (InputError, UnavailableError) as error:
        connection.send(("error", (type(error), str(error))))
    except KeyboardInterrupt:
        os._exit(130)
    with suppress(OSError):
        connection.close()
