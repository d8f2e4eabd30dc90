"""A trained refiner as a function of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsimgan.data.pixel_values import UNIT, Span, as_images, from_float, out_of_range
from fastsimgan.data.preprocess import equalised, prepare
from fastsimgan.errors import InputError
from fastsimgan.hardware.device import choose_device
from fastsimgan.inference.backend import Backend, Precision
from fastsimgan.inference.refiner_file import IN_FEATURES, describe, read_refiner
from fastsimgan.inference.tiles import in_tiles, margin, pixels
from fastsimgan.inference.torch_backend import TorchBackend
from fastsimgan.models.refiner import RefinerNetwork

_MODES = {1: ("L", "I;16"), 3: ("RGB",), 4: ("RGBA", "CMYK")}  # of PIL images, by number of channels


class Refiner:
    """R, with everything that has to happen before and after it (equalisation, normalisation, rounding).

    Made by :func:`load_refiner`. Attributes: ``channels``, ``device``, ``sha256`` of the file, ``settings``, ``span``
    (the range of float images, [0, 1] where training was told no other), and ``backend`` (its ``name`` says what runs
    R).
    """

    def __init__(self, backend: Backend, settings: dict[str, Any], sha256: str, device: torch.device) -> None:
        self.backend = backend
        self.settings = settings
        self.sha256 = sha256
        self.device = device
        self.channels: int = settings["channels"]
        low, high = settings.get("range", UNIT)
        self.span: Span = float(low), float(high)

    @classmethod
    def from_module(cls, module: RefinerNetwork, histogram: str, device: torch.device) -> Refiner:
        """A refiner that has no file yet (``sha256`` is empty)."""
        device = choose_device(str(device))  # with its index
        return cls(TorchBackend(module, device), describe(module, histogram), "", device)

    def __repr__(self) -> str:
        shape = ""
        if "width" in self.settings:  # a foreign engine tells nothing of its network
            shape = f", {self.settings['blocks']} blocks of {self.settings['width']} feature maps"
        kind = {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} channels")
        return f"Refiner({kind}{shape}, histogram {self.settings['histogram']!r}, {self.backend.name} on {self.device})"

    @overload
    def __call__(self, images: np.ndarray[Any, Any], batch_size: int = 64) -> np.ndarray[Any, Any]: ...
    @overload
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor: ...
    @overload
    def __call__(self, images: Image.Image, batch_size: int = 64) -> Image.Image: ...
    @torch.inference_mode()
    def __call__(self, images: Any, batch_size: int = 64) -> Any:
        """Refine images; what comes back has the same type, shape, dtype and (tensors) device.

        Args:
            images: an array ``[N, H, W]`` or ``[N, H, W, C]``, or a tensor ``[N, C, H, W]``; uint8, uint16, or
                float32 in [0, 1]. Where training was told a range, float32 in that range alone. Or one picture, as
                transforms of a data set get it: a PIL image, an array ``[H, W]`` (grey) or ``[H, W, C]`` (C > 1), or a
                tensor ``[C, H, W]``.
            batch_size: images refined at a time.

        Raises:
            InputError: wrong number of channels or dimensions, another dtype, floats outside ``span``, a file that
                takes uint8 alone, or a size that an engine was not built for.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(images, Image.Image):
            if images.mode not in (modes := _MODES.get(self.channels, ())):
                raise InputError(
                    f"the picture's mode must be {' or '.join(modes) or 'that of an array'}, got {images.mode}"
                )
            return Image.fromarray(self(np.asarray(images), 1))
        if self._is_one(images):
            return self(images[None], 1)[0]
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise InputError(f"images must be a tensor [N, C, H, W], got {list(images.shape)}")
            stored: Any = images
            refined: Any = torch.empty_like(images)
            target: Tensor = refined
        else:
            stored = as_images(images)
            refined = np.empty_like(stored, order="C", subok=False)
            target = _planes(refined)
        self.check(_part(stored, slice(0, 0)), stored.shape)
        batch_size = min(batch_size, self.backend.largest_batch or batch_size)
        for start in range(0, len(stored), batch_size):
            part = slice(start, start + batch_size)
            planes = _part(stored, part)
            self.check_range(planes)
            target[part] = self._refine(planes.to(self.device)).to(target.device)
        return refined

    def _is_one(self, images: Any) -> bool:
        """Whether an array or a tensor is one picture. No batch has these numbers of dimensions."""
        if isinstance(images, Tensor):
            return images.ndim == 3
        return isinstance(images, np.ndarray) and images.ndim == (2 if self.channels == 1 else 3)

    def warm_up(self, batch_size: int, height: int, width: int) -> None:
        """Run twice on black images of this size, so that no choice, compilation or capture is left for later."""
        if isinstance(self.backend, TorchBackend):
            self.backend.compile_for((batch_size, self.channels, height, width))
        dtype = torch.uint8 if self.span == UNIT else torch.float32
        images = torch.full((batch_size, self.channels, height, width), self.span[0], device=self.device).to(dtype)
        for _ in range(2):
            self(images, batch_size)

    @torch.inference_mode()
    def run(self, planes: Tensor) -> Tensor:
        """As `__call__`, for a tensor on ``device`` of which `check` and `check_range` have seen the like; waits for
        nothing."""
        most = self.backend.largest_batch or len(planes)
        if len(planes) <= most:
            return self._refine(planes)
        return torch.cat([self._refine(part) for part in planes.split(most)])

    def check(self, planes: Tensor, given: Sequence[int]) -> None:
        """InputError if ``[N, C, H, W]`` is of a kind that this refiner does not take; values are not looked at.
        ``given`` is the shape that the caller gave it, for the message."""
        if planes.dtype not in (torch.uint8, torch.uint16, torch.float32):
            raise InputError(f"images must be uint8, uint16 or float32 in [0, 1], got {planes.dtype}")
        if self.span != UNIT and planes.dtype != torch.float32:
            low, high = self.span
            raise InputError(
                f"images must be floats from {low:g} to {high:g}, as those of training (--range), got {planes.dtype}"
            )
        if 0 in planes.shape[2:]:
            raise InputError(f"images must have at least one pixel, got {list(given)}")
        if planes.shape[1] != self.channels:
            raise InputError(f"images must have {self.channels} channel(s), as the refiner has, got {planes.shape[1]}")
        if self.backend.dtype == torch.uint8 and planes.dtype != torch.uint8:
            raise InputError(
                f"this exported refiner takes uint8 images, got {planes.dtype}: refiner.onnx and refiner.fp16.onnx, "
                "exported beside it, take the others"
            )

    def check_range(self, images: Tensor) -> None:
        """InputError if floats are not in ``span``; looked at where they are, which on a device waits for it."""
        low, high = self.span
        if images.dtype == torch.float32 and not bool(((images >= low) & (images <= high)).all()):
            raise InputError(out_of_range(images.cpu().numpy(), self.span))

    def _refine(self, images: Tensor) -> Tensor:
        if self.span == UNIT:
            return self._refine_units(images)
        low, high = self.span
        refined = self._refine_units((images - low) / (high - low))
        return (refined * (high - low) + low).clamp(low, high)

    def _refine_units(self, images: Tensor) -> Tensor:
        # a foreign engine tells nothing of its network; its profile says what it takes at most
        whole = "width" not in self.settings or images.shape[2] * images.shape[3] <= pixels(self.settings)
        if self.backend.dtype == torch.uint8:
            # such a file equalises inside, over all that it is given
            if whole or self.settings["histogram"] == "equalise":
                return self.backend(images.contiguous())
            return self._in_tiles(lambda part: self.backend(part.contiguous()), images, images.dtype)
        if whole:
            return from_float(self.backend(prepare(images, self.settings["histogram"])), images.dtype)
        levels = equalised(images, self.settings["histogram"])  # over the whole picture, before it is cut
        dtype = images.dtype
        return self._in_tiles(lambda part: from_float(self.backend(prepare(part, "keep")), dtype), levels, dtype)

    def _in_tiles(self, call: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype) -> Tensor:
        around, most = margin(self.settings), pixels(self.settings)
        return in_tiles(call, images, margin=around, most=most, dtype=dtype)


def _planes(images: np.ndarray[Any, Any]) -> Tensor:
    """An array ``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``, in the same memory."""
    planes = torch.from_numpy(images)
    return planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2)


def _part(images: np.ndarray[Any, Any] | Tensor, part: slice) -> Tensor:
    """Some images as ``[n, C, H, W]``."""
    if isinstance(images, Tensor):
        return images[part]
    array = np.ascontiguousarray(images[part])
    # PyTorch warns of memory that it may not write to, a mapped file's say
    return _planes(array if array.flags.writeable else array.copy())


def load_refiner(
    path: str | Path,
    device: str = "auto",
    *,
    precision: Precision = "float32",
    compiled: bool = False,
    repeatable: bool = False,
    block: str = "auto",
    library: Literal["tensorrt", "tensorrt-rtx"] | None = None,
    trust_engine: bool = False,
) -> Refiner:
    """Load a trained refiner, or one that `export` wrote.

    Args:
        path: the folder of a run or its ``refiner.safetensors`` (runs in PyTorch), or an ``.onnx`` file of `export`
            (runs in onnxruntime; the CPU's int8 file in kernels of our own where the processor has VNNI), or an
            ``.engine`` or ``.plan`` built from one (runs in TensorRT, on CUDA).
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        precision: in which PyTorch computes all up to the change: "float32", on CUDA also "float16", on GPUs and CPUs
            that compute in it also "bfloat16". An exported file has its own.
        compiled: on CUDA, run a run's refiner through `torch.compile`: for each size of batch that comes back (8 at
            most), which takes tens of seconds, or, where ``repeatable``, for those of `Refiner.warm_up` alone.
        repeatable: on CUDA, choose nothing by timing: the same batch becomes the same bytes in every process.
        block: the implementation of `ops.residual_block` that a run's refiner takes.
        library: what built an engine; None is what the cache's record of it says, and TensorRT where there is none.
        trust_engine: run an engine that is not from the cache of `export --engine`, such as trtexec's.

    Raises:
        InputError: not there, not a refiner of this package, or altered; or one of an earlier version that only
            float32 is good enough for.
        UnavailableError: the device, or the package that runs such a file or compiles it, is not there.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".engine", ".plan") and compiled:
        raise InputError(f"{path}: compiled must be off for exported files, which PyTorch does not run")
    if path.suffix in (".onnx", ".engine", ".plan") and precision != "float32":
        raise InputError(
            f"{path}: precision must be left alone for exported files, which have their own, got {precision}"
        )
    if path.suffix == ".onnx":
        return _load_onnx(path, device)
    if path.suffix in (".engine", ".plan"):
        from fastsimgan.inference.tensorrt_backend import load_engine

        chosen = choose_device(device)
        return Refiner(*load_engine(path, library, chosen, trusted=trust_engine), chosen)
    file = read_refiner(path)
    chosen = choose_device(device)
    if precision != "float32" and file.in_features:
        raise InputError(f"{path}: precision must be float32, got {precision}: {IN_FEATURES}")
    backend = TorchBackend(file.module, chosen, precision, compiled=compiled, repeatable=repeatable, block=block)
    return Refiner(backend, file.settings, file.sha256, chosen)


def _load_onnx(path: Path, device: str) -> Refiner:
    from fastsimgan.inference.int8_backend import Int8Backend, unmet
    from fastsimgan.inference.onnx_file import read
    from fastsimgan.inference.onnxruntime_backend import OnnxRuntimeBackend

    file = read(path)
    chosen = choose_device(device)
    backend = Int8Backend(file) if unmet(file, chosen) is None else OnnxRuntimeBackend(file, chosen)
    return Refiner(backend, file.settings, file.sha256, chosen)
