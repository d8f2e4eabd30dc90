"""Offline refinement: read, decode, refine, encode, commit. Holds no mathematics and imports no torch.

Decoding runs ahead of the refiner and encoding behind it, in threads; the refiner runs in the calling thread. At any
time a folder has about six batches of images in memory, however many it holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from tqdm import tqdm

from fastsimgan.data.arrays import ArrayImages, check_range
from fastsimgan.data.files import copy_file, printable, refuse_existing, staged
from fastsimgan.data.folder import FolderImages
from fastsimgan.data.images import StoredImage, read_image, write_image
from fastsimgan.data.source import ImageSource
from fastsimgan.data.threads import in_threads
from fastsimgan.data.values import WHITE
from fastsimgan.errors import InputError

#: What `datasets.load_dataset("imagefolder")` takes for metadata. If the input has one, ours would contradict it.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class ImageRefiner(Protocol):
    """What the pipeline asks of a refiner: `fastsimgan.runtime.Refiner`, or anything that looks like it."""

    channels: int  # of the images it takes

    def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16 or float32 in [0, 1] -> the same shape and type."""


@dataclass
class Report:
    """What one call of `refine_source` did."""

    images: int = 0  # refined and written
    skipped: list[str] = field(default_factory=list)  # ``FILE: REASON`` of each image left out
    seconds: float = 0.0
    total_change: float = 0.0

    @property
    def mean_change(self) -> float:
        """Mean of |R(x) - x| over pixels and images, in grey levels of 255 (whatever the bit depth)."""
        return self.total_change / max(1, self.images)


def refine_source(
    source: ImageSource,
    refiner: ImageRefiner,
    output: Path,
    *,
    batch_size: int = 64,
    on_error: Literal["fail", "skip"] = "fail",
    progress: bool = False,
) -> Report:
    """Refine every image of ``source`` into ``output``: the same kind, names, sizes, bit depth and order.

    A folder's other files, and an ``.npz``'s other arrays, are copied byte for byte. A folder gets a ``metadata.jsonl``
    (one line ``{"file_name": ...}`` an image) unless it has metadata already. ``output`` appears whole, at the end.

    Args:
        source: what `open_images` returned.
        refiner: any `ImageRefiner`. It sees batches of images of one size and type.
        output: must not exist; an ``.npz``, ``.npy`` or folder, as the source is.
        batch_size: images refined at a time, at least 1.
        on_error: at an image of a folder that cannot be read, or that has other channels than the refiner: "fail", or
            "skip" it with its sidecars and list it in the report.
        progress: show count, rate and time left on standard error.

    Raises InputError, with nothing left at ``output``, if a rule above is broken, an image is bad (with "skip": if
    every image is), or ``output`` cannot be written.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    check_output(source, output)
    report = Report()
    started = time.perf_counter()
    with staged(output) as partial, tqdm(total=len(source), unit=" images", disable=not progress) as bar:
        if isinstance(source, FolderImages):
            _refine_folder(source, refiner, partial, batch_size, on_error, report, bar)
        else:
            _refine_arrays(source, refiner, partial, batch_size, report, bar)
    report.seconds = time.perf_counter() - started
    return report


def check_output(source: ImageSource, output: Path) -> None:
    """Raise InputError if ``output`` exists, overlaps the source, or is named as another kind than the source's."""
    old, new = source.path.resolve(), output.resolve()
    if old == new:
        raise InputError(f"{printable(output)}: output must not be the input")
    if new.is_relative_to(old):
        raise InputError(f"{printable(output)}: output must not be inside the input {printable(source.path)}")
    if old.is_relative_to(new):
        raise InputError(f"{printable(output)}: output must not contain the input {printable(source.path)}")
    refuse_existing(output)
    suffix = output.suffix.lower()
    if isinstance(source, FolderImages):
        if suffix in (".npz", ".npy"):
            raise InputError(f"{printable(output)}: output must be a folder, as the input is, got the suffix {suffix}")
    else:
        wanted = ".npz" if source.archive else ".npy"
        if suffix != wanted:
            raise InputError(f"{printable(output)}: output must end in {wanted}, as the input is one, got {suffix!r}")


def _refine_arrays(
    source: ArrayImages, refiner: ImageRefiner, partial: Path, batch_size: int, report: Report, bar: tqdm
) -> None:
    if source.shape[0] != refiner.channels:
        raise InputError(
            f"{printable(source.path)}: images must have {refiner.channels} channel(s), as the refiner has, "
            f"got {source.shape[0]}"
        )
    images = source.stored_images()

    def pieces() -> Iterator[np.ndarray]:
        for first in range(0, len(source), batch_size):
            piece = images[first : first + batch_size].astype(source.dtype)
            check_range(piece, source.path, first)
            yield _refine(refiner, piece, report)
            bar.update(len(piece))

    source.write_again(partial, pieces())


def _refine_folder(
    source: FolderImages,
    refiner: ImageRefiner,
    partial: Path,
    batch_size: int,
    on_error: str,
    report: Report,
    bar: tqdm,
) -> None:
    if on_error == "fail":  # at once, and not hours later, for all that the headers tell
        for header in source.headers:
            if isinstance(header, InputError):
                raise header
    for folder in sorted({name.parent for name in (*source.images, *source.others)}):
        (partial / folder).mkdir(parents=True, exist_ok=True)

    def decode(name: Path) -> tuple[Path, StoredImage | InputError]:
        try:
            image = read_image(source.path / name)
            channels = image.pixels.shape[2] if image.pixels.ndim == 3 else 1
            if channels != refiner.channels:
                raise InputError(
                    f"{printable(source.path / name)}: must have {refiner.channels} channel(s), as the refiner has, "
                    f"got {channels}"
                )
            return name, image
        except InputError as error:
            return name, error

    skipped: set[Path] = set()

    def readable() -> Iterator[tuple[Path, StoredImage]]:
        for name, image in in_threads(decode, source.images, ahead=batch_size):
            if isinstance(image, StoredImage):
                yield name, image
            elif on_error == "fail":
                raise image
            else:
                skipped.add(name)
                report.skipped.append(str(image))
                bar.update()

    def refined() -> Iterator[tuple[Path, StoredImage]]:
        for batch in _batches(readable(), batch_size):
            pixels = _refine(refiner, np.stack([image.pixels for _, image in batch]), report)
            for (name, image), new in zip(batch, pixels, strict=True):
                yield name, replace(image, pixels=new)

    def encode(item: tuple[Path, StoredImage]) -> None:
        name, image = item
        write_image(partial / name, image)

    for _ in in_threads(encode, refined(), ahead=batch_size):
        bar.update()
    if len(skipped) == len(source):
        raise InputError(f"{printable(source.path)}: at least one image must be readable, got 0: {report.skipped[0]}")

    for name in source.others:
        if source.owner(name) not in skipped:
            copy_file(source.path / name, partial / name)
    if not any(name.name in METADATA for name in source.others):
        lines = [json.dumps({"file_name": name.as_posix()}) + "\n" for name in source.images if name not in skipped]
        (partial / METADATA[0]).write_text("".join(lines), encoding="ascii")


def _batches(images: Iterable[tuple[Path, StoredImage]], batch_size: int) -> Iterator[list[tuple[Path, StoredImage]]]:
    """Group images of one shape and type into full batches, wherever they stand; at most two batches' worth wait."""
    waiting: dict[tuple[tuple[int, ...], str], list[tuple[Path, StoredImage]]] = {}
    count = 0
    for item in images:
        kind = item[1].header.shape, item[1].header.dtype
        waiting.setdefault(kind, []).append(item)
        count += 1
        if len(waiting[kind]) < batch_size:
            if count < 2 * batch_size:
                continue
            kind = max(waiting, key=lambda each: len(waiting[each]))
        count -= len(waiting[kind])
        yield waiting.pop(kind)
    yield from waiting.values()


def _refine(refiner: ImageRefiner, images: np.ndarray, report: Report) -> np.ndarray:
    """One batch of stored images through the refiner; adds to the report's counts."""
    refined = refiner(images, len(images))
    if refined.shape != images.shape or refined.dtype != images.dtype:
        raise TypeError(
            f"refiner must return {images.dtype}{list(images.shape)}, got {refined.dtype}{list(refined.shape)}"
        )
    change = np.abs(refined.astype(np.float32) - images)
    report.images += len(images)
    report.total_change += float(change.mean(dtype=np.float64)) * len(images) * 255 / WHITE[images.dtype.name]
    return refined
