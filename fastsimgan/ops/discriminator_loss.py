"""The discriminator's loss (Eq. 2, patch-wise as in §2.2), value, gradients and patch accuracies in one pass.

L_D = mean_i sum_patches -log D(x~_i) + mean_j sum_patches -log(1 - D(y_j))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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

__all__ = ["DiscriminatorLoss", "discriminator_loss", "DISPATCH", "implementations", "reference"]

DISPATCH = loss_dispatch("discriminator_loss")
implementations = DISPATCH.implementations


class DiscriminatorLoss(NamedTuple):
    """What ``discriminator_loss`` returns: scalars. Only ``loss`` is differentiable."""

    loss: Tensor  # sum over the patches of an image, mean over each batch's images, the two batches added
    refined_accuracy: Tensor  # share of the refined batch's patches that D calls refined, in [0, 1]
    real_accuracy: Tensor  # share of the real batch's patches that D calls real, in [0, 1]


def discriminator_loss(
    refined_logits: Tensor,
    real_logits: Tensor,
    *,
    real_target: float = 1.0,
    refined_target: float = 1.0,
    impl: str = "auto",
) -> DiscriminatorLoss:
    """Eq. 2: make D call refined images refined and real images real.

    A patch whose two logits are equal is undecided and counts as half right, so that a D that knows nothing is at 0.5.
    Gradients flow from ``loss`` to both tensors, once: a second derivative raises.

    Args:
        refined_logits: ``[B, 2, h, w]``, D's output for refined images; class 0 = real, class 1 = refined.
        real_logits: ``[B', 2, h', w']``, D's output for real images, same dtype; B' and the map may differ.
        real_target: probability that the target of a real image puts on "real", in [0, 1]; below 1 it smooths the
            label.
        refined_target: the same for refined images and "refined".
        impl: "auto", "reference" or "triton".

    Returns:
        The loss and D's accuracies.

    Raises:
        InputError: a bad shape, type or value.
        UnavailableError: ``impl`` cannot be had.
    """
    check_logits("refined_logits", refined_logits)
    check_logits("real_logits", real_logits)
    if real_logits.dtype != refined_logits.dtype:
        raise InputError(f"real_logits must have refined_logits' dtype {refined_logits.dtype}, got {real_logits.dtype}")
    if real_logits.device != refined_logits.device:
        raise InputError(f"real_logits must be on refined_logits' {refined_logits.device}, got {real_logits.device}")
    check_probability("real_target", real_target)
    check_probability("refined_target", refined_target)
    impl = choose(DISPATCH, impl, (refined_logits, real_logits))
    loss, refined_accuracy, real_accuracy, _ = _op(refined_logits, real_logits, real_target, refined_target, impl)
    return DiscriminatorLoss(loss, refined_accuracy, real_accuracy)


def reference(
    refined_logits: Tensor, real_logits: Tensor, real_target: float, refined_target: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in plain PyTorch: the three scalars, and both gradients of ``loss`` end to end in one flat tensor.

    One tensor, so that backward scales both at once; in the accumulation dtype, so that a loss scaler's factor comes
    before the rounding to float16, not after it.
    """
    refined_entropy, refined_grad, refined_z = patch_cross_entropy(refined_logits, 1.0 - refined_target)
    real_entropy, real_grad, real_z = patch_cross_entropy(real_logits, real_target)
    refined_images, real_images = refined_logits.shape[0], real_logits.shape[0]
    loss = refined_entropy.sum() / refined_images + real_entropy.sum() / real_images
    # sign(z) is 1 where D says refined, -1 where it says real, 0 where it is undecided.
    refined_accuracy = 0.5 + 0.5 * refined_z.sign().mean()
    real_accuracy = 0.5 - 0.5 * real_z.sign().mean()
    gradients = torch.cat((refined_grad.flatten() / refined_images, real_grad.flatten() / real_images))
    return loss, refined_accuracy, real_accuracy, gradients


# As in refiner_loss, the choice of implementation is an argument of the op.
@torch.library.custom_op("fastsimgan::discriminator_loss", mutates_args=())
def _op(
    refined_logits: Tensor, real_logits: Tensor, real_target: float, refined_target: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        return reference(refined_logits, real_logits, real_target, refined_target)
    from fastsimgan.kernels.discriminator_loss import launch

    return launch(refined_logits, real_logits, real_target, refined_target)


@_op.register_fake
def _(
    refined_logits: Tensor, real_logits: Tensor, real_target: float, refined_target: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(refined_logits)
    loss, refined_accuracy, real_accuracy = (refined_logits.new_empty((), dtype=dtype) for _ in range(3))
    gradients = refined_logits.new_empty(refined_logits.numel() + real_logits.numel(), dtype=dtype)
    return loss, refined_accuracy, real_accuracy, gradients


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    refined_logits, real_logits, *_ = inputs
    _, refined_accuracy, real_accuracy, gradients = output
    ctx.mark_non_differentiable(refined_accuracy, real_accuracy, gradients)
    ctx.save_for_backward(gradients)
    ctx.dtype, ctx.shapes = refined_logits.dtype, (refined_logits.shape, real_logits.shape)


def _backward(ctx, grad_loss: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        raise NotImplementedError("discriminator_loss is differentiable once: create_graph must be False")
    (gradients,) = ctx.saved_tensors
    refined_shape, real_shape = ctx.shapes
    gradients = (gradients * grad_loss).to(ctx.dtype)
    refined_grad, real_grad = gradients.split((refined_shape.numel(), real_shape.numel()))
    return refined_grad.view(refined_shape), real_grad.view(real_shape), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
