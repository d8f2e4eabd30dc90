"""R through every backend that is here, uint8 images in and out: images a second, agreement, share of the matrix peak.

The same images for all, in turn; on CUDA as many of them as `refine` takes at a time there. Agreement is with
PyTorch's float32: PSNR, and the most grey levels that a pixel is off. ``FASTSIMGAN_BENCH_REFINER=runs/mine`` takes that
refiner in place of the paper's at random weights. bfloat16 is left out where the processor only emulates it, and
torch.compile in the untimed run. On CUDA TF32 is off on every side, and plain PyTorch's sides are captured as CUDA
graphs too, as ours are by themselves. A call's features are several times what L2 holds, so its images are the same
ones each time.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from bench import limits
from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.data.simulators.builtin import builtin_pair
from fastsimgan.errors import FastSimGANError
from fastsimgan.hardware.precision import choose_precision
from fastsimgan.inference.refiner import Refiner, load_refiner, read_refiner, save_refiner
from fastsimgan.models.refiner import Refiner as Network
from fastsimgan.refinement.tuning import BATCH_SIZE_CUDA, fitting, read_shape, useful_pixels

if TYPE_CHECKING:
    from fastsimgan.inference.onnx_file import OnnxFile

SIZES = {"gaze": (35, 55, 64), "hand": (224, 224, 4)}  # height, width, batch on a CPU
SHAPES = {"gaze": {}, "hand": {"blocks": 10, "first_kernel": 7}}


def saved(folder: Path, size: str, small: bool) -> Path:
    """The refiner to run: of the environment, or the paper's for ``size`` (a small one where nothing is timed)."""
    if path := os.environ.get("FASTSIMGAN_BENCH_REFINER"):
        return Path(path)
    torch.manual_seed(0)
    network = Network(1, width=8, blocks=2) if small else Network(1, **SHAPES[size])
    torch.nn.init.normal_(network.last.weight)  # a fresh one changes nothing
    save_refiner(folder / "refiner.safetensors", network, histogram="keep", training=TrainConfig())
    return folder


def plain(network: Callable[[Tensor], Tensor], histogram: str, layout: torch.memory_format) -> Callable[..., Tensor]:
    """``network`` between the steps that `Refiner` has around it, images in ``layout``."""

    @torch.inference_mode()
    def call(images: Tensor) -> Tensor:
        return from_float(network(prepare(images, histogram).contiguous(memory_format=layout)).float(), torch.uint8)

    return call


def sides_here(path: Path, folder: Path, device: torch.device, batch: int, size: tuple[int, int], compiled: bool):
    """Name of each side → the call on uint8 images ``[B, 1, H, W]`` on ``device``; ours, the public one, first."""
    file = read_refiner(path)
    histogram = file.settings["histogram"]
    module = file.module.to(device).eval()
    module.impl = "reference"  # PyTorch's own convolutions; ours is the call of `load_refiner`
    nhwc = deepcopy(module).to(memory_format=torch.channels_last)
    last, first = torch.channels_last, torch.contiguous_format
    bfloat16 = choose_precision("auto", device)[0] == "bfloat16"

    half = ["bfloat16"] if bfloat16 else []
    if device.type == "cuda":
        half = ["float16", *half]

    def in_16_bits(network: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
        def call(images: Tensor) -> Tensor:
            with torch.autocast(device.type, getattr(torch, name)):
                return network(images)

        return call

    sides: dict[str, Callable[[Tensor], Tensor]] = {}

    def ours(name: str, **arguments: object) -> None:
        refiner = load_refiner(arguments.pop("path", path), device=device.type, **arguments)
        sides[name] = lambda images: refiner(images, len(images))

    for precision in ("float32", *half):
        ours(f"ours, torch {precision}", precision=precision)
        if compiled and device.type == "cuda":
            ours(f"ours, torch {precision}, compiled", precision=precision, compiled=True)
    sides["eager"] = plain(module, histogram, first)
    sides["eager channels_last"] = plain(nhwc, histogram, last)
    for precision in half:
        sides[f"eager {precision}"] = plain(in_16_bits(nhwc, precision), histogram, last)
    if compiled:
        sides["compile"] = plain(torch.compile(nhwc, dynamic=False), histogram, last)
        for precision in half:
            network = torch.compile(deepcopy(nhwc), dynamic=False)
            sides[f"compile {precision}"] = plain(in_16_bits(network, precision), histogram, last)
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        return sides
    from fastsimgan.exporting.export import engine, export
    from fastsimgan.exporting.exported_files import QUANTISED
    from fastsimgan.inference import int8_backend, onnx_file
    from fastsimgan.inference.onnxruntime_backend import OnnxRuntimeBackend

    export(path, folder / "exported", quantise=("int8-cpu",), min_psnr=0, log=lambda line: None)
    files = {"float32": "refiner.onnx", "int8": QUANTISED["int8-cpu"][0]}
    if device.type == "cuda":
        files = {"float32": "refiner.onnx", "float16": "refiner.u8.fp16.onnx"}
    else:
        int8 = onnx_file.read(folder / "exported" / files["int8"])
        if (reason := int8_backend.unmet(int8, device)) is None:
            ours("ours, int8", path=int8.path)
            print(f"ours, int8, before it is rounded to uint8: {before_rounding(path, int8):.1f} dB")
        else:
            print(f"left out: ours, int8: {reason}")
    for name, file_name in files.items():
        try:
            opened = onnx_file.read(folder / "exported" / file_name)
            refiner = Refiner(OnnxRuntimeBackend(opened, device), opened.settings, opened.sha256, device)
            sides[f"onnxruntime {name}"] = lambda images, refiner=refiner: refiner(images, len(images))
        except FastSimGANError as error:  # said, not hidden: onnxruntime without CUDA
            print(f"left out: onnxruntime {name}: {error}")
    for library in ("tensorrt", "tensorrt-rtx") if device.type == "cuda" else ():
        try:
            built = engine(folder / "exported", library, batch=(1, batch, batch), size=size)
            ours(f"{library} float16", path=built)
        except FastSimGANError as error:
            print(f"left out: {library}: {error}")
    return sides


@torch.inference_mode()
def before_rounding(path: Path, int8: OnnxFile) -> float:
    """PSNR of our int8 against float32 on built-in eyes, as floats: rounded, nearly equal ones may be a level off."""
    from fastsimgan.inference.int8_backend import Int8Backend

    file = read_refiner(path)
    eyes = torch.from_numpy(builtin_pair(0)[0]["images"][:64])[:, None]
    error = Int8Backend(int8).floats(eyes) - file.module(prepare(eyes, file.settings["histogram"]))
    return 10 * math.log10(4 / float(error.double().square().mean()))


def batch_on_cuda(height: int, width: int, path: Path, device: torch.device) -> int:
    """Images that `refine` takes at a time."""
    if limits.SMALL:
        return 4
    about = torch.cuda.get_device_properties(device)
    pixels = useful_pixels(about.multi_processor_count, about.total_memory, read_shape(path).width)
    return fitting(BATCH_SIZE_CUDA, pixels, height, width)


@pytest.mark.parametrize("size", ["gaze", pytest.param("hand", marks=pytest.mark.large)])
def test_infer(race, size, tmp_path):
    on_cuda = race.device.type == "cuda"
    height, width, batch = SIZES[size]
    path = saved(tmp_path, size, small=race.disabled or (on_cuda and limits.SMALL))
    if on_cuda:
        batch = batch_on_cuda(height, width, path, race.device)
    elif race.disabled:
        batch = 4
    eyes = torch.from_numpy(builtin_pair(0)[0]["images"][:batch])[:, None].float()
    images = torch.nn.functional.interpolate(eyes, (height, width), mode="bilinear").to(torch.uint8)
    images = torch.cat([images] * -(-batch // len(images)))[:batch].to(race.device)
    calls = sides_here(path, tmp_path, race.device, batch, (height, width), compiled=not race.disabled)
    truth = calls["ours, torch float32"](images).int()
    agreement = {}
    for name, call in calls.items():
        off = (call(images).int() - truth).abs()
        square = float(off.double().square().mean())
        agreement[name] = 10 * math.log10(255**2 / square) if square else math.inf, int(off.max())
        # TF32, which plain PyTorch allows in convolutions on CUDA, and the narrow types may be further off
        assert agreement[name][1] <= 1 or "float32" not in name, (name, agreement[name])
        if on_cuda:
            memory = limits.peak_memory(lambda call=call: call(images), race.device) or 0
            print(f"{size}, {batch} images, {name}: {memory / 1e9:.2f} GB of device memory at most")
    weights = sum(parameter.numel() for parameter in read_refiner(path).module.parameters() if parameter.ndim == 4)
    plain_torch = [name for name in calls if name.startswith(("eager", "compile"))]
    race.run_images(
        f"R {size} {height}x{width} b={batch}",
        {name: (lambda call=call: call(images)) for name, call in calls.items()},
        agreement,
        images=batch,
        flop=2.0 * weights * height * width * batch,
        baseline="eager",
        **({"not_capturable": calls.keys() - set(plain_torch)} if on_cuda else {}),
    )
