"""refiner_loss, forward and backward, against eager PyTorch and torch.compile of the same formula.

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
from fastsimgan.ops.refiner_loss import refiner_loss

LAM = 0.5
# Images [B, C, H, W], patch map, and the batch on a CPU: the paper's two sizes, and one of several times any cache.
SIZES = {
    "gaze": ((512, 1, 35, 55), (9, 14), 512),
    "hand": ((512, 1, 224, 224), (7, 7), 16),
    "large": ((2048, 1, 224, 224), (7, 7), 128),
}
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


def eager(logits: Tensor, refined: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4 as one would write it, reporting terms included."""
    real = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long, device=logits.device)
    adversarial = F.cross_entropy(logits.float(), real, reduction="none").sum((1, 2))
    self_regularisation = (refined.float() - synthetic.float()).abs().sum((1, 2, 3))
    return (adversarial + LAM * self_regularisation).mean(), adversarial.detach(), self_regularisation.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["gaze", *(pytest.param(s, marks=pytest.mark.large) for s in ("hand", "large"))])
def test_refiner_loss(race, size, dtype):
    shape, patches, cpu_batch = SIZES[size]
    batch = 8 if limits.SMALL else shape[0] if race.device.type == "cuda" else cpu_batch
    shape = (batch, *shape[1:])
    bytes_moved = dtype.itemsize * (3 * math.prod(shape) + 2 * 2 * batch * math.prod(patches))
    torch.manual_seed(0)
    sets = []  # of inputs
    for _ in range(limits.copies(bytes_moved, race.device)):
        logits = torch.randn(batch, 2, *patches, device=race.device).to(dtype).requires_grad_()
        refined, synthetic = ((torch.rand(shape, device=race.device) * 2 - 1).to(dtype) for _ in range(2))
        sets.append((logits, refined.requires_grad_(), synthetic))
    logits, refined, synthetic = sets[0]
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    def steps(loss) -> list[Callable[[], tuple[Tensor, ...]]]:
        def step(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            value = loss(*tensors)[0]
            return value.detach(), *torch.autograd.grad(value, tensors[:2])

        return [partial(step, tensors) for tensors in sets]

    sides = {
        "ours": steps(partial(refiner_loss, lam=LAM)),
        "torch.compile": steps(compiled),
        "eager": steps(eager),
    }
    check = min(batch, 64)  # float64 truth of all would not fit beside the large size
    errors = {}
    for name, side in sides.items():
        value, logits_gradient, refined_gradient = side[0]()
        truth_z = (logits[:, 1] - logits[:, 0]).detach().double()
        distance = torch.stack([(a.double() - b.double()).abs().sum() for a, b in zip(refined, synthetic, strict=True)])
        truth = F.softplus(truth_z).sum() / batch + LAM * distance.mean()
        slope = LAM / batch * (refined[:check].double() - synthetic[:check].double()).sign()
        errors[name] = max(
            ((value - truth) / truth).abs().item(),
            ((logits_gradient[:, 1].double() - truth_z.sigmoid() / batch).abs().max() * batch).item(),
            ((refined_gradient[:check].double() - slope).abs().max() / (LAM / batch)).item(),
        )
    assert errors["ours"] <= errors["eager"] + 1e-6 + torch.finfo(dtype).eps
    race.run(f"refiner_loss {size} {str(dtype)[6:]} b={batch}", sides, errors, bytes_moved)
