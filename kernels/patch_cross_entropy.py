"""The part both loss kernels share: the two-class cross-entropy of one image's patches, with its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024  # patches a program handles at a time


def class_layout(logits: Tensor) -> tuple[Tensor, int, int]:
    """``logits`` [B, 2, h, w], the stride between its classes, and the one between its patches, in elements.

    Contiguous and channels_last are taken as they are. Any other layout is copied (the map is small).
    """
    patches = logits.shape[2] * logits.shape[3]
    if logits.is_contiguous():
        return logits, patches, 1
    if logits.is_contiguous(memory_format=torch.channels_last):
        return logits, 1, 2
    return logits.contiguous(), patches, 1


def patch_block(patches: int) -> int:
    """Patches a program handles at a time, a power of two."""
    return min(MAX_BLOCK, triton.next_power_of_2(patches))


@triton.jit
def image_cross_entropy(
    logits, grad_logits, image, patches, class_stride, patch_stride, real_target, grad_scale, BLOCK: tl.constexpr
):
    """Sum over one image's patches of the cross-entropy, and of sign(z); z = logit(refined) - logit(real).

    logits: [B, 2, patches] with the given strides; class 0 = real, class 1 = refined.
    grad_logits: [B, 2, patches], contiguous float32, gets the gradient of grad_scale * sum.
    image: int64, so that addresses are.
    """
    logits += image * 2 * patches
    grad_logits += image * 2 * patches
    entropy_sum = tl.zeros((BLOCK,), tl.float32)
    sign_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, patches, BLOCK):
        patch = first + tl.arange(0, BLOCK)
        present = patch < patches
        real = tl.load(logits + patch * patch_stride, mask=present, other=0.0).to(tl.float32)
        refined = tl.load(logits + class_stride + patch * patch_stride, mask=present, other=0.0).to(tl.float32)
        z = refined - real

        # exp never sees a positive number, so nothing overflows.
        e = tl.exp(-tl.abs(z))
        # log(1 + e) = 2 atanh(e / (2 + e)), by its series: the argument is at most 1/3, so eight terms give float32's
        # precision, small e included. The hardware's logarithm is off by 2e-7 near 1, which is all that e is there.
        s = e / (2.0 + e)
        q = s * s
        series = 1 / 13 + q * (1 / 15)
        series = 1 / 9 + q * (1 / 11 + q * series)
        series = 1 / 5 + q * (1 / 7 + q * series)
        log1p = 2.0 * s * (1.0 + q * (1 / 3 + q * series))

        entropy = real_target * tl.maximum(z, 0.0) + (1.0 - real_target) * tl.maximum(-z, 0.0) + log1p
        sigmoid = tl.where(z >= 0, 1.0, e) / (1.0 + e)  # of z
        opposite = tl.where(z >= 0, e, 1.0) / (1.0 + e)  # of -z
        grad_z = grad_scale * (real_target * sigmoid - (1.0 - real_target) * opposite)
        tl.store(grad_logits + patch, -grad_z, mask=present)
        tl.store(grad_logits + patches + patch, grad_z, mask=present)

        entropy_sum += tl.where(present, entropy, 0.0)
        sign_sum += tl.where(present, (z > 0).to(tl.float32) - (z < 0).to(tl.float32), 0.0)
    return tl.sum(entropy_sum), tl.sum(sign_sum)
