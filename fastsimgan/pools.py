"""Both sets of training images, and mini-batches out of them: resident on the device, or read ahead from the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.data.histogram import non_uniformity
from fastsimgan.data.room import available_memory
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.runtime.backend import prepare

Images = NDArray[Any]
_EQUALISED = 0.06  # below this `non_uniformity`, images are taken for equalised
_LOOKED_AT = 500  # images of each set that this is judged by


class ResidentImages:
    """Images kept on the device as they are stored; a batch is drawn and gathered there.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``.
        sampler: on ``device``.
        device: where.
    """

    def __init__(self, images: Images, sampler: Sampler, device: torch.device) -> None:
        if isinstance(images, np.memmap) or not images.flags.writeable:
            images = np.array(images)  # torch wants memory that it may write to
        self._stored = _planes(torch.from_numpy(images)).contiguous().to(device)
        self.sampler = sampler

    def draw(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]``, as stored."""
        # not `[...]`: on CUDA that knows no uint16
        return self._stored.index_select(0, self.sampler.draw(count))


class HostImages:
    """Images that stay in host memory or in a memory-mapped file; a thread gathers the next ones meanwhile.

    What is gathered goes through pinned memory to a CUDA device while that computes.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]``, perhaps a ``numpy.memmap``.
        sampler: on the CPU; it is read ahead of what has been drawn.
        device: where the batches go.
        ahead: images gathered at a time.
    """

    def __init__(self, images: Images, sampler: Sampler, device: torch.device, ahead: int) -> None:
        self._images, self._device, self._ahead = images, device, ahead
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
        indices = self._reader.draw(self._ahead).numpy()
        shape = (len(indices), *self._images.shape[1:])
        pin = self._device.type == "cuda"
        chunk = torch.empty(shape, dtype=getattr(torch, self._images.dtype.name), pin_memory=pin)
        np.take(self._images, indices, axis=0, out=chunk.numpy())
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


@dataclass
class Pools:
    """Synthetic and real images as the networks want them: ``[n, C, H, W]`` in [-1, 1] on the device.

    Made by `open_pools`. Attributes: ``image_shape`` (C, H, W); ``histogram``, "keep" or "equalise", what happens to
    synthetic images; ``resident``, whether drawing needs nothing from the host; ``hashes``, sha256 of each set.
    """

    synthetic: ResidentImages | HostImages
    real: ResidentImages | HostImages
    arrays: dict[str, Images]
    histogram: str
    device: torch.device
    hashes: dict[str, str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = _planes(torch.from_numpy(np.array(self.arrays["real"][:1]))).shape[1:]
        return channels, height, width

    @property
    def resident(self) -> bool:
        return isinstance(self.synthetic, ResidentImages) and isinstance(self.real, ResidentImages)

    def draw_synthetic(self, count: int) -> Tensor:
        return prepare(self.synthetic.draw(count), self.histogram)

    def draw_real(self, count: int) -> Tensor:
        return prepare(self.real.draw(count), "keep")

    def some(self, name: str, count: int) -> Tensor:
        """``count`` images spread evenly over a set ("synthetic" or "real"), as stored; always the same."""
        array = self.arrays[name]
        spread = np.linspace(0, len(array) - 1, min(count, len(array))).astype(np.int64)
        return self.stored(array[spread])

    def stored(self, images: Images) -> Tensor:
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
        assert isinstance(pool, ResidentImages)
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
) -> Pools:
    """Check both sets, choose where they live, and say why.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, uint8, uint16, or float32 in [0, 1]; same size and channels.
        config: its ``seed``, ``batch_size``, ``histogram`` and ``data``.
        device: of the batches.
        say: called with each line meant for a person.
        rank, ranks: see `Sampler`.

    Raises:
        InputError: images break a rule.
    """
    arrays = {"synthetic": synthetic, "real": real}
    for name, images in arrays.items():
        if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16, np.float32) or not len(images):
            raise InputError(
                f"{name} images must be [N, H, W] or [N, H, W, C], uint8, uint16 or float32 in [0, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
    if _size(synthetic) != _size(real):
        raise InputError(
            f"synthetic and real images must have one size and number of channels, "
            f"got {_size(synthetic)} and {_size(real)}"
        )
    resident, reason = _placement(arrays, config.data, device)
    if reason:
        say(f"data: {reason}")
    histogram = _histogram(synthetic, real, config, say)
    seeds = np.random.SeedSequence(config.seed).generate_state(2)
    pools: list[ResidentImages | HostImages] = []
    for images, seed in zip((synthetic, real), seeds, strict=True):
        home = device if resident else "cpu"
        sampler = Sampler(len(images), int(seed), home, rank=rank, ranks=ranks)
        ahead = max(config.batch_size, 4096 // config.batch_size * config.batch_size)
        pools.append(
            ResidentImages(images, sampler, device) if resident else HostImages(images, sampler, device, ahead)
        )
    hashes = {name: _sha256(images) for name, images in arrays.items()}
    return Pools(pools[0], pools[1], arrays, histogram, device, hashes)


def _placement(arrays: dict[str, Images], choice: str, device: torch.device) -> tuple[bool, str]:
    """Whether the images live on the device, and why; "" where there is no choice."""
    size = sum(images.nbytes for images in arrays.values())
    mapped = any(isinstance(images, np.memmap) for images in arrays.values())
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
    grey = synthetic.ndim == 3 or synthetic.shape[3] == 1
    if config.histogram == "equalise" and not grey:
        raise InputError(f"--histogram equalise needs grey images, got {synthetic.shape[3]} channels")
    if config.histogram != "auto":
        return config.histogram
    if not grey or np.float32 in (synthetic.dtype, real.dtype):
        return "keep"
    theirs, ours = (
        non_uniformity(_planes(torch.from_numpy(np.array(images[:: max(1, len(images) // _LOOKED_AT)]))))
        for images in (real, synthetic)
    )
    if not theirs < _EQUALISED <= ours:
        return "keep"
    say(
        f"histogram: the real images are equalised (distance from uniform {theirs:.3f}) and the synthetic "
        f"are not ({ours:.3f}): each synthetic image is equalised before R (--histogram keep: not)"
    )
    return "equalise"


def _planes(images: Tensor) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``, without a copy."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _size(images: Images) -> str:
    return f"{images.shape[1]}x{images.shape[2]} with {images.shape[3] if images.ndim == 4 else 1} channel(s)"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _sha256(images: Images) -> str:
    """Of the values in order; a file that is memory-mapped is never whole in memory."""
    digest = hashlib.sha256()
    step = max(1, (1 << 26) // max(1, images[:1].nbytes))
    for start in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[start : start + step]).data)
    return digest.hexdigest()
