"""discriminator_loss with its accuracies, forward and backward, against eager PyTorch and torch.compile of the same.

Ours is the public call with ``impl="auto"``: the Triton kernels on CUDA; on a CPU the reference, which computes value
and gradients by hand in one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import limits
from fastsimgan.ops.discriminator_loss import discriminator_loss

# Images of each batch, patch map, and the batch on a CPU: the paper's two sizes, and one of several times any cache.
SIZES = {
    "gaze": (512, (9, 14), 512),
    "hand": (512, (7, 7), 512),
    "large": (2**19, (9, 14), 2**15),
}
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


def eager(refined: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2 as one would write it, with the accuracies that a training loop reports."""

    def side(logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
        target = torch.full((logits.shape[0], *logits.shape[2:]), label, device=logits.device)
        loss = F.cross_entropy(logits.float(), target, reduction="none").sum((1, 2)).mean()
        return loss, (logits.detach().argmax(1) == target).float().mean()

    (refined_loss, refined_accuracy), (real_loss, real_accuracy) = side(refined, 1), side(real, 0)
    return refined_loss + real_loss, refined_accuracy, real_accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["gaze", *(pytest.param(s, marks=pytest.mark.large) for s in ("hand", "large"))])
def test_discriminator_loss(race, size, dtype):
    batch, patches, cpu_batch = SIZES[size]
    batch = 8 if limits.SMALL else batch if race.device.type == "cuda" else cpu_batch
    shape = (batch, 2, *patches)
    bytes_moved = 2 * dtype.itemsize * 2 * math.prod(shape)
    torch.manual_seed(0)
    sets = [
        tuple(torch.randn(shape, device=race.device).to(dtype).requires_grad_() for _ in range(2))
        for _ in range(limits.copies(bytes_moved, race.device))
    ]
    refined, real = sets[0]
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    def steps(loss) -> list[Callable[[], tuple[Tensor, ...]]]:
        def step(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            value = loss(*tensors)[0]
            return value.detach(), *torch.autograd.grad(value, tensors)

        return [partial(step, tensors) for tensors in sets]

    sides = {"ours": steps(discriminator_loss), "torch.compile": steps(compiled), "eager": steps(eager)}
    refined_z, real_z = ((logits[:, 1] - logits[:, 0]).detach().double() for logits in (refined, real))
    truth = (F.softplus(-refined_z).sum() + F.softplus(real_z).sum()) / batch
    errors = {}
    for name, side in sides.items():
        value, refined_gradient, real_gradient = side[0]()
        errors[name] = max(
            ((value - truth) / truth).abs().item(),
            ((refined_gradient[:, 0].double() - (-refined_z).sigmoid() / batch).abs().max() * batch).item(),
            ((real_gradient[:, 1].double() - real_z.sigmoid() / batch).abs().max() * batch).item(),
        )
    assert errors["ours"] <= errors["eager"] + 1e-6 + torch.finfo(dtype).eps
    race.run(f"discriminator_loss {size} {str(dtype)[6:]} b={batch}", sides, errors, bytes_moved)
