"""The refiner's residual block (§3.1, Fig. 6): ``relu(x + conv(relu(conv(x))))``, two 3×3 convolutions of equal width.

It is nearly all of R's work. On a GPU cuDNN and `torch.compile` do it at the hardware's speed. A CPU without matrix
instructions spends its whole time in the convolutions' products; the C++ implementation spends a quarter as many, by
the minimal filtering algorithm F(4×4, 3×3) (Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR
2016), and has biases, ReLUs and the skip connection, forward and backward, ride on the passes over memory that it makes
anyway. Its error is about twice that of the plain sum: the polynomials are interpolated at ±1/√2 and ±√2. A weight's
gradient that is within rounding of 0 (2.5e-7 of its kernel's largest transformed value) is 0: where features are sparse
it is 0 in truth, and Adam would make a full step of the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops.history_swap import BUILD_INFO, NOT_LOADED

MOST_MAPS = 1024
"""Feature maps that the C++ implementation takes at most; their number must be a multiple of 8."""


def residual_block(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, impl: str = "auto"
) -> Tensor:
    """``relu(features + conv2(relu(conv1(features))))``, borders padded with zeros.

    Args:
        features: ``[B, C, H, W]``, floating point, best in channels_last.
        weight1: ``[C, C, 3, 3]``, of the first convolution; ``bias1`` ``[C]``.
        weight2: ``[C, C, 3, 3]``, of the second; ``bias2`` ``[C]``.
        impl: ``"reference"`` (plain PyTorch), ``"cpp"`` (C++ for AVX2; float32 on a CPU, C a multiple of 8 up to
            1,024), or ``"auto"``: "cpp" where it can serve the call, autocast is off and nothing is being exported.

    Returns:
        ``[B, C, H, W]``; "cpp" gives channels_last.

    Raises:
        InputError: an unknown ``impl``.
        UnavailableError: "cpp" was asked for and cannot serve the call.
    """
    if impl not in ("auto", "reference", "cpp"):
        raise InputError(f"impl must be one of auto, cpp, reference, got {impl!r}")
    if impl != "reference":
        reason = _unmet(features, weight1)
        if impl == "cpp" and reason is not None:
            raise UnavailableError(f"residual_block impl='cpp': {reason}")
        if reason is None and (
            impl == "cpp" or not (torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting())
        ):
            out: Tensor = _op(features.contiguous(memory_format=torch.channels_last), weight1, bias1, weight2, bias2)[0]
            return out
    return reference(features, weight1, bias1, weight2, bias2)[0]


def implementations() -> dict[str, str | None]:
    """Each implementation, in the order ``"auto"`` prefers them: None where it can run, otherwise why it cannot."""
    return {"cpp": _CPP_MISSING, "reference": None}


def reference(
    features: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    """The block in plain PyTorch: documentation, fallback, the tests' oracle. Second: ``relu(conv1(features))``."""
    hidden = F.relu(F.conv2d(features, weight1, bias1, padding=1))
    return F.relu(features + F.conv2d(hidden, weight2, bias2, padding=1)), hidden


def _missing() -> str | None:
    if NOT_LOADED is not None or BUILD_INFO is None:
        return NOT_LOADED
    if not BUILD_INFO["avx2"]:
        return "fastsimgan._C was built without AVX2 (another processor or compiler)"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability.startswith("AVX") else f"it needs AVX2, and torch finds {capability}"


# Read once, at import: the answer cannot change in a process, and torch.compile must not trace through it.
_CPP_MISSING = _missing()


def _unmet(features: Tensor, weight: Tensor) -> str | None:
    """Why C++ cannot serve this call; None if it can."""
    if _CPP_MISSING is not None:
        return _CPP_MISSING
    if features.device.type != "cpu" or features.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it needs float32 on a CPU, got {features.dtype} on {features.device}, weights {weight.dtype}"
    maps = features.shape[1]
    if maps % 8 or maps > MOST_MAPS:
        return f"it needs a multiple of 8 feature maps, at most {MOST_MAPS}, got {maps}"
    return None if features.numel() else f"features are empty: {list(features.shape)}"


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


def _fake(features: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(features)


def _backward_fake(
    grad: Tensor, features: Tensor, hidden: Tensor, out: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = features.shape[1]
    weights = [weight.new_empty(weight.shape) for weight in (weight1, weight2)]
    biases = [features.new_empty(maps) for _ in range(2)]
    return torch.empty_like(features), weights[0], biases[0], weights[1], biases[1]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, weight1, _, weight2, _ = inputs
    out, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(features, hidden, out, weight1, weight2)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    features, hidden, out, weight1, weight2 = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    return _backward_op(grad, features, hidden, out, weight1, weight2)


_library = torch.library.Library("fastsimgan", "FRAGMENT")
_library.define(
    "residual_block(Tensor features, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "residual_block_backward(Tensor grad, Tensor features, Tensor hidden, Tensor out, Tensor weight1, Tensor weight2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# _C registers the CPU's kernels; every other device, and all where it is missing, gets the reference.
_library.impl("residual_block", reference, "CompositeExplicitAutograd")
_library.impl("residual_block_backward", _backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastsimgan::residual_block", _fake, lib=_library)
torch.library.register_fake("fastsimgan::residual_block_backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastsimgan::residual_block", _backward, setup_context=_setup_context, lib=_library)
_op = torch.ops.fastsimgan.residual_block.default
_backward_op = torch.ops.fastsimgan.residual_block_backward.default
