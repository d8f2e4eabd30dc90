"""The two objectives of SimGAN as functions of images (Eq. 2, 4): networks and fused ops put together.

λ has the paper's form: both terms are summed within an image and averaged over the images of the batch, so that its
effect does not depend on the batch size. A port that *averages* both the L1 over pixels and the cross-entropy over
patches with weight ``λ_mean`` does the same as ``λ = λ_mean * patches / (channels * height * width)`` here; one that
averages the L1 only, as ``λ = λ_mean / (channels * height * width)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsimgan.ops.discriminator_loss import DiscriminatorLoss, discriminator_loss
from fastsimgan.ops.refiner_loss import RefinerLoss, refiner_loss

Network = Callable[[Tensor], Tensor]
"""R, from images to images, or D, from images to logits ``[B, 2, h, w]``."""


def refiner_objective(
    refiner: Network, discriminator: Network, synthetic: Tensor, *, lam: float, psi: str, impl: str = "auto"
) -> tuple[RefinerLoss, Tensor]:
    """L_R (Eq. 1, 4) of a batch of synthetic images; differentiable with respect to R.

    The caller freezes D (``requires_grad_(False)``): the gradient then passes *through* D to R, and D's own weight
    gradients, which nobody would use, are never computed.

    Args:
        refiner, discriminator: R and D.
        synthetic: ``[B, C, H, W]`` in [-1, 1].
        lam: λ, the weight of self-regularisation, in the paper's form (see the module).
        psi: ψ: "identity", "channel_mean" or "gradients".
        impl: implementation of the fused loss, see :mod:`fastsimgan.ops.refiner_loss`.

    Returns:
        The loss with its two terms for each image, and the refined images ``[B, C, H, W]``.
    """
    refined = refiner(synthetic)
    return refiner_loss(discriminator(refined), refined, synthetic, lam=lam, psi=psi, impl=impl), refined


def discriminator_objective(
    discriminator: Network, refined: Tensor, real: Tensor, *, impl: str = "auto"
) -> DiscriminatorLoss:
    """L_D (Eq. 2) of refined and real images, both ``[B, C, H, W]`` in [-1, 1]; differentiable with respect to D.

    ``refined`` must carry no gradient: D's step through R would cost three times as much and change nothing.
    """
    assert not refined.requires_grad, "refined images of D's step must not carry a gradient"
    # One pass over both batches: twice the work a launch, and D has no layer that mixes images.
    logits = discriminator(torch.cat([refined, real]))
    return discriminator_loss(logits[: len(refined)], logits[len(refined) :], impl=impl)
