"""R in 8 bits on a CPU: an exported int8-cpu file by our own kernels, several times as fast as by onnxruntime.

The graph is written for onnxruntime: its features leave room for processors without VNNI, and each branch is rounded to
8 bits at its end. Neither is needed here (`ops.residual_block_int8`): the same weights are 4 dB nearer to float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.errors import InputError
from fastsimgan.hardware.device import keep_some_freed_memory
from fastsimgan.inference.onnx_file import OnnxFile
from fastsimgan.inference.torch_backend import in_cache
from fastsimgan.models.refiner import put_together
from fastsimgan.ops import residual_block as float_block
from fastsimgan.ops.residual_block import residual_block
from fastsimgan.ops.residual_block_int8 import implementations, residual_block_int8
from fastsimgan.storage.names import printable

FINER = 224 / 127
"""How many of our steps one of the file's is: a channel's peak in calibration is 127 there and 224 here, of 255.

The file leaves room for twice the peak, this for an eighth more: images unlike those of calibration lose more here."""


def unmet(file: OnnxFile, device: torch.device) -> str | None:
    """Why `Int8Backend` cannot run ``file`` here; None if it can."""
    if device.type != "cpu" or file.facts["branches"] != "u8s8":
        return "it runs the CPU's int8 files on a CPU"
    if (reason := implementations()["vnni"]) is not None:  # without it there is no AMX either
        return reason
    width = file.settings["width"]
    return f"it needs a multiple of 32 feature maps, got {width}" if width % 32 else None


class Int8Backend:
    """An exported int8-cpu file by our own kernels: all blocks but the last in 8 bits.

    Args:
        file: what `onnx_file.read` returned, for which `unmet` is None.

    Raises:
        InputError: the file does not hold what its metadata says.
    """

    dtype = torch.uint8
    largest_batch: int | None = None

    def __init__(self, file: OnnxFile) -> None:
        self._histogram: str = file.settings["histogram"]
        self._impl = "amx" if implementations()["amx"] is None else "vnni"
        # the last branch, in floats in the file: in bfloat16 where that is as fast as 8 bits
        self._last_impl = "amx" if float_block.implementations()["amx"] is None else "auto"
        self.name = f"int8 {self._impl}, last block {'bfloat16' if self._last_impl == 'amx' else 'float32'}"
        read = _Reader(file)
        settings = file.settings
        width, channels, kernel = settings["width"], settings["channels"], settings["first_kernel"]
        self._first = read.layer("first", (width, channels, kernel, kernel))
        self._blocks = [read.int8_block(f"blocks.{index}", width) for index in range(settings["blocks"] - 1)]
        name = f"blocks.{settings['blocks'] - 1}"
        shape = width, width, 3, 3
        self._last_block = *read.layer(f"{name}.conv1", shape), *read.layer(f"{name}.conv2", shape)
        self._last = read.layer("last", (channels, width, 1, 1))
        self._width: int = width
        self._computes: str = settings.get("computes", "image")
        keep_some_freed_memory()

    def __call__(self, images: Tensor) -> Tensor:
        return from_float(self.floats(images), torch.uint8)

    def floats(self, images: Tensor) -> Tensor:
        """Stored images as `__call__` takes them; refined ones in [-1, 1], before they are rounded."""
        return in_cache(self._forward, prepare(images, self._histogram), self._width)

    def _forward(self, images: Tensor) -> Tensor:
        weight, bias = self._first
        x = F.conv2d(images, weight, bias, padding=weight.shape[2] // 2).relu_()
        for block in self._blocks:
            x = residual_block_int8(x, *block, self._impl)
        x = residual_block(x, *self._last_block, self._last_impl)
        return put_together(images, F.conv2d(x, *self._last), self._computes)


# in_scale, weight1, bias1, scale1, weight2, bias2, scale2
_Int8Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Reader:
    """The numbers of a file, each of the type and shape that it must have."""

    def __init__(self, file: OnnxFile) -> None:
        self._path = printable(file.path)
        self._arrays = file.arrays()

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
        array = self._arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise InputError(f"{self._path}: {name} must be {np.dtype(dtype)} {list(shape)}, got {got}")
        if not np.isfinite(array).all():
            raise InputError(f"{self._path}: {name} must be finite, got NaN or Inf")
        return array

    def layer(self, name: str, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """A convolution in float32: weight and bias."""
        weight = torch.from_numpy(self.array(f"{name}.weight", np.float32, shape).copy())
        bias = torch.from_numpy(self.array(f"{name}.bias", np.float32, shape[:1]).copy())
        return weight.contiguous(memory_format=torch.channels_last), bias

    def int8_block(self, name: str, width: int) -> _Int8Block:
        """Arguments of `residual_block_int8` behind the features."""
        per_unit = self.array(f"{name}.in.per_unit", np.float32, (width, 1, 1))[:, 0, 0]
        unit = self.array(f"{name}.branch.unit", np.float32, (width, 1, 1))[:, 0, 0]
        layers: list[Tensor] = []
        for conv, out_unit in (("conv1", np.float32(1)), ("conv2", unit / np.float32(FINER))):
            scale = self.array(f"{name}.{conv}.scale", np.float32, (width,))
            bias = self.array(f"{name}.{conv}.bias", np.int32, (width,)) * FINER
            weight = torch.from_numpy(self.array(f"{name}.{conv}.weight", np.int8, (width, width, 3, 3)).copy())
            layers += [
                weight.contiguous(memory_format=torch.channels_last),
                torch.from_numpy(np.rint(bias).clip(-(2**30), 2**30).astype(np.int32)),
                torch.from_numpy(scale * out_unit),
            ]
        weight1, bias1, scale1, weight2, bias2, scale2 = layers
        in_scale = torch.from_numpy(per_unit * np.float32(FINER))
        return in_scale, weight1, bias1, scale1, weight2, bias2, scale2
