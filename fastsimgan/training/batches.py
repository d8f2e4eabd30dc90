"""Mini-batches of both sets of training images, as the networks want them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
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
from fastsimgan.data.ragged import CentreCrops, Images, RaggedImages, Size, channels_of
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.hardware.memory import available_memory
from fastsimgan.training.crops import Crop, choose_crop
from fastsimgan.training.data_parallel import DataParallelGroup
from fastsimgan.training.image_store import HostImages, ImageStore, ResidentCrops, ResidentImages, planes

_EQUALISED = 0.06  # below this `non_uniformity`, images are taken for equalised
_LOOKED_AT = 500  # images of each set that this is judged by
_AHEAD = 1 << 28  # bytes that are gathered at a time, at most


@dataclass
class TrainingBatches:
    """Synthetic and real images as the networks want them: ``[n, C, H, W]`` in [-1, 1] on the device.

    Made by `open_batches`.

    Attributes:
        synthetic, real: where both sets live.
        arrays: both sets in one size: as given, or the middle of each image.
        histogram: "keep" or "equalise", what R is to do with images.
        drawn_histogram: what is still to be done with those of ``arrays`` and those drawn (crops come from images that
            were equalised whole).
        device: of the batches.
        hashes: sha256 of each set.
        crop: (H, W) of the images, or of the random crops of them.
        crop_chosen: whether it was chosen by the memory there is.
    """

    synthetic: ImageStore
    real: ImageStore
    arrays: dict[str, NDArray[Any] | CentreCrops]
    histogram: str
    drawn_histogram: str
    device: torch.device
    hashes: dict[str, str]
    crop: Size
    crop_chosen: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image in a batch."""
        channels, height, width = planes(torch.from_numpy(np.array(self.arrays["real"][:1]))).shape[1:]
        return channels, height, width

    @property
    def resident(self) -> bool:
        """Whether drawing needs nothing from the host."""
        return not isinstance(self.synthetic, HostImages) and not isinstance(self.real, HostImages)

    def draw_synthetic(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]`` of the synthetic images."""
        return prepare(self.synthetic.draw(count), self.drawn_histogram)

    def draw_real(self, count: int) -> Tensor:
        """The next ``[count, C, H, W]`` of the real images."""
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
        return planes(torch.from_numpy(images)).to(self.device)

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
        store = getattr(self, name)
        assert isinstance(store, ResidentImages | ResidentCrops)
        return store.sampler

    def drawn_between(self, before: dict[str, int], after: dict[str, int]) -> dict[str, list[int]]:
        """Indices of the images drawn from one of `positions` to another, by all ranks."""
        return {name: getattr(self, name).sampler.indices(start, after[name]) for name, start in before.items()}


def open_batches(
    synthetic: Images,
    real: Images,
    config: TrainConfig,
    device: torch.device,
    log: Callable[[str], None],
    group: DataParallelGroup | None = None,
) -> TrainingBatches:
    """Check both sets, choose where they live, and say why.

    Args:
        synthetic, real: ``[N, H, W]`` or ``[N, H, W, C]``, or of any sizes; uint8, uint16, or float32 in [0, 1]; same
            channels.
        config: its ``seed``, ``batch_size``, ``histogram``, ``data``, ``crop`` and what decides about memory.
        device: of the batches.
        log: called with each line meant for a person.
        group: the processes that share each batch; None is this one alone.

    Raises:
        InputError: images break a rule.
    """
    group = group or DataParallelGroup()
    sets = {"synthetic": synthetic, "real": real}
    _check(sets)
    crop = choose_crop(sets, config, device, group)
    if crop.reason:
        log(f"crop: {crop.reason}")
    hashes = {name: _sha256(images) for name, images in sets.items()}
    arrays = {name: _in_one_size(images, crop) for name, images in sets.items()}
    resident, reason = _placement(sets, config.data, device)
    if reason:
        log(f"data: {reason}")
    histogram = drawn_histogram = _histogram(synthetic, real, config, log)
    if histogram == "equalise" and not crop.whole:
        # a crop has another histogram than the picture that R will be given
        sets["synthetic"] = _equalised(RaggedImages.of(synthetic))
        arrays["synthetic"] = _in_one_size(sets["synthetic"], crop)
        drawn_histogram = "keep"
    seeds = np.random.SeedSequence(config.seed).generate_state(2)
    stores: list[ImageStore] = []
    for images, seed in zip(sets.values(), seeds, strict=True):
        sampler = Sampler(len(images), int(seed), device if resident else "cpu", rank=group.rank, ranks=group.size)
        stores.append(_store(images, sampler, crop, config, device, resident))
    return TrainingBatches(
        stores[0], stores[1], arrays, histogram, drawn_histogram, device, hashes, crop.size, bool(crop.reason)
    )


def _check(sets: dict[str, Images]) -> None:
    for name, images in sets.items():
        shaped = isinstance(images, RaggedImages) or images.ndim in (3, 4)
        if not shaped or images.dtype not in (np.uint8, np.uint16, np.float32) or not len(images):
            shape = repr(images) if isinstance(images, RaggedImages) else f"{images.dtype} {list(images.shape)}"
            raise InputError(
                f"{name} images must be [N, H, W] or [N, H, W, C], uint8, uint16 or float32 in [0, 1], got {shape}"
            )
    synthetic, real = (channels_of(images) for images in sets.values())
    if synthetic != real:
        raise InputError(f"synthetic and real images must have one number of channels, got {synthetic} and {real}")


def _store(
    images: Images, sampler: Sampler, crop: Crop, config: TrainConfig, device: torch.device, resident: bool
) -> ImageStore:
    """Where a set lives."""
    if resident:
        if crop.whole:
            return ResidentImages(_whole(images), sampler, device)
        return ResidentCrops(RaggedImages.of(images), sampler, device, crop.size)
    batches = min(4096 // config.batch_size, _AHEAD // (_image_bytes(images, crop.size) * config.batch_size))
    ahead = max(1, batches) * config.batch_size
    if crop.whole:
        return HostImages(_whole(images), sampler, device, ahead)
    return HostImages(RaggedImages.of(images), sampler, device, ahead, crop.size)


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


def _histogram(synthetic: Images, real: Images, config: TrainConfig, log: Callable[[str], None]) -> str:
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
    log(
        f"histogram: the real images are equalised (distance from uniform {theirs:.3f}) and the synthetic "
        f"are not ({ours:.3f}): each synthetic image is equalised before R (--histogram keep: not)"
    )
    return "equalise"


def _mean_non_uniformity(images: Images) -> float:
    """Of images spread over a set, each as a whole."""
    step = max(1, len(images) // _LOOKED_AT)
    if not isinstance(images, RaggedImages):
        return non_uniformity(planes(torch.from_numpy(np.array(images[::step]))))
    found = [non_uniformity(torch.from_numpy(np.array(images[i]))[None, None]) for i in range(0, len(images), step)]
    return sum(found) / len(found)


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
