"""The refiner's residual block with products of 8 bits, for inference on a CPU: ``relu(x + conv(relu(conv(x))))``.

What goes through the skip connection stays float32, and so does what the branch adds to it: a runtime that is handed a
graph of 8-bit operators, such as onnxruntime, has to round the branch's result to 8 bits as well, and spends half of
its time between the convolutions. Sums are exact 32-bit integers and every rounding is to even, so that all
implementations give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.errors import InputError
from fastsimgan.ops._dispatch import Dispatch
from fastsimgan.ops._extension import lacks

TOP = 255
"""The largest value of a rounded feature."""


def residual_block_int8(
    features: Tensor,
    in_scale: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    impl: str = "auto",
) -> Tensor:
    """``relu(features + scale2 * (bias2 + conv2(hidden)))``, borders padded with zeros, where ``hidden`` is
    ``scale1 * (bias1 + conv1(features * in_scale))``; what each convolution is given is rounded to [0, 255].

    Args:
        features: ``[B, C, H, W]`` float32, finite and not negative, best in channels_last; no gradient comes back.
        in_scale: ``[C]`` float32, what makes features whole numbers.
        weight1: ``[C, C, 3, 3]`` int8, of the first convolution; ``bias1`` ``[C]`` int32, ``scale1`` ``[C]`` float32.
        weight2: ``[C, C, 3, 3]`` int8, of the second; ``bias2`` ``[C]`` int32, ``scale2`` ``[C]`` float32. Biases leave
            room for the sums: ``abs(bias) + 255 * 127 * 9 * C`` below 2^31.
        impl: ``"reference"`` (plain PyTorch), ``"vnni"`` (C++ for AVX-512's VNNI; C a multiple of 32), ``"amx"`` (C++
            for AMX; the same), or ``"auto"``: the fastest that can serve the call.

    Returns:
        ``[B, C, H, W]`` float32, the same bits from all; "vnni" and "amx" give channels_last.

    Raises:
        InputError: an unknown ``impl``, or an argument of another type or shape.
        UnavailableError: "vnni" or "amx" was asked for and cannot serve the call.
    """
    _check(features, in_scale, weight1, bias1, scale1, weight2, bias2, scale2)
    chosen = DISPATCH.choose(impl, tuple(_MISSING), lambda name: _unmet(name, features))
    layers = weight1, bias1, scale1, weight2, bias2, scale2
    if chosen == "reference":
        return reference(features, in_scale, *layers)
    features = features.contiguous(memory_format=torch.channels_last)
    numbers = (values if values.dim() == 4 else values.contiguous() for values in (in_scale, *layers))
    out: Tensor = _op(features, *numbers, chosen == "amx")
    return out


def reference(
    features: Tensor,
    in_scale: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    amx: bool = False,
) -> Tensor:
    """The block in plain PyTorch: documentation, fallback, the tests' oracle. Sums in float64 are exact."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        sums = F.conv2d(x.round().clamp(0, TOP).double(), weight.double(), bias.double(), padding=1)
        return sums.float() * scale[:, None, None]

    hidden = layer(features * in_scale[:, None, None], weight1, bias1, scale1)
    return F.relu(features + layer(hidden, weight2, bias2, scale2))


def _check(features: Tensor, *numbers: Tensor) -> None:
    if features.dim() != 4 or features.dtype != torch.float32:
        raise InputError(f"features must be float32 [B, C, H, W], got {features.dtype} {list(features.shape)}")
    if torch.is_grad_enabled() and features.requires_grad:
        raise InputError("features must not require a gradient: in 8 bits there is none")
    maps = features.shape[1]
    for name, values in zip(_NUMBERS, numbers, strict=True):
        weight, dtype = name.startswith("weight"), _NUMBERS[name]
        shape = (maps, maps, 3, 3) if weight else (maps,)
        if values.dtype != dtype or values.shape != shape:
            raise InputError(f"{name} must be {dtype} {list(shape)}, got {values.dtype} {list(values.shape)}")


_NUMBERS = {
    "in_scale": torch.float32,
    "weight1": torch.int8,
    "bias1": torch.int32,
    "scale1": torch.float32,
    "weight2": torch.int8,
    "bias2": torch.int32,
    "scale2": torch.float32,
}


def _missing(impl: str) -> str | None:
    if (reason := lacks("amx", "VNNI and AMX (another processor, system or compiler)")) is not None:
        return reason
    if not torch.ops.fastsimgan.int8_usable(impl == "amx"):
        return f"it needs a processor with {'AMX' if impl == 'amx' else 'VNNI of AVX-512'}, and Linux's leave to use it"
    return None


_library = torch.library.Library("fastsimgan", "FRAGMENT")
_library.define("int8_usable(bool amx) -> bool")
_MISSING = {impl: _missing(impl) for impl in ("amx", "vnni")}  # the answers cannot change in a process
DISPATCH = Dispatch("residual_block_int8", lambda: _MISSING, {"cpu": tuple(_MISSING)})
implementations = DISPATCH.implementations


def _unmet(impl: str, features: Tensor) -> str | None:
    """Why ``impl`` cannot serve this call; None if it can."""
    if _MISSING[impl] is not None:
        return _MISSING[impl]
    if features.device.type != "cpu":
        return f"it needs a CPU, got {features.device}"
    if features.shape[1] % 32:
        return f"it needs a multiple of 32 feature maps, got {features.shape[1]}"
    return None if features.numel() else f"features are empty: {list(features.shape)}"


def _fake(features: Tensor, *_: Tensor | bool) -> Tensor:
    return torch.empty_like(features)


_library.define(
    "residual_block_int8(Tensor features, Tensor in_scale, Tensor weight1, Tensor bias1, Tensor scale1, "
    "Tensor weight2, Tensor bias2, Tensor scale2, bool amx) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("residual_block_int8", reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastsimgan::residual_block_int8", _fake, lib=_library)
_op = torch.ops.fastsimgan.residual_block_int8.default
