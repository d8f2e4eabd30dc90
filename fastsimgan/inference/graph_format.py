"""The forms in which a refiner is exported, and the names of their input and output. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

OUTPUT = "refined"
Branches = Literal["float32", "float16", "u8s8", "s8s8", "fp8"]
BRANCHES = get_args(Branches)
NEEDS_ONNX = "ONNX files need the package onnx: pip install 'fastsimgan[onnx]'"

#: All that a graph of ours may hold: anything else was not written here.
OPERATORS = frozenset(
    "Add Cast Clip Conv DequantizeLinear Div Equal Floor GatherElements Greater Less LessOrEqual MatMul Max Mul "
    "QuantizeLinear ReduceMax ReduceMin ReduceSum Relu Reshape Round Shape Sub Tanh Transpose Where".split()
)


@dataclass(frozen=True)
class Form:
    """What a graph takes, and the numbers in which it computes.

    In float16 everything does, up to the last layer's output. In 8 bits the residual branches do, and the first and the
    last layer (1 % of the work) and the sums along the skip connections are float32. The image is float32 in all.
    """

    uint8: bool
    """Stored uint8 images in and out, or prepared float32 in [-1, 1]."""
    branches: Branches
    """``u8s8``: unsigned 8-bit activations, signed weights, branch outputs rounded to 8 bits too (onnxruntime, CPU);
    ``s8s8``: both signed and symmetric, float outputs (TensorRT); ``fp8``: float8 e4m3 (TensorRT, sm_89 and later).
    The last branch of these three is in float32 or float16: half of their error came from it."""

    @property
    def quantised(self) -> bool:
        return self.branches in ("u8s8", "s8s8", "fp8")

    def of_branch(self, block: int, blocks: int) -> str:
        """The numbers of one block's branch, of ``blocks``."""
        if self.quantised and block == blocks - 1:
            return "float32" if self.branches == "u8s8" else "float16"
        return self.branches


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if these are not a refiner's settings (`refiner.describe`)."""
    for key, least in (("channels", 1), ("width", 1), ("blocks", 0), ("first_kernel", 1)):
        if type(settings[key]) is not int or settings[key] < least:
            raise ValueError(f"{key} must be a whole number, at least {least}, got {settings[key]!r}")
    low, high = settings.get("range", (0.0, 1.0))
    if not -math.inf < float(low) < float(high) < math.inf:
        raise ValueError(f"range must be two numbers, the second larger, got {settings['range']!r}")
    if settings.get("computes", "image") not in ("change", "image"):  # files without it are older: "image"
        raise ValueError(f"computes must be change or image, got {settings['computes']!r}")
    if settings["histogram"] not in ("keep", "equalise"):
        raise ValueError(f"histogram must be keep or equalise, got {settings['histogram']!r}")


def input_name(uint8: bool, histogram: str) -> str:
    """``images`` (stored uint8), ``normalised`` or ``equalised_and_normalised`` (floats in [-1, 1])."""
    if uint8:
        return "images"
    return "equalised_and_normalised" if histogram == "equalise" else "normalised"
