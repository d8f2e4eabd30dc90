"""Eq. 2 in two launches: one program an image of either batch, then one program that adds up in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsimgan.kernels.patch_cross_entropy import class_layout, image_cross_entropy, patch_block

TILE = 1024  # images the second launch adds at a time


@triton.jit
def forward_kernel(
    refined_logits,
    real_logits,
    refined_gradients,
    real_gradients,
    partial,
    refined_images,
    refined_patches,
    refined_class_stride,
    refined_patch_stride,
    refined_on_real,
    refined_scale,
    real_patches,
    real_class_stride,
    real_patch_stride,
    real_on_real,
    real_scale,
    BLOCK: tl.constexpr,
):
    """Programs 0 .. refined_images-1 take a refined image each, the others a real one.

    refined_on_real, real_on_real: probability that the batch's target puts on class 0, real.
    refined_scale, real_scale: factors of the gradients.
    partial: [images of both, 2], an image's sums of the cross-entropy and of sign(z).
    """
    program = tl.program_id(0).to(tl.int64)
    if program < refined_images:
        entropy, sign = image_cross_entropy(
            refined_logits,
            refined_gradients,
            program,
            refined_patches,
            refined_class_stride,
            refined_patch_stride,
            refined_on_real,
            refined_scale,
            BLOCK,
        )
    else:
        entropy, sign = image_cross_entropy(
            real_logits,
            real_gradients,
            program - refined_images,
            real_patches,
            real_class_stride,
            real_patch_stride,
            real_on_real,
            real_scale,
            BLOCK,
        )
    tl.store(partial + 2 * program, entropy)
    tl.store(partial + 2 * program + 1, sign)


@triton.jit
def _sum_images(partial, images, TILE: tl.constexpr):
    """Both columns of ``partial`` [images, 2] added up, in one fixed order."""
    entropy = tl.zeros((TILE,), tl.float32)
    sign = tl.zeros((TILE,), tl.float32)
    for first in range(0, images, TILE):
        image = first + tl.arange(0, TILE)
        entropy += tl.load(partial + 2 * image, mask=image < images, other=0.0)
        sign += tl.load(partial + 2 * image + 1, mask=image < images, other=0.0)
    return tl.sum(entropy), tl.sum(sign)


@triton.jit
def finish_kernel(
    partial,
    loss,
    refined_accuracy,
    real_accuracy,
    refined_images,
    real_images,
    refined_patches,
    real_patches,
    TILE: tl.constexpr,
):
    """One program: the loss and both patch accuracies; sign(z) is 1 for refined, -1 for real, 0 for undecided."""
    refined_entropy, refined_sign = _sum_images(partial, refined_images, TILE)
    real_entropy, real_sign = _sum_images(partial + 2 * refined_images, real_images, TILE)
    tl.store(loss, refined_entropy / refined_images + real_entropy / real_images)
    tl.store(refined_accuracy, 0.5 + 0.5 * refined_sign / refined_images / refined_patches)
    tl.store(real_accuracy, 0.5 - 0.5 * real_sign / real_images / real_patches)


def launch(
    refined_logits: Tensor, real_logits: Tensor, real_target: float, refined_target: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, refined accuracy, real accuracy (scalars), and both gradients end to end in one flat tensor. float32."""
    refined_images, real_images = refined_logits.shape[0], real_logits.shape[0]
    refined_patches = refined_logits.shape[2] * refined_logits.shape[3]
    real_patches = real_logits.shape[2] * real_logits.shape[3]
    gradients = refined_logits.new_empty(refined_logits.numel() + real_logits.numel(), dtype=torch.float32)
    loss, refined_accuracy, real_accuracy = (gradients.new_empty(()) for _ in range(3))
    partial = gradients.new_empty(2 * (refined_images + real_images))
    refined_logits, refined_class_stride, refined_patch_stride = class_layout(refined_logits)
    real_logits, real_class_stride, real_patch_stride = class_layout(real_logits)

    with torch.cuda.device_of(refined_logits):
        forward_kernel[(refined_images + real_images,)](
            refined_logits,
            real_logits,
            gradients,
            gradients[refined_logits.numel() :],
            partial,
            refined_images,
            refined_patches,
            refined_class_stride,
            refined_patch_stride,
            1.0 - refined_target,
            1.0 / refined_images,
            real_patches,
            real_class_stride,
            real_patch_stride,
            real_target,
            1.0 / real_images,
            BLOCK=patch_block(max(refined_patches, real_patches)),
        )
        finish_kernel[(1,)](
            partial,
            loss,
            refined_accuracy,
            real_accuracy,
            refined_images,
            real_images,
            refined_patches,
            real_patches,
            TILE=TILE,
        )
    return loss, refined_accuracy, real_accuracy, gradients
