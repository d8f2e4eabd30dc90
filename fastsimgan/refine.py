"""``python -m fastsimgan.refine``: every image of a dataset through a refiner, labels untouched."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastsimgan import cli
from fastsimgan.errors import BAD_SHARE, InputError

if TYPE_CHECKING:
    from fastsimgan.refinement.job import Job
    from fastsimgan.refinement.report import Progress, Report
    from fastsimgan.refinement.run import Supervisor
    from fastsimgan.refinement.session import Session

DESCRIPTION = """Refine every image of a dataset: a folder (PNG, JPEG, TIFF; 8, 16 bits or float32; any colour),
WebDataset .tar shards, an .npz, .npy or HDF5 file. Pictures that seem to be labels (masks, depth maps) among the
images are refused before anything is written, until --images tells which files are images.

The output has the same names, sizes, bit depths and order. Everything else (sidecars, other files, other arrays) is
copied byte for byte. PNG, TIFF and arrays are written without loss; JPEG is written as JPEG of quality 95. Nothing is
ever overwritten, and the output appears whole, at the end: until then it is OUTPUT.partial. Killed at any moment, the
same command goes on where it was, and ends with the same bytes."""


@dataclass(frozen=True)
class RefineConfig:
    refiner: Path | None = None
    """Folder of a training run, its refiner.safetensors, or what `export` made of it (.onnx, .engine)."""
    trust_engine: bool = False
    """Run a TensorRT engine that `export --engine` did not build here, such as trtexec's; it can hold code."""
    input: Path | None = None
    """Folder of images, .tar shard (or a quoted glob, or a folder of them), .npz with `images`, .npy or HDF5 file."""
    output: Path | None = None
    """What to make: a folder or a file, as the input is or --to says."""
    verify: Path | None = None
    """Alone: read this finished output again and check it against its manifests."""
    to: Literal["same", "folder", "shards", "npz", "hdf5"] = "same"
    """Whatever the input is, write a folder of files, WebDataset shards or, where all images have one size, one .npz
    or HDF5 file."""
    images: str | None = None
    """Glob of the files that are images ('rgb/*.png'); all others travel as labels. '*': all that have an image's
    suffix."""
    key: str | None = None
    """Name of the array, dataset or group that holds the images, where it is not `images` and there are others."""
    follow_links: bool = False
    """Follow links in a folder wherever they lead; without it, only those to files in the same folder."""
    link: bool = False
    """Hard-link the labels instead of copying them."""
    batch_size: int | None = None
    """Images refined at a time, fewer where they are large. By itself: 64; on CUDA what the GPU can use, 1024 at most.
    A run keeps what it began with."""
    compile: Literal["auto", "on", "off"] = "auto"
    """On CUDA, run a run's refiner through torch.compile, which takes half a minute; auto: for packed images, from a
    minute or two of work on. A run keeps what it began with."""
    workers: int = 1
    """Processes on this machine; they share the cores, or the CUDA devices, out among them."""
    engine: Literal["local", "ray"] = "local"
    """`ray`: the workers are tasks of a Ray cluster, whose machines share the disk."""
    address: str | None = None
    """The Ray cluster's; `auto`: the one this machine belongs to. Without it a new one, of this machine alone."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """In which the inner layers of a run's refiner multiply: float16 is for CUDA, bfloat16 for GPUs and CPUs that
    compute in it; on CPUs it is several times faster and one pixel in six a grey level off. An exported file has its
    own."""
    on_error: Literal["fail", "skip"] = "fail"
    """At an image that cannot be read: stop, or leave it and its sidecars out and say so."""


def refine(config: RefineConfig) -> int:
    """Check the input and output first: they are quick to check, and loading torch is not."""
    if config.verify is not None:
        return _verify(config)
    for name in ("refiner", "input", "output"):
        if getattr(config, name) is None:
            raise InputError(f"{name} must be given: --{name} PATH")
    if config.workers < 1:
        raise InputError(f"workers must be at least 1, got {config.workers}")
    if config.address is not None and config.engine != "ray":
        raise InputError(f"address must be given with --engine ray only, got {config.address}")

    from fastsimgan.refinement.session import open_session
    from fastsimgan.storage.names import printable

    session = open_session(_job(config))
    cli.LOG.info(session.source.describe())
    packs = config.to in ("npz", "hdf5") and session.source.kind in ("folder", "shards")
    if packs:
        cli.LOG.info(
            "not kept in a packed file: what image files carry beside their pixels (EXIF, colour profiles, text)"
        )
    if session.run.complete:
        counts = session.run.totals().counts
        print(f"{printable(session.run.output)}: complete already, {counts.images} images, {counts.failed} skipped")
        return _judge(counts.images, counts.failed)
    report = _run(session, config)
    _print_report(session, report)
    if packs:
        from fastsimgan.data.formats.open_images import open_arrays

        arrays = [name for name in open_arrays(session.run.output).label_names if name != "name"]
        cli.LOG.info(f"labels that became arrays: {', '.join(map(printable, arrays)) or 'none'}")
    return _judge(report.images, report.failed)


def _verify(config: RefineConfig) -> int:
    from fastsimgan.storage.names import printable

    assert config.verify is not None
    if config.refiner or config.input or config.output:
        raise InputError("verify must be given alone, got --refiner, --input or --output too")
    from fastsimgan.refinement.records import to_json
    from fastsimgan.refinement.verification import verify

    found = to_json(verify(config.verify))
    print(f"{printable(config.verify)}: verified, {', '.join(f'{value} {key}' for key, value in found.items())}")
    return 0


def _job(config: RefineConfig) -> Job:
    from fastsimgan.refinement.job import Job

    assert config.refiner is not None and config.input is not None and config.output is not None
    return Job(
        refiner=config.refiner,
        input=config.input,
        output=config.output,
        batch_size=config.batch_size,
        compiled={"auto": None, "on": True, "off": False}[config.compile],
        device=config.device,
        precision=config.precision,
        on_error=config.on_error,
        images=config.images,
        to=config.to,
        link=config.link,
        trust_engine=config.trust_engine,
        key=config.key,
        follow_links=config.follow_links,
    )


def _run(session: Session, config: RefineConfig) -> Report:
    """Do the run, and show how far it is."""
    from tqdm import tqdm

    from fastsimgan.refinement.run import refine_session

    done = len(session.run.committed())
    if done:
        cli.LOG.info(f"going on: {done} of {session.run.work_units} blocks are committed")
    with tqdm(unit=" images", disable=cli.quiet()) as bar:

        def progress(part: Progress) -> None:
            nonlocal done
            done += part.work_units
            bar.set_postfix_str(f"{done}/{session.run.work_units} blocks", refresh=False)
            bar.update(part.images)

        supervise: Supervisor | None = None
        if config.engine == "ray":
            from fastsimgan.refinement import ray_workers

            supervise = partial(ray_workers.supervise, address=config.address)
        return refine_session(session, workers=config.workers, progress=progress, supervise=supervise)


def _print_report(session: Session, report: Report) -> None:
    from fastsimgan.storage.names import printable

    for _, reason in session.run.failures():
        print(f"skipped {reason}", file=sys.stderr)
    print_stages(report)
    by = f"by {', '.join(sorted(report.backends))}; " if report.backends else ""
    print(
        f"{printable(session.run.output)}: {report.images} images ({report.failed} skipped), {report.others} other "
        f"files; {report.now} in {report.seconds:.1f} s, {_rate(report.now / (report.working or report.seconds))} "
        f"images/s once loaded, {by}mean |R(x) - x| {report.mean_change:.2f} grey levels of 255, "
        f"refiner sha256 {session.settings.refiner_sha256}"
    )


def _rate(rate: float) -> str:
    """Images a second; large pictures take seconds each."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def print_stages(report: Report) -> None:
    """Each stage's share of its threads' time, and which is the limit."""
    shares = {
        stage: report.busy.get(stage, 0.0) / report.working / threads for stage, threads in report.threads.items()
    }
    for stage, share in shares.items():
        limit = "  <- the limit" if share == max(shares.values()) else ""
        cli.LOG.info(f"  {stage:14} {report.threads[stage]:3} threads, busy {share:6.1%}{limit}")
    if report.peak_bytes:
        cli.LOG.info(f"  device memory: {report.peak_bytes / 1e9:.2f} GB at most, of the worker that took most")


def _judge(images: int, failed: int) -> int:
    """The exit code: 1 if too many images were left out."""
    if failed > BAD_SHARE * (images + failed):
        print(
            f"error: at most {BAD_SHARE:.0%} of the images may be bad, got {failed} of {images + failed}; "
            "the output holds the others",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(refine, RefineConfig, prog="python -m fastsimgan.refine", description=DESCRIPTION, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
