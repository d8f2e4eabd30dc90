"""The refiner's residual block (§3.1, Fig. 6): ``relu(x + conv(relu(conv(x))))``, two 3×3 convolutions of equal width.

It is nearly all of R's work. On a GPU in 16 bits it is bound by memory as much as by products: "triton" has rounding,
biases, ReLUs, masks and the skip connection ride on two products forward and two backward, so that a block moves 16
bytes a value forward with float32 features, and 10 with 16-bit ones. Whether that is faster than cuDNN or
`torch.compile` on a device is found by a race there (`ops.residual_block_race`), not assumed. In bfloat16 on a CPU with
AMX, products are so cheap that passes over memory count: "amx" takes both convolutions, and all of their gradients, of
an image while it is in the core's cache, with float32 sums and a float32 skip connection. A CPU in float32 spends its
whole time in the convolutions' products; "cpp" spends a quarter as many, by the minimal filtering algorithm F(4×4, 3×3)
(Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016), and has biases, ReLUs and the skip
connection, forward and backward, ride on the passes over memory that it makes anyway. Its error is about twice that of
the plain sum: the polynomials are interpolated at ±1/√2 and ±√2. A weight's gradient that is within rounding of 0
(2.5e-7 of its kernel's largest transformed value) is 0: where features are sparse it is 0 in truth, and Adam would make
a full step of the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fastsimgan.ops import _dispatch
from fastsimgan.ops._extension import lacks

MOST_MAPS = 1024
"""Feature maps that "cpp" and "triton" take at most."""

_UNITS = {"cpp": 8, "amx": 32, "triton": 16}  # what the number of feature maps must be a multiple of


def residual_block(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, impl: str = "auto"
) -> Tensor:
    """``relu(features + conv2(relu(conv1(features))))``, borders padded with zeros.

    Args:
        features: ``[B, C, H, W]``, floating point, best in channels_last.
        weight1: ``[C, C, 3, 3]``, of the first convolution; ``bias1`` ``[C]``.
        weight2: ``[C, C, 3, 3]``, of the second; ``bias2`` ``[C]``.
        impl: ``"reference"`` (plain PyTorch), ``"cpp"`` (C++ for AVX2 and AVX-512; float32 on a CPU, C a multiple of 8
            up to 1,024), ``"amx"`` (C++ for AMX: products in bfloat16 of float32 tensors on a CPU, also of bfloat16
            features, whose result is float32; C a multiple of 32),
            ``"triton"`` (CUDA: products in the 16-bit type of autocast or of the features, sums in float32; features
            float32, which then go through the skip connection unrounded, or of that type; C a multiple of 16 up to
            1,024), or ``"auto"``: on a CPU "amx" under autocast to bfloat16 and "cpp" without autocast, where they can
            serve the call and nothing is being exported; on CUDA the reference, until a race on the device says
            otherwise (`ops.residual_block_race.race`, whose answer the caller passes here).

    Returns:
        ``[B, C, H, W]``; "cpp" and "amx" give channels_last and float32, "triton" channels_last and features' type.

    Raises:
        InputError: an unknown ``impl``.
        UnavailableError: "triton", "cpp" or "amx" was asked for and cannot serve the call.
    """
    layers = weight1, bias1, weight2, bias2
    chosen = DISPATCH.choose(impl, _automatic() if impl == "auto" else (), lambda name: _unmet(name, features, layers))
    if chosen == "reference":
        return reference(features, *layers)[0]
    features = features.contiguous(memory_format=torch.channels_last)
    out: Tensor
    if chosen == "triton":
        out = _triton_op(features, *layers, _products(features))[0]
    else:
        # of 16-bit features, a first layer's under autocast: from there on they are float32
        out = (_op if chosen == "cpp" else _bfloat16_op)(features.float(), *layers)[0]
    return out


def _automatic() -> tuple[str, ...]:
    """What "auto" takes if it can serve the call."""
    if torch.compiler.is_exporting():
        return ()
    if not torch.is_autocast_enabled("cpu"):
        return ("cpp",)
    return ("amx",) if torch.get_autocast_dtype("cpu") == torch.bfloat16 else ()


def reference(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    """The block in plain PyTorch: documentation, fallback, the tests' oracle. Second: ``relu(conv1(features))``."""
    hidden = F.relu(F.conv2d(features, weight1, bias1, padding=1))
    return F.relu(features + F.conv2d(hidden, weight2, bias2, padding=1)), hidden


def _cpp_missing() -> str | None:
    if (reason := lacks("avx2", "AVX2 (another processor or compiler)")) is not None:
        return reason
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability.startswith("AVX") else f"it needs AVX2, and torch finds {capability}"


def _amx_missing() -> str | None:
    if (reason := lacks("amx", "AMX (another processor, system or compiler)")) is not None:
        return reason
    if not torch.ops.fastsimgan.amx_usable():
        return "it needs a processor with AMX for bfloat16, and Linux's leave to use it"
    return None


# Read once, at import: the answers cannot change in a process, and torch.compile must not trace through it.
_library = torch.library.Library("fastsimgan", "FRAGMENT")
_library.define("amx_usable() -> bool")
_MISSING = {
    "triton": _dispatch.triton_unusable(),
    "amx": _amx_missing(),
    "cpp": _cpp_missing(),
}
DISPATCH = _dispatch.Dispatch(
    "residual_block", lambda: _MISSING, {"cpu": ("cpp", "amx"), "cuda": ("triton", _dispatch.RACED)}
)
implementations = DISPATCH.implementations


def _unmet(impl: str, features: Tensor, layers: tuple[Tensor, Tensor, Tensor, Tensor]) -> str | None:
    """Why ``impl`` cannot serve this call; None if it can."""
    if _MISSING[impl] is not None:
        return _MISSING[impl]
    if impl == "triton":
        if (reason := _triton_unmet(features, layers)) is not None:
            return reason
    elif (
        features.device.type != "cpu"
        or layers[0].dtype != torch.float32
        or features.dtype not in ((torch.float32,) if impl == "cpp" else (torch.float32, torch.bfloat16))
    ):
        return f"it needs float32 on a CPU, got {features.dtype} on {features.device}, weights {layers[0].dtype}"
    maps, unit = features.shape[1], _UNITS[impl]
    if maps % unit or (impl != "amx" and maps > MOST_MAPS):
        most = f", at most {MOST_MAPS}" if impl != "amx" else ""
        return f"it needs a multiple of {unit} feature maps{most}, got {maps}"
    return None if features.numel() else f"features are empty: {list(features.shape)}"


def _products(features: Tensor) -> torch.dtype:
    """The type that "triton" multiplies in: autocast's, otherwise that of ``features``."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def _triton_unmet(features: Tensor, layers: tuple[Tensor, Tensor, Tensor, Tensor]) -> str | None:
    if not (features.is_cuda or (_dispatch.INTERPRETED and features.device.type == "cpu")):
        return f"it needs CUDA (or TRITON_INTERPRET=1 and a CPU), got {features.device}"
    if any(layer.device != features.device for layer in layers):
        return f"weights and biases must be on features' {features.device}"
    if features.is_cuda and _too_old(features.device.index or 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    products = _products(features)
    if products not in (torch.float16, torch.bfloat16):
        return f"it multiplies in float16 or bfloat16, under autocast or of such features, got {products}"
    for tensor in (features, *layers):
        if tensor.dtype not in (torch.float32, products):
            return f"features, weights and biases must be torch.float32 or {products}, got {tensor.dtype}"
    return None


def _too_old(device: int) -> bool:
    # Dynamo takes this call for a constant; `torch.compiler`'s decorators for that import Dynamo, a second's work
    return torch.cuda.get_device_properties(device).major < 8


def _backward_reference(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, weight1, bias1, weight2 and bias2."""
    outer = grad * (out > 0)
    inner = conv2d_input(hidden.shape, weight2, outer, padding=1) * (hidden > 0)
    grad_features = outer + conv2d_input(features.shape, weight1, inner, padding=1)
    grad_weight1 = conv2d_weight(features, weight1.shape, inner, padding=1)
    grad_weight2 = conv2d_weight(hidden, weight2.shape, outer, padding=1)
    return grad_features, grad_weight1, inner.sum((0, 2, 3)), grad_weight2, outer.sum((0, 2, 3))


def _bfloat16_reference(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    """The block with products in bfloat16, and what goes through the skip connection in float32."""
    first, second = weight1.bfloat16(), weight2.bfloat16()
    hidden = F.relu(F.conv2d(features.bfloat16(), first, bias1.bfloat16(), padding=1))
    return F.relu(features + F.conv2d(hidden, second, bias2.bfloat16(), padding=1)), hidden


def _bfloat16_backward_reference(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rounded = (tensor.bfloat16().float() for tensor in (grad, features, weight1, weight2))
    of_out, of_features, *weights = rounded
    found = _backward_reference(of_out, of_features, hidden.float(), out, *weights)
    return found[0] + (grad - of_out) * (out > 0), *found[1:]


def _fake(features: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(features)


def _bfloat16_fake(features: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(features, dtype=torch.bfloat16)


def _backward_fake(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = features.shape[1]
    weights = [weight.new_empty(weight.shape) for weight in (weight1, weight2)]
    biases = [features.new_empty(maps) for _ in range(2)]
    return torch.empty_like(features), weights[0], biases[0], weights[1], biases[1]


def _triton_forward(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    from fastsimgan.kernels import residual_block as kernels

    return kernels.forward(features, weight1, bias1, weight2, bias2, products)


def _triton_backward(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastsimgan.kernels import residual_block as kernels

    return kernels.backward(grad, features, hidden, out, weight1, weight2)


def _triton_fake(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    last = torch.channels_last
    return torch.empty_like(features, memory_format=last), torch.empty_like(
        features, dtype=products, memory_format=last
    )


def _triton_backward_fake(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    through = torch.empty_like(features, memory_format=torch.channels_last)
    bias1, bias2 = (features.new_empty(features.shape[1], dtype=torch.float32) for _ in range(2))
    return through, torch.empty_like(weight1), bias1, torch.empty_like(weight2), bias2


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, weight1, _, weight2, *_ = inputs
    out, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(features, hidden, out, weight1, weight2)


def _register(
    name: str, forward: Any, forward_fake: Any, backward: Any, backward_fake: Any = _backward_fake, more: str = ""
) -> tuple[Any, Any]:
    """Define an op and its backward; _C registers the CPU's kernels, everything else gets ``forward``, ``backward``.

    Args:
        name: of the op.
        forward, backward: the reference.
        forward_fake, backward_fake: give what that gives, without values.
        more: an argument of the op alone, behind the tensors.

    Returns:
        The op, and its backward.
    """
    layers = "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2"
    kept = "Tensor grad, Tensor features, Tensor hidden, Tensor out, Tensor weight1, Tensor weight2"
    _library.define(
        f"{name}(Tensor features, {layers}{', ' if more else ''}{more}) -> (Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    _library.define(
        f"{name}_backward({kept}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
    )
    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    op, backward_op = (getattr(torch.ops.fastsimgan, full).default for full in (name, f"{name}_backward"))

    def gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
        features, hidden, out, weight1, weight2 = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        found = backward_op(grad, features, hidden, out, weight1, weight2)
        return (*found, None) if more else found

    torch.library.register_fake(f"fastsimgan::{name}", forward_fake, lib=_library)
    torch.library.register_fake(f"fastsimgan::{name}_backward", backward_fake, lib=_library)
    torch.library.register_autograd(f"fastsimgan::{name}", gradients, setup_context=_setup_context, lib=_library)
    return op, backward_op


_op, _backward_op = _register("residual_block", reference, _fake, _backward_reference)
_bfloat16_op, _bfloat16_backward_op = _register(
    "residual_block_bfloat16", _bfloat16_reference, _bfloat16_fake, _bfloat16_backward_reference
)
_triton_op, _triton_backward_op = _register(
    "residual_block_triton",
    _triton_forward,
    _triton_fake,
    _triton_backward,
    _triton_backward_fake,
    more="ScalarType products",
)
