"""What the two loss ops share: the patch-wise cross-entropy in plain PyTorch, and when Triton serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.ops._dispatch import INTERPRETED, TRITON_MISSING, Dispatch, triton_unusable

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def loss_dispatch(op: str) -> Dispatch:
    """A loss's implementations: Triton on CUDA, by request under its interpreter on a CPU too."""
    return Dispatch(op, lambda: {"triton": triton_unusable()}, {"cuda": ("triton",)})


def choose(dispatch: Dispatch, impl: str, tensors: tuple[Tensor, ...], unmet: str | None = None) -> str:
    """The implementation that serves a call on ``tensors``.

    Args:
        dispatch: of the op.
        impl: what was asked for.
        tensors: all that the kernel would read.
        unmet: a reason known to the caller why Triton cannot serve this call.
    """
    device = tensors[0].device

    def reason(_: str) -> str | None:
        if TRITON_MISSING or unmet:
            return TRITON_MISSING or unmet
        if device.type != "cuda" and not INTERPRETED:
            return f"the tensors are on {device}, and Triton needs CUDA (or TRITON_INTERPRET=1)"
        wrong = [tensor.dtype for tensor in tensors if tensor.dtype not in _TRITON_DTYPES]
        return f"{wrong[0]} is not float32, float16 or bfloat16" if wrong else None

    return dispatch.choose(impl, dispatch.automatic.get(device.type, ()), reason)


def check_logits(name: str, logits: Tensor) -> None:
    """InputError unless ``logits`` is a non-empty floating-point [B, 2, h, w]."""
    if logits.dim() != 4 or logits.shape[1] != 2 or logits.numel() == 0:
        raise InputError(f"{name} must be [B, 2, h, w] and not empty, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise InputError(f"{name} must be floating point, got {logits.dtype}")


def check_probability(name: str, value: float) -> None:
    """InputError unless ``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name} must be in [0, 1], got {value}")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any of ``tensors`` is: half precision is storage here, never arithmetic."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def patch_cross_entropy(logits: Tensor, real_target: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two-class cross-entropy at every patch, its gradient and the decision behind it.

    Args:
        logits: ``[B, 2, h, w]``, class 0 = real, class 1 = refined; the softmax is over these two, never over patches.
        real_target: the probability that the target puts on class 0, in [0, 1].

    Returns:
        In float32 (float64 for float64 logits): the cross-entropy ``[B, h, w]``, its gradient with respect to the
        logits ``[B, 2, h, w]``, and z = logit(refined) - logit(real) ``[B, h, w]``, so that D(.) = sigmoid(z).
    """
    logits = logits.to(accumulation_dtype(logits))
    z = logits[:, 1] - logits[:, 0]
    # -log(1 - D) = softplus(z) and -log D = softplus(-z). Written so that nothing overflows and nothing cancels,
    # whatever z: both share the last term, and each class keeps its own linear part.
    entropy = real_target * z.clamp(min=0) + (1 - real_target) * (-z).clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    grad_z = real_target * torch.sigmoid(z) - (1 - real_target) * torch.sigmoid(-z)
    return entropy, torch.stack((-grad_z, grad_z), dim=1), z
