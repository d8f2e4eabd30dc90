"""Refinement from disk to disk, beside the refiner alone and beside the obvious loop; images a second, stage table.

``python -m bench.bench_refine --refiner runs/mine`` (see ``--help``). The sides run in turn; medians are printed.
``--scale`` instead shows that memory stays flat over a million images, and how long resuming over ten million takes.
``--packed 1200000`` is what `make gpu PART=refine` runs: images a second in each precision, compiled and not, at the
batch that `refine` chooses; the share of the time that the device was busy, and its peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench import limits
from fastsimgan.data.formats.image_file import decode_image, encode_image
from fastsimgan.inference import load_refiner
from fastsimgan.inference.per_core import CoreRefiner
from fastsimgan.refine import print_stages
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.manifest import ManifestHeader, ManifestLine
from fastsimgan.refinement.report import Report
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.tuning import PIXELS_PER_BATCH, fitting

TIMES = 8  # as many packed images as files: they take a fraction of a second otherwise


class Identity:
    """A refiner that costs nothing."""

    channels = 1

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        return images


class Pictures(Dataset):
    """What the obvious script hands to a DataLoader."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(Image.open(self.paths[index]))


def make_sets(folder: Path, images: np.ndarray) -> dict[str, Path]:
    """The same images packed, several times over, and as files."""
    np.save(folder / "packed.npy", np.concatenate([images] * TIMES))
    sets = {"packed": folder / "packed.npy"}
    for name, suffix in (("PNG folder", "png"), ("JPEG folder", "jpg")):
        sets[name] = folder / suffix
        sets[name].mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(sets[name] / f"{i}.{suffix}")
    refine(Job(folder / "model", sets["PNG folder"], folder / "tar", to="shards"), loader=lambda *_: Identity())
    return sets | {"shards": folder / "tar"}


def spent() -> tuple[float, float]:
    """Wall-clock and CPU seconds so far, those of ended child processes included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in usage)


def compare(
    make: Callable[[], Any], make_loops: Callable[[], Any], title: str, count: int, looped: int, size: tuple[int, int],
    rounds: int,
) -> None:  # fmt: skip
    """Each side once in every round, in turn; a ratio is the median over the rounds of the ratio within one.

    make: loads the refiner; make_loops: that of the obvious loops, which run over the first ``looped`` images alone.
    What is written is removed at the end: ext4 makes new files slowly for some seconds after many were removed.
    """
    folder = Path(tempfile.mkdtemp())
    cores = len(os.sched_getaffinity(0))
    height, width = size
    try:
        (folder / "model").write_bytes(b"identity")
        images = np.random.default_rng(0).integers(0, 256, (count, height // 4, width // 4), dtype=np.uint8)
        images = np.stack([np.asarray(Image.fromarray(i).resize((width, height))) for i in images])
        sets = make_sets(folder, images)
        whole, split = make(), CoreRefiner(make, cores)
        other = make_loops() if looped else whole
        for each, batch in ((whole, 64), (split, 64), (other, 64), (other, 1)):
            each(images[:batch], batch)  # whatever is chosen or allocated at first use

        def one_call() -> None:
            whole(images, 64)

        def a_core_each() -> None:
            with split.shared(), ThreadPoolExecutor(cores) as pool:
                list(pool.map(lambda first: split(images[first : first + 64], 64), range(0, count, 64)))

        def loop(name: str) -> Callable[[], None]:
            def run() -> None:
                for path in sorted(sets[name].iterdir())[:looped]:
                    pixels = np.array(Image.open(path))
                    Image.fromarray(other(pixels[None], 1)[0]).save(folder / f"one{path.suffix}")

            return run

        def loader(name: str) -> Callable[[], None]:
            def run() -> None:
                paths = sorted(sets[name].iterdir())[:looped]
                for batch in DataLoader(Pictures(paths), batch_size=64, num_workers=cores):
                    for pixels in other(batch.numpy(), 64):
                        Image.fromarray(pixels).save(folder / f"one{paths[0].suffix}")

            return run

        def codec(name: str) -> Callable[[], None]:
            def run() -> None:
                again = Path(tempfile.mkdtemp(dir=folder))

                def one(path: Path) -> None:
                    (again / path.name).write_bytes(encode_image(decode_image(path.read_bytes(), path)))

                with ThreadPoolExecutor(cores) as pool:
                    list(pool.map(one, sorted(sets[name].iterdir())))

            return run

        def ours(name: str) -> Callable[[], None]:
            def run() -> None:
                output = Path(tempfile.mkdtemp(dir=folder)) / f"out{sets[name].suffix}"
                report = refine(Job(folder / "model", sets[name], output), loader=lambda *_: split)
                assert report.images == sides[name][1]
                tables[name] = report

            return run

        tables: dict[str, Report] = {}
        sides = {"refiner, one call": (one_call, count), "refiner, a core a batch": (a_core_each, count)}
        for name in ("PNG folder", "JPEG folder"):
            sides[f"codec alone, {name}"] = codec(name), count
            if looped:
                sides[f"loop of 1, {name}"] = loop(name), looped
        if looped:
            sides["DataLoader of 64, PNG folder"] = loader("PNG folder"), looped
        sides |= {name: (ours(name), count * (TIMES if name == "packed" else 1)) for name in sets}
        wall: dict[str, list[float]] = {name: [] for name in sides}  # seconds an image
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):  # the first is not counted
            for name, (run, images_in) in sides.items():
                before = spent()
                run()
                after = spent()
                if number:
                    wall[name].append((after[0] - before[0]) / images_in)
                    cpu[name].append((after[1] - before[1]) / images_in)
        print(f"{count} images {height}x{width}, {rounds} rounds in turn, {cores} core(s), {title}")
        print(f"{'':28} {'images/s, lowest to highest':>32} {'CPU ms/image':>24}")
        for name in sides:
            print(f"{name:28} {spread([1 / each for each in wall[name]])} {spread([1e3 * each for each in cpu[name]])}")
        for way in ("one call", "a core a batch"):
            print(f"packed: {percent(wall[f'refiner, {way}'], wall['packed'])} of the refiner alone, {way}")
        for name in ("PNG folder", "JPEG folder"):
            codec_wall, codec_cpu = wall[f"codec alone, {name}"], cpu[f"codec alone, {name}"]
            for way in ("one call", "a core a batch"):
                slower = list(map(max, wall[f"refiner, {way}"], codec_wall))
                print(f"{name}: {percent(slower, wall[name])} of the slower of refiner ({way}) and codec alone")
            both = [sum(pair) for pair in zip(cpu["refiner, a core a batch"], codec_cpu, strict=True)]
            print(f"{'':12}{percent(both, cpu[name])} of the CPU-seconds of both, one after the other")
            if looped:
                once = f"loop of 1, {name}"
                print(f"{'':12}{spread(ratios(wall[once], wall[name]))} times the loop of 1; by CPU-seconds")
                print(f"{'':12}{spread(ratios(cpu[once], cpu[name]))}")
        for name, report in tables.items():
            print(name)
            print_stages(report)
    finally:
        shutil.rmtree(folder)


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def percent(slow: list[float], fast: list[float]) -> str:
    low, middle, high = (f"{each:.1%}" for each in three(ratios(slow, fast)))
    return f"{middle} ({low} to {high})"


def spread(values: list[float]) -> str:
    low, middle, high = three(values)
    return f"{middle:10.2f} ({low:9.2f} to {high:9.2f})"


def three(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def packed(count: int, device: str, precisions: list[str], compiled: list[str]) -> None:
    """``count`` packed 35x55 images disk to disk through a gaze refiner of random weights, in each way in turn.

    Where nothing is to be measured (`limits.SMALL`), small ones through a small refiner.
    """
    import torch

    from fastsimgan.config import TrainConfig
    from fastsimgan.errors import FastSimGANError
    from fastsimgan.inference import save_refiner
    from fastsimgan.models.refiner import RefinerNetwork

    folder = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        network, size = (
            (RefinerNetwork(1, hidden_channels=20, blocks=1), (8, 9)) if limits.SMALL else (RefinerNetwork(1), (35, 55))
        )
        save_refiner(folder / "refiner.safetensors", network, histogram="keep", training=TrainConfig())
        rng = np.random.default_rng(0)
        rows = np.lib.format.open_memmap(folder / "in.npy", "w+", np.uint8, (count, *size))
        for first in range(0, count, 10_000):
            rows[first : first + 10_000] = rng.integers(0, 256, rows[first : first + 10_000].shape, dtype=np.uint8)
        del rows
        for precision, compiling in product(precisions, compiled):
            output = folder / f"{precision}-{compiling}.npy"
            job = Job(
                folder / "refiner.safetensors", folder / "in.npy", output, device=device, precision=precision,
                compiled={"auto": None, "on": True, "off": False}[compiling],
            )  # fmt: skip
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                report = refine(job)
            except FastSimGANError as error:  # said, not hidden: a precision that the device lacks, no triton
                print(f"left out: {precision}, compile {compiling}: {error}")
                continue
            begun = open_session(job).run.identity
            pixels = begun.get("pixels in a batch", PIXELS_PER_BATCH)
            lines = [
                f"{report.images} images by {', '.join(report.backends)}, "
                f"{fitting(begun['batch size'], pixels, *size)} at a time, in {report.seconds:.1f} s, "
                f"{report.images / report.working:.0f} images/s once loaded"
            ]
            print(lines[0])
            print_stages(report)
            limits.keep(
                f"refine {precision} compile {compiling}", lines, images=report.images, seconds=report.seconds,
                working=report.working, busy=report.busy, peak_bytes=report.peak_bytes,
            )  # fmt: skip
            output.unlink()
            shutil.rmtree(folder / f"{output.name}.fastsimgan")
    finally:
        shutil.rmtree(folder)


def scale(count: int, entries: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "model").write_bytes(b"identity")
        rows = np.lib.format.open_memmap(folder / "in.npy", "w+", np.uint8, (count, 35, 55))
        for first in range(0, count, 10_000):
            rows[first : first + 10_000] = first // 10_000 % 251
        del rows
        memory: list[tuple[float, float, int]] = []
        begin = time.perf_counter()

        def own() -> float:
            """Resident megabytes, those of mapped files apart."""
            _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
            return (pages - shared) * resource.getpagesize() / 1e6

        def look(_: object) -> None:
            if not memory or time.perf_counter() - begin - memory[-1][0] > 1:
                memory.append((time.perf_counter() - begin, own(), len(os.listdir("/proc/self/fd"))))

        report = refine(
            Job(folder / "model", folder / "in.npy", folder / "out.npy"), loader=lambda *_: Identity(), progress=look
        )
        equal = np.array_equal(np.load(folder / "in.npy", "r")[::997], np.load(folder / "out.npy", "r")[::997])
        print(
            f"{report.images} images in {report.seconds:.1f} s, {report.images / report.seconds:.0f} images/s, "
            f"equal: {equal}"
        )
        print_stages(report)
        for at, size, files in memory[:: max(1, len(memory) // 8)] + memory[-1:]:
            print(f"  after {at:6.1f} s: {size:7.1f} MB of its own, {files} files open")

        (folder / "many").mkdir()
        Image.new("L", (8, 8)).save(folder / "many" / "0.png")
        job = Job(folder / "model", folder / "many", folder / "done")
        run = open_session(job).run  # then give it the records of a much larger folder, all but one block of them done
        number = -(-entries // unit_parts.SAMPLES_PER_UNIT)
        state = run.state
        listing = json.loads((state / "listing.json").read_bytes())
        offsets, digest = [0], hashlib.sha256()
        with (state / "listing.jsonl").open("wb") as file:
            for block in range(number):
                names = range(
                    block * unit_parts.SAMPLES_PER_UNIT, min(entries, (block + 1) * unit_parts.SAMPLES_PER_UNIT)
                )
                data = b"".join(b'["folder/%09d.png", "folder/%09d.json"]\n' % (i, i) for i in names)
                file.write(data)
                digest.update(data)
                offsets.append(offsets[-1] + len(data))
        listing |= {"offsets": offsets, "images": entries, "sha256": digest.hexdigest()}
        (state / "listing.json").write_text(json.dumps(listing))
        record = json.loads((state / "run.json").read_bytes())
        record["identity"]["listing sha256"] = digest.hexdigest()
        (state / "run.json").write_text(json.dumps(record))
        for block in range(number - 1):
            lines = (
                ManifestLine(f"folder/{block:04d}{i:05d}.png", sha256="0" * 64, source_sha256="0" * 64)
                for i in range(unit_parts.SAMPLES_PER_UNIT)
            )
            run.commit(ManifestHeader(block, unit_parts.SAMPLES_PER_UNIT, failed=0, others=0, change=0.0), lines)
        size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
        del run
        begin = time.perf_counter()
        run = open_session(job, joins=True).run  # the files are not there, and whoever joins does not look at each
        left = set(range(run.work_units)) - run.committed()
        listed = time.perf_counter() - begin
        totals = run.totals()
        print(
            f"resuming over {entries} entries ({size / 1e9:.2f} GB of records): what is left is known after "
            f"{listed:.2f} s ({len(left)} block), totals after {time.perf_counter() - begin:.2f} s "
            f"({totals.counts.images} images), {own():.0f} MB of its own"
        )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_refine", description=__doc__)
    parser.add_argument("--refiner", type=Path, help="a run, a refiner's file or an exported one")
    parser.add_argument("--precision", default="float32", help="of --refiner, where PyTorch runs it")
    parser.add_argument("--loop-refiner", type=Path, help="of the obvious loops, if another (in float32)")
    parser.add_argument("--loops", type=int, default=256, help="images of the obvious loops; 0: none of them")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=(35, 55), help="height and width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed", type=int, metavar="N", help="N packed 35x55 images, random gaze refiner")
    parser.add_argument("--device", default="auto", help="of --packed")
    parser.add_argument("--precisions", nargs="+", help="of --packed; by default all of the device's")
    parser.add_argument("--compile", nargs="+", help="of --packed: auto, on, off; by default off, and on CUDA on too")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--images", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.scale:
        scale(given.images, given.entries)
    elif given.packed is not None:
        from fastsimgan.hardware.device import choose_device

        on_cuda = choose_device(given.device).type == "cuda"
        ours = ["float32", "float16", "bfloat16"] if on_cuda else ["float32"]
        packed(given.packed, given.device, given.precisions or ours, given.compile or ["off", "on"][: 1 + on_cuda])
    elif given.refiner is None:
        parser.error("--refiner must be given")
    else:
        make = partial(load_refiner, given.refiner, precision=given.precision)
        loops = partial(load_refiner, given.loop_refiner or given.refiner)
        title = f"refiner {given.refiner.name}, {make().backend.name}"
        compare(make, loops, title, given.count, min(given.loops, given.count), given.size, given.rounds)


if __name__ == "__main__":
    main()
