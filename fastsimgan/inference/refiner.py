"""A trained refiner as a function of images, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import UNIT, Span, as_images, from_float, out_of_range
from fastsimgan.data.preprocess import equalised, prepare
from fastsimgan.errors import InputError
from fastsimgan.hardware.device import choose_device
from fastsimgan.inference.graph_format import check_settings
from fastsimgan.inference.tiles import in_tiles, margin, pixels
from fastsimgan.inference.torch_backend import Backend, Precision, TorchBackend
from fastsimgan.models import refiner as network
from fastsimgan.storage.atomic import write_atomically

FILE, BEST = "refiner.safetensors", "best.safetensors"
_FORMAT = "fastsimgan.refiner/1"
IN_FEATURES = (
    "a refiner of a version before --computes carries the image in its features, for which float32 alone is good "
    "enough: train it again for 16 and 8 bits"
)


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
    def from_module(cls, module: network.Refiner, histogram: str, device: torch.device) -> Refiner:
        """A refiner that has no file yet (``sha256`` is empty)."""
        device = choose_device(str(device))  # with its index
        return cls(TorchBackend(module, device), describe(module, histogram), "", device)

    @overload
    def __call__(self, images: np.ndarray[Any, Any], batch_size: int = 64) -> np.ndarray[Any, Any]: ...
    @overload
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor: ...
    @torch.inference_mode()
    def __call__(self, images: Any, batch_size: int = 64) -> Any:
        """Refine images; what comes back has the same type, shape, dtype and (tensors) device.

        Args:
            images: an array ``[N, H, W]`` or ``[N, H, W, C]``, or a tensor ``[N, C, H, W]``; uint8, uint16, or
                float32 in [0, 1]. Where training was told a range, float32 in that range alone.
            batch_size: images refined at a time.

        Raises:
            InputError: wrong number of channels or dimensions, another dtype, floats outside ``span``, a file that
                takes uint8 alone, or a size that an engine was not built for.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(images, Tensor):
            planes = images
            if planes.ndim != 4:
                raise InputError(f"images must be a tensor [N, C, H, W], got {list(images.shape)}")
        else:
            images = as_images(images)
            planes = torch.from_numpy(np.ascontiguousarray(images))
            planes = planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2)
        self.check(planes, images.shape)
        out = torch.empty_like(planes)
        batch_size = min(batch_size, self.backend.largest_batch or batch_size)
        for start in range(0, len(planes), batch_size):
            part = slice(start, start + batch_size)
            self.check_range(planes[part])
            out[part] = self._refine(planes[part].to(self.device)).to(out.device)
        if isinstance(images, Tensor):
            return out
        return (out[:, 0] if images.ndim == 3 else out.permute(0, 2, 3, 1)).contiguous().numpy()

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


def describe(module: network.Refiner, histogram: str) -> dict[str, Any]:
    """The settings from which `load_refiner` builds the network again."""
    return {
        "channels": module.last.out_channels,
        "width": module.last.in_channels,
        "blocks": len(module.blocks),
        "first_kernel": module.first.kernel_size[0],
        "computes": module.computes,
        "histogram": histogram,
    }


def save_refiner(path: Path, module: network.Refiner, *, histogram: str, training: TrainConfig) -> None:
    """Write R's weights and its settings (in the header) to ``path``, at once or not at all.

    Args:
        path: a .safetensors file.
        module: R.
        histogram: "keep" or "equalise", what happens to an image before R.
        training: settings it was trained with, kept for the record.
    """
    settings = describe(module, histogram)
    if training.range is not None:
        settings["range"] = list(training.range)
    header = {"format": _FORMAT, "settings": json.dumps(settings), "training": training.to_header()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    write_atomically(path, _in_order(save(tensors, header)))


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in another order in each process."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


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


@dataclass(frozen=True)
class RefinerFile:
    """What ``refiner.safetensors`` holds."""

    module: network.Refiner
    settings: dict[str, Any]
    training: str  # JSON, the settings it was trained with
    sha256: str
    in_features: bool
    """Whether it carries the image as small differences of large features, as earlier versions had R begin at the
    identity. In float16 throughout such a refiner was up to 36 grey levels off."""


def read_refiner(path: Path) -> RefinerFile:
    """Read and check the folder of a run, or its ``refiner.safetensors``; InputError as `load_refiner` has it."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such refiner (a run's folder holds one after its first checkpoint)")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        data = file.read_bytes()
        tensors = load(data)
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise InputError(f"{file}: format must be {_FORMAT!r}, got {header.get('format')!r}")
    try:
        settings = json.loads(header["settings"])
        check_settings(settings)
        if list(tensors["last.weight"].shape[:2]) != [settings["channels"], settings["width"]]:
            raise ValueError("the header's channels and width are not those of the weights")
        with torch.device("meta"):  # no memory is taken on the header's word
            module = network.Refiner(
                settings["channels"],
                width=settings["width"],
                blocks=settings["blocks"],
                first_kernel=settings["first_kernel"],
                computes=settings.setdefault("computes", "image"),
            )
        module.load_state_dict(tensors, assign=True)
        training = header.get("training", "{}")
        began_there = settings["computes"] == "image" and dict(json.loads(training)).get("identity_init") is True
        in_features = began_there and settings["width"] >= 20 * settings["channels"]  # narrower ones began at random
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: not a whole refiner: {type(error).__name__}: {reason}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{file}: weights must be finite, got NaN or Inf in {name}")
    return RefinerFile(module, settings, training, hashlib.sha256(data).hexdigest(), in_features)
