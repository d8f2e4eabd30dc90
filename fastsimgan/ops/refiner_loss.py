"""The refiner's loss (Eq. 4 with the local adversarial loss of §2.2), value and gradients in one pass.

    L_R = mean_i [ sum_patches -log(1 - D(x~_i)) + lam * sum_pixels |psi(x~_i) - psi(x_i)| ]

The sums run within one image and the mean over the images, so lam means the same at every batch size. A port that
sums the cross-entropy over patches but averages the L1 over an image's C*H*W values means lam_mean = lam * C*H*W.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.ops._patch_loss import (
    accumulation_dtype,
    check_logits,
    check_probability,
    choose,
    loss_dispatch,
    patch_cross_entropy,
)

__all__ = ["PSI", "RefinerLoss", "DISPATCH", "implementations", "reference", "refiner_loss"]

DISPATCH = loss_dispatch("refiner_loss")
implementations = DISPATCH.implementations

PSI = ("identity", "channel_mean", "gradients")


class RefinerLoss(NamedTuple):
    """What ``refiner_loss`` returns. Only ``loss`` is differentiable; the other two are for reporting."""

    loss: Tensor  # scalar: mean over images of adversarial + lam * self_regularisation
    adversarial: Tensor  # [B]: cross-entropy summed over the patches of one image
    self_regularisation: Tensor  # [B]: |psi(refined) - psi(synthetic)| summed over one image, without lam


def refiner_loss(
    logits: Tensor,
    refined: Tensor,
    synthetic: Tensor,
    *,
    lam: float,
    psi: str = "identity",
    real_target: float = 1.0,
    impl: str = "auto",
) -> RefinerLoss:
    """Eq. 4: make D call the refined images real, and keep them close to the synthetic ones.

    Gradients flow from ``loss`` to all three tensors, once: a second derivative raises.

    Args:
        logits: ``[B, 2, h, w]``, D's output for ``refined``; class 0 = real, class 1 = refined. A 1x1 map is the global
            adversarial loss of the paper's ablation.
        refined, synthetic: ``[B, C, H, W]`` in [-1, 1]. Dtypes may differ; sums are in float32.
        lam: weight of the self-regularisation, >= 0, in the paper's form (a sum over pixels, see the module).
        psi: "identity" (the paper's experiments), "channel_mean" (colour may change, brightness not), or "gradients"
            (forward differences in x and y: edges are kept, a constant offset is free). All three are linear.
        real_target: probability that the target puts on "real", in [0, 1]; below 1 it smooths the label.
        impl: "auto", "reference" or "triton". The Triton kernel knows psi="identity" only; for the others "auto" takes
            the reference on every device.

    Returns:
        The loss, and its two terms for each image.

    Raises:
        InputError: a bad shape, type or value.
        UnavailableError: ``impl`` cannot be had.
    """
    check_logits("logits", logits)
    if refined.dim() != 4 or refined.numel() == 0:
        raise InputError(f"refined must be [B, C, H, W] and not empty, got {list(refined.shape)}")
    if synthetic.shape != refined.shape:
        raise InputError(f"synthetic must have refined's shape {list(refined.shape)}, got {list(synthetic.shape)}")
    if logits.shape[0] != refined.shape[0]:
        raise InputError(f"logits must hold refined's {refined.shape[0]} images, got {logits.shape[0]}")
    if not (refined.is_floating_point() and synthetic.is_floating_point()):
        raise InputError(f"refined and synthetic must be floating point, got {refined.dtype} and {synthetic.dtype}")
    if not (logits.device == refined.device == synthetic.device):
        raise InputError(
            "logits, refined and synthetic must be on one device, "
            f"got {logits.device}, {refined.device} and {synthetic.device}"
        )
    if not (math.isfinite(lam) and lam >= 0):
        raise InputError(f"lam must be finite and at least 0, got {lam}")
    if psi not in PSI:
        raise InputError(f"psi must be one of {', '.join(PSI)}, got {psi!r}")
    check_probability("real_target", real_target)
    unmet = None if psi == "identity" else f"the kernel knows psi='identity' only, got {psi!r}"
    impl = choose(DISPATCH, impl, (logits, refined, synthetic), unmet)
    loss, adversarial, self_regularisation, _, _ = _op(logits, refined, synthetic, lam, psi, real_target, impl)
    return RefinerLoss(loss, adversarial, self_regularisation)


def reference(
    logits: Tensor, refined: Tensor, synthetic: Tensor, lam: float, psi: str, real_target: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op in plain PyTorch: loss, adversarial [B], self_regularisation [B], and the two stored gradients.

    grad_logits [B, 2, h, w], always in the accumulation dtype, is the gradient of ``loss`` itself. grad_refined
    [B, C, H, W], in refined's dtype and layout, is that gradient up to the factor of ``_pending_scale``.
    """
    images = refined.shape[0]
    entropy, grad_logits, _ = patch_cross_entropy(logits, real_target)
    adversarial = entropy.sum(dim=(1, 2))

    dtype = accumulation_dtype(refined, synthetic)
    # psi is linear, so |psi(refined) - psi(synthetic)| = |psi(difference)|: one small number, not two large ones.
    difference = refined.to(dtype) - synthetic.to(dtype)
    if psi == "identity":
        self_regularisation = difference.abs().sum(dim=(1, 2, 3))
        slope = difference.sign()
    elif psi == "channel_mean":
        mean = difference.mean(dim=1, keepdim=True)
        self_regularisation = mean.abs().sum(dim=(1, 2, 3))
        slope = (mean.sign() / refined.shape[1]).expand_as(refined)
    else:
        dx, dy = difference.diff(dim=3), difference.diff(dim=2)
        self_regularisation = dx.abs().sum(dim=(1, 2, 3)) + dy.abs().sum(dim=(1, 2, 3))
        # The transpose of a forward difference: each |step| pulls its two ends apart by its sign.
        slope = -F.pad(dx.sign(), (1, 1)).diff(dim=3) - F.pad(dy.sign(), (0, 0, 1, 1)).diff(dim=2)

    loss = (adversarial + lam * self_regularisation).mean()
    grad_refined = torch.empty_like(refined, memory_format=memory_format(refined))
    torch.mul(slope, _stored_scale(refined, lam), out=grad_refined)
    return loss, adversarial, self_regularisation, grad_logits / images, grad_refined


def memory_format(refined: Tensor) -> torch.memory_format:
    """Layout of grad_refined: channels_last for an image that is so and nothing else, else contiguous."""
    only_last = refined.is_contiguous(memory_format=torch.channels_last) and not refined.is_contiguous()
    return torch.channels_last if only_last else torch.contiguous_format


def _stored_scale(refined: Tensor, lam: float) -> float:
    """Factor that forward puts into grad_refined.

    lam / B, so that backward has nothing left to do when the incoming gradient is 1. But float16 would lose it: 1e-4 /
    512 is a subnormal with two bits, and a loss scaler's 65,536 would come too late. There the slope itself is stored.
    """
    return 1.0 if refined.dtype == torch.float16 else lam / refined.shape[0]


def _pending_scale(refined: Tensor, lam: float) -> float:
    """Factor that ``_stored_scale`` left for backward."""
    return lam / refined.shape[0] if refined.dtype == torch.float16 else 1.0


# The choice of implementation is an argument of the op: so "reference" can be had on CUDA, and "triton" on the CPU
# under Triton's interpreter. A launcher registered for the CUDA key could serve neither.
@torch.library.custom_op("fastsimgan::refiner_loss", mutates_args=())
def _op(
    logits: Tensor, refined: Tensor, synthetic: Tensor, lam: float, psi: str, real_target: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        return reference(logits, refined, synthetic, lam, psi, real_target)
    from fastsimgan.kernels.refiner_loss import launch

    stored_scale = _stored_scale(refined, lam)
    return launch(logits, refined, synthetic, lam, real_target, stored_scale, memory_format(refined))


@_op.register_fake
def _(
    logits: Tensor, refined: Tensor, synthetic: Tensor, lam: float, psi: str, real_target: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = refined.shape[0]
    logit_dtype, image_dtype = accumulation_dtype(logits), accumulation_dtype(refined, synthetic)
    return (
        logits.new_empty((), dtype=accumulation_dtype(logits, refined, synthetic)),
        logits.new_empty(images, dtype=logit_dtype),
        refined.new_empty(images, dtype=image_dtype),
        logits.new_empty(logits.shape, dtype=logit_dtype),
        torch.empty_like(refined, memory_format=memory_format(refined)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, refined, synthetic, lam, _, _, impl = inputs
    _, adversarial, self_regularisation, grad_logits, grad_refined = output
    ctx.mark_non_differentiable(adversarial, self_regularisation, grad_logits, grad_refined)
    ctx.save_for_backward(grad_logits, grad_refined)
    ctx.logits_dtype, ctx.synthetic_dtype = logits.dtype, synthetic.dtype
    ctx.pending_scale, ctx.impl = _pending_scale(refined, lam), impl


def _owns_saved(grad_loss: Tensor) -> bool:
    """Whether backward may hand out the saved gradient itself, scaled in place, instead of a scaled copy.

    That spares a pass over the images: the kernel leaves at once if the incoming gradient is 1, as in a plain
    ``loss.backward()``, and no host needs to know. Not if the graph is kept for another backward. Not while
    torch.compile traces (grad_loss is then a subclass): a plain product fuses there with tanh's derivative.
    """
    return type(grad_loss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


def _backward(ctx, grad_loss: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise NotImplementedError("refiner_loss is differentiable once: create_graph must be False")
    grad_logits, grad_refined = ctx.saved_tensors
    if ctx.impl == "triton" and _owns_saved(grad_loss):
        from fastsimgan.kernels.refiner_loss import scale_

        grad_logits = scale_(grad_loss, grad_logits, grad_refined, ctx.pending_scale, ctx.logits_dtype)
        torch.autograd.graph.increment_version(grad_refined)
    else:
        grad_logits = (grad_logits * grad_loss).to(ctx.logits_dtype)
        grad_refined = (grad_refined * (grad_loss * ctx.pending_scale)).to(grad_refined.dtype)
    # psi is linear: what pulls refined one way pulls synthetic the other.
    grad_synthetic = -grad_refined.to(ctx.synthetic_dtype) if ctx.needs_input_grad[2] else None
    return grad_logits, grad_refined, grad_synthetic, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
