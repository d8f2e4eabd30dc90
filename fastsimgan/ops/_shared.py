"""What the two loss ops share: the patch-wise cross-entropy in plain PyTorch, and the choice of implementation."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata

import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError

# Read once, at import: the answers cannot change in a process, and torch.compile must not trace through them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _triton_missing() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if INTERPRETED:
        triton, numpy = (metadata.version(package) for package in ("triton", "numpy"))
        old, new = (tuple(int(part) for part in version.split(".")[:2]) for version in (triton, numpy))
        if old < (3, 7) and new >= (2, 4):  # which no longer makes a number of an array of one
            return f"the interpreter of triton {triton} needs numpy < 2.4, got {numpy}"
    return None


_TRITON_MISSING = _triton_missing()


def implementations() -> dict[str, str | None]:
    """Each implementation, in the order "auto" prefers them: None where it can run, otherwise why it cannot."""
    no_device = None if INTERPRETED or torch.cuda.is_available() else "no CUDA device"
    return {"triton": _TRITON_MISSING or no_device, "reference": None}


def choose(op: str, impl: str, tensors: tuple[Tensor, ...], unmet: str | None = None) -> str:
    """Resolve ``impl`` to "reference" or "triton".

    "auto" takes Triton on CUDA tensors that it can handle, and the reference otherwise. ``unmet`` is a reason
    known to the caller why Triton cannot serve this call. UnavailableError if "triton" was asked for and cannot be had.
    """
    if impl not in ("auto", "reference", "triton"):
        raise InputError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return "reference"
    on_cuda = tensors[0].is_cuda
    reason = _TRITON_MISSING or unmet
    if reason is None and not on_cuda and not INTERPRETED:
        reason = f"the tensors are on {tensors[0].device}, and Triton needs CUDA (or TRITON_INTERPRET=1)"
    for tensor in tensors:
        if reason is None and tensor.dtype not in _TRITON_DTYPES:
            reason = f"{tensor.dtype} is not float32, float16 or bfloat16"
    if impl == "auto":
        return "triton" if on_cuda and reason is None else "reference"
    if reason is not None:
        raise UnavailableError(f"{op} with impl='triton' cannot run: {reason}")
    return "triton"


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

    logits: [B, 2, h, w], class 0 = real, class 1 = refined; the softmax is over these two, never over patches.
    real_target: the probability that the target puts on class 0, in [0, 1].

    Returns, in float32 (float64 for float64 logits): the cross-entropy [B, h, w], its gradient with respect to the
    logits [B, 2, h, w], and z = logit(refined) - logit(real) [B, h, w], so that D(.) = sigmoid(z).
    """
    logits = logits.to(accumulation_dtype(logits))
    z = logits[:, 1] - logits[:, 0]
    # -log(1 - D) = softplus(z) and -log D = softplus(-z). Written so that nothing overflows and nothing cancels,
    # whatever z: both share the last term, and each class keeps its own linear part.
    entropy = real_target * z.clamp(min=0) + (1 - real_target) * (-z).clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    grad_z = real_target * torch.sigmoid(z) - (1 - real_target) * torch.sigmoid(-z)
    return entropy, torch.stack((-grad_z, grad_z), dim=1), z
