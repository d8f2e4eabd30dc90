"""Eq. 4 in two launches: one reads logits and images once and writes every gradient, a tiny one adds up.

The images of a batch are walked as one flat run of memory in blocks of a power of two, so accesses are 16 bytes wide
and aligned whatever the image's size (an image of 35x55 ends at an odd address). A block is never longer than an image,
so it touches at most two: it writes one partial sum for each, and the second launch adds them in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsimgan.kernels.patch_cross_entropy import class_layout, image_cross_entropy, patch_block

BLOCK_BYTES = 8192  # of one image tensor: 4 warps with four 16-byte loads in flight from each of the two
TILE = 4096  # partial sums the second launch reads at a time
SCALE_PROGRAMS = 1024  # of the backward launch; few, since as a rule each looks at one number and leaves

# The last block of a batch is rarely whole. The two helpers below are called with ``count``, its length, and with the
# constant BLOCK for all others: a mask the compiler sees through, without which accesses would be one element wide.


@triton.jit
def _pixel_block(refined, synthetic, grad_refined, scale, count, BLOCK: tl.constexpr):
    """Write scale * sign(refined - synthetic) to ``grad_refined``; return |refined - synthetic|, 0 beyond ``count``."""
    local = tl.arange(0, BLOCK)
    present = local < count
    a = tl.load(refined + local, mask=present, other=0.0).to(tl.float32)
    b = tl.load(synthetic + local, mask=present, other=0.0).to(tl.float32)
    difference = a - b
    slope = tl.where(difference > 0, scale, tl.where(difference < 0, -scale, 0.0))
    tl.store(grad_refined + local, slope.to(grad_refined.dtype.element_ty), mask=present)
    return tl.abs(difference)


@triton.jit
def _scale_block(source, target, factor, count, BLOCK: tl.constexpr):
    """target = source * factor, for ``count`` values."""
    local = tl.arange(0, BLOCK)
    present = local < count
    value = tl.load(source + local, mask=present, other=0.0).to(tl.float32) * factor
    tl.store(target + local, value.to(target.dtype.element_ty), mask=present)


@triton.jit
def forward_kernel(
    logits,
    refined,
    synthetic,
    adversarial,
    partial,
    grad_logits,
    grad_refined,
    images,
    patches,
    class_stride,
    patch_stride,
    elements,
    total,
    real_target,
    logits_scale,
    refined_scale,
    BLOCK: tl.constexpr,
    PATCH_BLOCK: tl.constexpr,
):
    """Programs 0 .. images-1 take one image's patches each, the others one block of pixels each.

    refined, synthetic, grad_refined: ``images`` runs of ``elements``, ``total`` in all, in one memory order.
    adversarial: [images]. partial: [blocks, 2], the sums of |refined - synthetic| over a block's first image and over
    the next one. logits_scale, refined_scale: factors of the gradients.
    """
    program = tl.program_id(0)
    if program < images:
        image = program.to(tl.int64)
        entropy, _ = image_cross_entropy(
            logits, grad_logits, image, patches, class_stride, patch_stride, real_target, logits_scale, PATCH_BLOCK
        )
        tl.store(adversarial + image, entropy)
    else:
        block = (program - images).to(tl.int64)
        start = block * BLOCK
        refined += start
        synthetic += start
        grad_refined += start
        if start + BLOCK <= total:
            distance = _pixel_block(refined, synthetic, grad_refined, refined_scale, BLOCK, BLOCK)
        else:
            count = (total - start).to(tl.int32)
            distance = _pixel_block(refined, synthetic, grad_refined, refined_scale, count, BLOCK)

        next_image = (start // elements + 1) * elements - start
        is_first = tl.arange(0, BLOCK) < tl.minimum(next_image, BLOCK).to(tl.int32)
        tl.store(partial + 2 * block, tl.sum(tl.where(is_first, distance, 0.0)))
        tl.store(partial + 2 * block + 1, tl.sum(tl.where(is_first, 0.0, distance)))


@triton.jit
def finish_kernel(
    partial,
    adversarial,
    self_regularisation,
    loss,
    images,
    elements,
    slots,
    lam,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: self_regularisation [images] from ``partial``, then ``loss``, each in one fixed order.

    slots: the most blocks that an image can touch.
    """
    loss_sum = tl.zeros((IMAGES,), tl.float32)
    for first_image in range(0, images, IMAGES):
        image = first_image + tl.arange(0, IMAGES)
        present = image < images
        begin = image.to(tl.int64) * elements
        first_block = begin // BLOCK
        last_block = (begin + elements - 1) // BLOCK
        starts_inside = begin % BLOCK != 0  # then the image is the second one of its first block

        # A tile, summed once behind the loop: Triton rewrites sums that are added up in a loop, and 3.6 fails at it
        # where the result has a second use.
        distances = tl.zeros((IMAGES, SLOTS), tl.float32)
        for first_slot in range(0, slots, SLOTS):
            slot = first_slot + tl.arange(0, SLOTS)[None, :]
            block = first_block[:, None] + slot
            second = starts_inside[:, None] & (slot == 0)
            owned = present[:, None] & (block <= last_block[:, None])
            distances += tl.load(partial + 2 * block + second.to(tl.int64), mask=owned, other=0.0)
        distance = tl.sum(distances, axis=1)
        tl.store(self_regularisation + image, distance, mask=present)

        entropy = tl.load(adversarial + image, mask=present, other=0.0)
        loss_sum += tl.where(present, entropy + lam * distance, 0.0)
    tl.store(loss, tl.sum(loss_sum) / images)


@triton.jit
def scale_kernel(
    grad_loss, grad_logits, scaled_logits, grad_refined, logits_total, total, pending_scale, BLOCK: tl.constexpr
):
    """scaled_logits = grad_logits * grad_loss; grad_refined *= grad_loss * pending_scale, in place.

    If that second factor is 1, the images are not touched: the host need not know it, and nothing synchronises.
    """
    scale = tl.load(grad_loss).to(tl.float32)
    mine = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(mine, logits_total, step):
        count = tl.minimum(logits_total - start, BLOCK)
        _scale_block(grad_logits + start, scaled_logits + start, scale, count, BLOCK)

    factor = scale * pending_scale
    if factor != 1.0:
        for start in range(mine, total, step):
            if start + BLOCK <= total:
                _scale_block(grad_refined + start, grad_refined + start, factor, BLOCK, BLOCK)
            else:
                _scale_block(grad_refined + start, grad_refined + start, factor, total - start, BLOCK)


def launch(
    logits: Tensor,
    refined: Tensor,
    synthetic: Tensor,
    lam: float,
    real_target: float,
    stored_scale: float,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], adversarial [B], self_regularisation [B], grad_logits [B, 2, h, w] and grad_refined [B, C, H, W].

    float32, but for grad_refined: refined's dtype, in ``memory_format``, the slope times ``stored_scale``. An image
    tensor in another layout is copied into it first; in a training step none is.
    """
    images, elements = refined.shape[0], refined[0].numel()
    patches = logits.shape[2] * logits.shape[3]
    total = images * elements
    block = min(BLOCK_BYTES // refined.element_size(), 1 << (elements.bit_length() - 1))
    blocks = triton.cdiv(total, block)
    slots = (elements - 2) // block + 2
    slot_block = min(64, triton.next_power_of_2(slots))
    image_block = min(TILE // slot_block, triton.next_power_of_2(images))

    logits, class_stride, patch_stride = class_layout(logits)
    refined = refined.contiguous(memory_format=memory_format)
    synthetic = synthetic.contiguous(memory_format=memory_format)
    loss = logits.new_empty((), dtype=torch.float32)
    adversarial = logits.new_empty(images, dtype=torch.float32)
    self_regularisation = torch.empty_like(adversarial)
    partial = logits.new_empty(2 * blocks, dtype=torch.float32)
    grad_logits = logits.new_empty(logits.shape, dtype=torch.float32)
    grad_refined = torch.empty_like(refined, memory_format=memory_format)

    with torch.cuda.device_of(refined):
        forward_kernel[(images + blocks,)](
            logits,
            refined,
            synthetic,
            adversarial,
            partial,
            grad_logits,
            grad_refined,
            images,
            patches,
            class_stride,
            patch_stride,
            elements,
            total,
            real_target,
            1.0 / images,
            stored_scale,
            BLOCK=block,
            PATCH_BLOCK=patch_block(patches),
        )
        finish_kernel[(1,)](
            partial,
            adversarial,
            self_regularisation,
            loss,
            images,
            elements,
            slots,
            lam,
            BLOCK=block,
            IMAGES=image_block,
            SLOTS=slot_block,
            num_warps=8,
        )
    return loss, adversarial, self_regularisation, grad_logits, grad_refined


def scale_(
    grad_loss: Tensor, grad_logits: Tensor, grad_refined: Tensor, pending_scale: float, logits_dtype: torch.dtype
) -> Tensor:
    """Scale both gradients by the scalar tensor ``grad_loss``: return that of the logits, in ``logits_dtype``; change
    ``grad_refined`` in place, by ``pending_scale`` too. The caller owns it and tells autograd that it has changed.
    """
    scaled_logits = torch.empty_like(grad_logits, dtype=logits_dtype)
    block = BLOCK_BYTES // grad_refined.element_size()
    programs = min(SCALE_PROGRAMS, triton.cdiv(max(grad_logits.numel(), grad_refined.numel()), block))
    with torch.cuda.device_of(grad_refined):
        scale_kernel[(programs,)](
            grad_loss,
            grad_logits,
            scaled_logits,
            grad_refined,
            grad_logits.numel(),
            grad_refined.numel(),
            pending_scale,
            BLOCK=block,
        )
    return scaled_logits
