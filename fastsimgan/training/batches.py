"""Both sets of training images, and mini-batches out of them: resident on the device, or read ahead from the host."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.data.equalisation import non_uniformity
from fastsimgan.data.preprocess import equalised, prepare
from fastsimgan.data.ragged import CentreCrops, Images, RaggedImages, Size, channels_of, crop_of
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import available_memory
from fastsimgan.training.crops import Crop, choose_crop

_EQUALISED = 0.06  # below this `non_uniformity`, images are taken for equalised
_LOOKED_AT = 500  # images of each set that this is judged by
_AHEAD = 1 << 28  # bytes that are gathered at a time, at most


class ResidentImages:
    """Images kept on the device as they are stored; a batch is drawn and gathered there.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``.
        sampler: on ``device``.
        device: where.
    """

    def __init__(self, images: NDArray[Any], sampler: Sampler, device: torch.device) -> None:
        if isinstance(images, np.memmap) or not images.flags.writeable:
            images = np.array(images)  # torch wants memory that it may write to
        self._stored = _planes(torch.from_numpy(images)).contiguous().to(device)
        self.sampler = sampler

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]``, as stored."""
        # not `[...]`: on CUDA that knows no uint16
        return self._stored.index_select(0, self.sampler.draw(count))


class ResidentCrops:
    """Images of any sizes, packed on the device as they are stored; random crops of one size are gathered there.

    Args:
        images: the set.
        sampler: on ``device``.
        device: where.
        size: (height, width) of the crops, at most each image's.
    """

    def __init__(self, images: RaggedImages, sampler: Sampler, device: torch.device, size: Size) -> None:
        pixels = images.flat.reshape(-1, images.channels)
        if isinstance(pixels, np.memmap) or not pixels.flags.writeable:
            pixels = np.array(pixels)
        self._pixels = torch.from_numpy(pixels).to(device)
        # of each image: its first pixel, its width, and how many rows and columns a crop may begin at
        table = np.column_stack([images.starts // images.channels, images.sizes[:, 1], images.sizes - size + 1])
        self._table = torch.from_numpy(table).to(device)
        self._rows = torch.arange(size[0], device=device)[:, None]
        self._columns = torch.arange(size[1], device=device)
        self._size = size
        self.sampler = sampler

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, h, w]``, as stored."""
        indices, positions = self.sampler.draw_at(count)
        first, width, rows, columns = self._table.index_select(0, indices).unbind(1)
        top, left = self.sampler.corners(positions, rows, columns)
        corner, width = (values.view(-1, 1, 1) for values in (first + top * width + left, width))
        places = corner + self._rows * width + self._columns  # [count, h, w]
        crops = self._pixels.index_select(0, places.view(-1))
        return crops.view(count, *self._size, -1).permute(0, 3, 1, 2)


class HostImages:
    """Images that stay in host memory or in a memory-mapped file; a thread gathers the next ones meanwhile.

    What is gathered goes through pinned memory to a CUDA device while that computes.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``, perhaps a ``numpy.memmap``, or of any sizes.
        sampler: on the CPU; it is read ahead of what has been drawn.
        device: where the batches go.
        ahead: images gathered at a time.
        size: (height, width) of the random crops that are gathered, if images are of any sizes.
    """

    def __init__(
        self, images: Images, sampler: Sampler, device: torch.device, ahead: int, size: Size | None = None
    ) -> None:
        self._images, self._device, self._ahead, self._size = images, device, ahead, size
        self._reader = sampler
        #: says how far *drawing* has come; setting it starts reading anew from there
        self.sampler = _Consumed(sampler, self._forget)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._coming: Future[Tensor] | None = None
        self._ready = torch.empty(0)

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]``, as stored."""
        parts, missing = [], count
        while missing:
            if not len(self._ready):
                chunk = self._coming or self._thread.submit(self._gather)
                self._ready = _planes(chunk.result().to(self._device, non_blocking=True))
                self._coming = self._thread.submit(self._gather)
            parts.append(self._ready[:missing])
            self._ready = self._ready[missing:]
            missing -= len(parts[-1])
        self.sampler.drawn(count)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _gather(self) -> Tensor:
        indices, positions = self._reader.draw_at(self._ahead)
        images, pin = self._images, self._device.type == "cuda"
        dtype = getattr(torch, images.dtype.name)
        if not isinstance(images, RaggedImages):
            chunk = torch.empty((len(indices), *images.shape[1:]), dtype=dtype, pin_memory=pin)
            np.take(images, indices.numpy(), axis=0, out=chunk.numpy())
            return chunk
        assert self._size is not None
        chosen = indices.tolist()
        rows, columns = torch.from_numpy(images.sizes[chosen] - self._size + 1).unbind(1)
        tops, lefts = (found.tolist() for found in self._reader.corners(positions, rows, columns))
        chunk = torch.empty((len(indices), *self._size, images.channels), dtype=dtype, pin_memory=pin)
        planes = chunk.numpy()
        for to, (of, top, left) in enumerate(zip(chosen, tops, lefts, strict=True)):
            planes[to] = crop_of(images[of], (top, left), self._size).reshape(planes.shape[1:])
        return chunk

    def _forget(self) -> None:
        if self._coming is not None:
            self._coming.result()
        self._coming, self._ready = None, torch.empty(0)


class _Consumed:
    """The position of a sampler that something else reads ahead of."""

    def __init__(self, reader: Sampler, forget: Callable[[], None]) -> None:
        self._reader, self._forget = reader, forget
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def attempt(self) -> int:
        return self._reader.attempt

    def drawn(self, count: int) -> None:
        self._position += count * self._reader.ranks

    def restart(self, position: int, attempt: int) -> None:
        self._forget()
        self._reader.restart(position, attempt)
        self._position = position

    def indices(self, start: int, stop: int) -> list[int]:
        return self._reader.indices(start, stop)


Pool = ResidentImages | ResidentCrops | HostImages


@dataclass
class Pools:
    """Synthetic and real images as the networks want them: ``[n, C, H, W]`` in [-1, 1] on the device.

    Made by `open_pools`. Attributes: ``image_shape`` (C, H, W); ``crop``, that (H, W), of the images or of the random
    crops of them; ``crop_chosen``, whether it was chosen by the memory there is; ``arrays``, both sets in one size: as
    given, or the middle of each image; ``histogram``, "keep" or "equalise", what R is to do with images;
    ``drawn_histogram``, what is still to be done with those of ``arrays`` and those drawn (crops come from images that
    were equalised whole); ``resident``, whether drawing needs nothing from the host; ``hashes``, sha256 of each set.
    """

    synthetic: Pool
    real: Pool
    arrays: dict[str, NDArray[Any] | CentreCrops]
    histogram: str
    drawn_histogram: str
    device: torch.device
    hashes: dict[str, str]
    crop: Size
    crop_chosen: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = _planes(torch.from_numpy(np.array(self.arrays["real"][:1]))).shape[1:]
        return channels, height, width

    @property
    def resident(self) -> bool:
        return not isinstance(self.synthetic, HostImages) and not isinstance(self.real, HostImages)

    def draw_synthetic(self, count: int) -> Tensor:
        return prepare(self.synthetic.draw(count), self.drawn_histogram)

    def draw_real(self, count: int) -> Tensor:
        return prepare(self.real.draw(count), "keep")

    def some(self, name: str, count: int) -> Tensor:
        """``count`` images spread evenly over a set ("synthetic" or "real"), as stored; always the same.

        Of images of several sizes, or larger than the crops, it is the middle, and no more than fit `_AHEAD`.
        """
        array = self.arrays[name]
        if isinstance(array, CentreCrops):
            count = min(count, max(1, _AHEAD // (4 * math.prod(array.shape[1:]))))
        spread = np.linspace(0, len(array) - 1, min(count, len(array))).astype(np.int64)
        return self.stored(array[spread])

    def stored(self, images: NDArray[Any]) -> Tensor:
        """An array ``[n, H, W]`` or ``[n, H, W, C]`` as ``[n, C, H, W]`` on the device."""
        return _planes(torch.from_numpy(images)).to(self.device)

    def positions(self) -> dict[str, int]:
        """How far each set has been drawn."""
        return {"synthetic": self.synthetic.sampler.position, "real": self.real.sampler.position}

    def restart(self, positions: dict[str, int], attempt: int) -> None:
        """Go on from `positions` in the order number ``attempt``."""
        self.synthetic.sampler.restart(positions["synthetic"], attempt)
        self.real.sampler.restart(positions["real"], attempt)

    def reserve(self, counts: dict[str, int]) -> None:
        """Have the indices of the next ``counts`` images of each set on the device, for a CUDA graph to draw."""
        for name, count in counts.items():
            self._resident(name).reserve(count)

    def drawn_by_a_graph(self, images: dict[str, int]) -> None:
        """Follow a CUDA graph's replay, which moved the cursors on the device."""
        for name, count in images.items():
            self._resident(name).drawn_by_a_graph(count)

    def cursors(self) -> dict[str, int]:
        """Where the device is in drawing each set; see `Sampler.cursor`. Waits for it."""
        return {name: self._resident(name).cursor() for name in ("synthetic", "real")}

    def addresses(self) -> tuple[int, ...]:
        """Of what a CUDA graph that draws reads; see `Sampler.addresses`."""
        return self._resident("synthetic").addresses() + self._resident("real").addresses()

    def _resident(self, name: str) -> Sampler:
        pool = getattr(self, name)
        assert isinstance(pool, ResidentImages | ResidentCrops)
        return pool.sampler

    def drawn_between(self, before: dict[str, int], after: dict[str, int]) -> dict[str, list[int]]:
        """Indices of the images drawn from one of `positions` to another, by all ranks."""
        return {name: getattr(self, name).sampler.indices(start, after[name]) for name, start in before.items()}


def open_pools(
    synthetic: Images,
    real: Images,
    config: TrainConfig,
    device: torch.device,
    say: Callable[[str], None],
    *,
    rank: int = 0,
    ranks: int = 1,
    least_of_all: Callable[[int], int] = int,
) -> Pools:
    """Check both sets, choose where they live, and say why.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, or of any sizes; uint8, uint16, or float32 in [0, 1]; same
            channels.
        config: its ``seed``, ``batch_size``, ``histogram``, ``data``, ``crop`` and what decides about memory.
        device: of the batches.
        say: called with each line meant for a person.
        rank, ranks: see `Sampler`.
        least_of_all: gives the smallest of the ranks' values to each of them.

    Raises:
        InputError: images break a rule.
    """
    sets = {"synthetic": synthetic, "real": real}
    for name, images in sets.items():
        shaped = isinstance(images, RaggedImages) or images.ndim in (3, 4)
        if not shaped or images.dtype not in (np.uint8, np.uint16, np.float32) or not len(images):
            shape = repr(images) if isinstance(images, RaggedImages) else f"{images.dtype} {list(images.shape)}"
            raise InputError(
                f"{name} images must be [N, H, W] or [N, H, W, C], uint8, uint16 or float32 in [0, 1], got {shape}"
            )
    if channels_of(synthetic) != channels_of(real):
        raise InputError(
            "synthetic and real images must have one number of channels, "
            f"got {channels_of(synthetic)} and {channels_of(real)}"
        )
    crop = choose_crop(sets, config, device, ranks=ranks, least_of_all=least_of_all)
    if crop.reason:
        say(f"crop: {crop.reason}")
    hashes = {name: _sha256(images) for name, images in sets.items()}
    arrays = {name: _in_one_size(images, crop) for name, images in sets.items()}
    resident, reason = _placement(sets, config.data, device)
    if reason:
        say(f"data: {reason}")
    histogram = drawn_histogram = _histogram(synthetic, real, config, say)
    if histogram == "equalise" and not crop.whole:
        # a crop has another histogram than the picture that R will be given
        sets["synthetic"] = _equalised(RaggedImages.of(synthetic))
        arrays["synthetic"] = _in_one_size(sets["synthetic"], crop)
        drawn_histogram = "keep"
    seeds = np.random.SeedSequence(config.seed).generate_state(2)
    pools: list[Pool] = []
    for name, seed in zip(("synthetic", "real"), seeds, strict=True):
        images = sets[name]
        home = device if resident else "cpu"
        sampler = Sampler(len(images), int(seed), home, rank=rank, ranks=ranks)
        size = crop.size if not crop.whole else None
        if resident:
            pools.append(
                ResidentCrops(RaggedImages.of(images), sampler, device, size)
                if size
                else ResidentImages(_whole(images), sampler, device)
            )
            continue
        batches = min(4096 // config.batch_size, _AHEAD // (_image_bytes(images, crop.size) * config.batch_size))
        ahead = max(1, batches) * config.batch_size
        pools.append(HostImages(RaggedImages.of(images) if size else _whole(images), sampler, device, ahead, size))
    return Pools(pools[0], pools[1], arrays, histogram, drawn_histogram, device, hashes, crop.size, bool(crop.reason))


def _whole(images: Images) -> NDArray[Any]:
    """A set of one size as an array."""
    if not isinstance(images, RaggedImages):
        return images
    return np.stack([images[i] for i in range(len(images))])


def _in_one_size(images: Images, crop: Crop) -> NDArray[Any] | CentreCrops:
    return _whole(images) if crop.whole else CentreCrops(RaggedImages.of(images), crop.size)


def _image_bytes(images: Images, size: Size) -> int:
    return math.prod(size) * channels_of(images) * images.dtype.itemsize


def _equalised(images: RaggedImages) -> RaggedImages:
    """Each grey image equalised as a whole, in integers."""
    dtype = np.dtype("uint16") if images.dtype == np.float32 else images.dtype
    done = RaggedImages.empty([(h, w) for h, w in images.sizes.tolist()], 1, dtype, Path("equalised images"))
    for i in range(len(images)):
        done[i][...] = equalised(torch.from_numpy(np.array(images[i]))[None, None], "equalise")[0, 0].numpy()
    return done


def _placement(arrays: dict[str, Images], choice: str, device: torch.device) -> tuple[bool, str]:
    """Whether the images live on the device, and why; "" where there is no choice."""
    size = sum(images.nbytes for images in arrays.values())
    mapped = any(
        images.mapped if isinstance(images, RaggedImages) else isinstance(images, np.memmap)
        for images in arrays.values()
    )
    where = "memory-mapped" if mapped else "in host memory"
    if choice == "device":
        return True, f"{_bytes(size)} on {device} (--data device)"
    if choice == "host":
        return False, f"{_bytes(size)} stay {where} and are read ahead (--data host)"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        if not mapped:
            return True, ""  # in memory already: nothing was chosen
        free = available_memory()
    # half: activations, weights and the history want the rest
    if size <= free // 2:
        return True, f"{_bytes(size)} on {device}: they fit half of the {_bytes(free)} that are free"
    return False, f"{_bytes(size)} stay {where} and are read ahead: more than half of {_bytes(free)} free on {device}"


def _histogram(synthetic: Images, real: Images, config: TrainConfig, say: Callable[[str], None]) -> str:
    """ "keep" or "equalise", as the settings or the images say."""
    grey = channels_of(synthetic) == 1
    if config.histogram == "equalise" and not grey:
        raise InputError(f"--histogram equalise needs grey images, got {channels_of(synthetic)} channels")
    if config.histogram != "auto":
        return config.histogram
    if not grey or np.float32 in (synthetic.dtype, real.dtype):
        return "keep"
    theirs, ours = (_mean_non_uniformity(images) for images in (real, synthetic))
    if not theirs < _EQUALISED <= ours:
        return "keep"
    say(
        f"histogram: the real images are equalised (distance from uniform {theirs:.3f}) and the synthetic "
        f"are not ({ours:.3f}): each synthetic image is equalised before R (--histogram keep: not)"
    )
    return "equalise"


def _mean_non_uniformity(images: Images) -> float:
    """Of images spread over a set, each as a whole."""
    step = max(1, len(images) // _LOOKED_AT)
    if not isinstance(images, RaggedImages):
        return non_uniformity(_planes(torch.from_numpy(np.array(images[::step]))))
    found = [non_uniformity(torch.from_numpy(np.array(images[i]))[None, None]) for i in range(0, len(images), step)]
    return sum(found) / len(found)


def _planes(images: Tensor) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``, without a copy."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _sha256(images: Images) -> str:
    """Of the values in order, and of the sizes where there are several; a mapped file is never whole in memory."""
    digest = hashlib.sha256()
    if isinstance(images, RaggedImages):
        digest.update(images.sizes.astype("<i8").tobytes())
        for index in range(len(images)):
            digest.update(np.ascontiguousarray(images[index]).data)
        return digest.hexdigest()
    step = max(1, (1 << 26) // max(1, images[:1].nbytes))
    for start in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[start : start + step]).data)
    return digest.hexdigest()
