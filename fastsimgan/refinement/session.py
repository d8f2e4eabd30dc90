"""A run of refinement, opened: once in each process, and passed on from there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastsimgan.data.formats.image_codecs import JPEG_QUALITY, codecs
from fastsimgan.errors import InputError
from fastsimgan.refinement import tuning
from fastsimgan.refinement.job import SUFFIXES, Job, check, output_kind, refiner_sha256
from fastsimgan.refinement.records import from_json, named
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.run_opening import identity_on_record, open_run
from fastsimgan.refinement.sinks.base import Sink
from fastsimgan.refinement.sinks.open_sink import open_sink
from fastsimgan.refinement.sources.base import Source
from fastsimgan.refinement.tuning import Choice


@dataclass(frozen=True)
class Settings:
    """Every setting that decides about a byte; with the source's identity, what makes two runs the same one."""

    refiner_sha256: str = field(metadata=named("refiner sha256"))
    precision: str
    batch_size: int = field(metadata=named("batch size"))
    output_kind: str = field(metadata=named("output kind"))
    link: bool
    jpeg_quality: int = field(metadata=named("JPEG quality"))
    codecs: str
    device: str = field(default="cpu", metadata=named("device", optional=True))  # a CPU rounds otherwise than "cuda"
    pixels: int = field(default=tuning.PIXELS_PER_BATCH, metadata=named("pixels in a batch", optional=True))
    compiled: bool = field(default=False, metadata=named("compiled", optional=True))
    residual_block: str = field(default=tuning.RESIDUAL_BLOCK, metadata=named("residual block", optional=True))
    # with precision in 16 bits; versions that had float32 between R's blocks then do not say so
    features: str = field(default="float32", metadata=named("features", optional=True))


@dataclass(frozen=True)
class Session:
    """An opened run, all that its workers in this process share.

    Attributes:
        asked: the job as it was given; other processes open it for themselves.
        job: the same with nothing left open.
        choice: what was left open, as the run began with it.
        settings: every one that decides about a byte.
        run: the records and the output.
        source: what is read.
        sink: what is written.
    """

    asked: Job
    job: Job
    choice: Choice
    settings: Settings
    run: RunDirectory
    source: Source
    sink: Sink


def open_session(job: Job, *, joins: bool = False) -> Session:
    """Open a job's run: new, to be gone on with, or complete.

    Args:
        job: what to do.
        joins: whether another process of this start has looked already whether the input's files are as they were.

    Raises:
        InputError: as `check` and `open_run` do.
    """
    asked, job = job, as_begun(job)
    source = check(job)
    if _is_open(job):  # a new run
        settled = _settle(job, tuning.choose(job.device, job.refiner, _uniform(source), job.precision))
        source = source if settled.batch_size in (job.batch_size, tuning.BATCH_SIZE) else check(settled)
        job = settled
    choice = _choice(job)
    to = output_kind(job, source)
    settings = Settings(
        refiner_sha256=refiner_sha256(job.refiner),
        precision=job.precision,
        batch_size=choice.batch_size,
        output_kind=to,
        link=job.link,
        jpeg_quality=JPEG_QUALITY,
        codecs=codecs(),
        device="cuda" if tuning.on_cuda(job.device) else "cpu",
        pixels=choice.pixels,
        compiled=choice.compiled,
        residual_block=choice.residual_block,
        features="float32" if job.precision == "float32" else "16 bits",
    )
    try:
        run = open_run(job.output, settings, source, is_file=to in SUFFIXES)
    except InputError:
        if (begun := as_begun(asked)) in (asked, job):
            raise
        # another worker, which takes other batches by itself, began the run meanwhile
        return open_session(begun, joins=joins)
    if source.began_before and not joins:
        source.refuse_changes(run.state)
    return Session(asked, job, choice, settings, run, source, open_sink(run, source, to, link=job.link))


def as_begun(job: Job) -> Job:
    """``job`` with what it leaves open as the run at its output was begun; as it is where there is none yet."""
    if (record := identity_on_record(job.output)) is None:
        return job
    return _settle(job, from_json(Choice, record))


def _is_open(job: Job) -> bool:
    """Whether a job leaves open what a run is to know."""
    return None in (job.batch_size, job.pixels, job.compiled, job.residual_block)


def _settle(job: Job, choice: Choice) -> Job:
    """``job`` with what it leaves open as ``choice`` has it."""
    return replace(
        job,
        batch_size=choice.batch_size if job.batch_size is None else job.batch_size,
        pixels=choice.pixels if job.pixels is None else job.pixels,
        compiled=choice.compiled if job.compiled is None else job.compiled,
        residual_block=choice.residual_block if job.residual_block is None else job.residual_block,
    )


def _choice(job: Job) -> Choice:
    """What a settled job has taken."""
    assert job.batch_size is not None and job.pixels is not None
    assert job.compiled is not None and job.residual_block is not None
    return Choice(job.batch_size, job.pixels, job.compiled, job.residual_block)


def _uniform(source: Source) -> tuple[int, int, int] | None:
    """Count, height and width where all images are of one size and nothing is to be encoded; else None."""
    return None if source.array_file is None else (len(source.array_file.arrays), *source.array_file.size)
