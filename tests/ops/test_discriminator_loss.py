"""discriminator_loss (Eq. 2): the reference against float64 autograd, the Triton kernels against both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops import discriminator_loss as module
from fastsimgan.ops.discriminator_loss import _op, discriminator_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_triton = pytest.mark.skipif(module.implementations()["triton"] is not None, reason="triton is not installed")
IMPLS = ("reference", pytest.param("triton", marks=needs_triton))
# What an implementation may be off by beyond the reference's own error, relative to the largest value: sums and
# gradients are in float32, gradients are rounded once (Triton's interpreter truncates to bfloat16, a GPU rounds).
SUM_TOLERANCE = 1e-6


def gradient_tolerance(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Case:
    refined: tuple[int, int, int]  # B, h, w
    real: tuple[int, int, int]
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor
    scale: float = 1.0

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Refined and real logits: leaves that ask for a gradient, in this case's layout."""
        random = torch.Generator().manual_seed(seed)
        made = []
        for images, height, width in (self.refined, self.real):
            logits = self.scale * torch.randn((images, 2, height, width), generator=random)
            logits[:, 1, 0, 0] = logits[:, 0, 0, 0]  # an undecided patch
            made.append(self.layout(logits.to(DEVICE, dtype)).detach().requires_grad_())
        return made[0], made[1]


CASES = {
    "gaze": Case((4, 9, 14), (4, 9, 14)),
    "batch_of_one": Case((1, 9, 14), (1, 9, 14)),
    "one_patch": Case((3, 1, 1), (3, 1, 1)),
    "different_sizes": Case((5, 9, 14), (3, 4, 7)),
    "many_patches": Case((2, 40, 33), (3, 40, 33)),
    "channels_last": Case((3, 9, 14), (2, 9, 14), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "transposed": Case((3, 9, 14), (2, 9, 14), lambda t: t.mT.contiguous().mT),
    "extreme_logits": Case((3, 6, 6), (3, 6, 6), scale=1e4),
}


def truth(refined: Tensor, real: Tensor, real_target: float, refined_target: float, scale: float):
    """Eq. 2 in float64, by PyTorch's own softmax and autograd: loss and accuracies, then both gradients."""
    refined, real = (tensor.detach().double().requires_grad_() for tensor in (refined, real))

    def summed(logits: Tensor, on_real: float) -> Tensor:
        log_real, log_refined = F.log_softmax(logits, dim=1).unbind(1)
        return -(on_real * log_real + (1 - on_real) * log_refined).sum((1, 2)).mean()

    def accuracy(logits: Tensor, right: int) -> Tensor:
        margin = logits[:, right] - logits[:, 1 - right]
        return (margin > 0).double().mean() + 0.5 * (margin == 0).double().mean()

    loss = summed(refined, 1 - refined_target) + summed(real, real_target)
    gradients = torch.autograd.grad(loss * scale, (refined, real))
    return [loss.detach(), accuracy(refined.detach(), 1), accuracy(real.detach(), 0)], gradients


def evaluate(tensors: tuple[Tensor, Tensor], real_target: float, refined_target: float, scale: float, impl: str):
    result = discriminator_loss(*tensors, real_target=real_target, refined_target=refined_target, impl=impl)
    return list(result), torch.autograd.grad(result.loss * scale, tensors)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest value; infinite if anything is not a number."""
    worst = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return worst.item() if worst.isfinite() else math.inf


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_against_float64(name, impl, dtype):
    tensors = CASES[name].tensors(dtype)
    arguments = (0.9, 0.95, 3.0)
    true_values, true_gradients = truth(*tensors, *arguments)
    values, gradients = evaluate(tensors, *arguments, impl)
    own_values, own_gradients = evaluate(tensors, *arguments, "reference")
    for value, own, expected in zip(values, own_values, true_values, strict=True):
        assert value.dtype == torch.float32 and value.shape == ()
        assert error(own, expected) <= SUM_TOLERANCE
        assert error(value, expected) <= error(own, expected) + SUM_TOLERANCE
    for gradient, own, expected, tensor in zip(gradients, own_gradients, true_gradients, tensors, strict=True):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        assert error(own, expected) <= gradient_tolerance(dtype)
        assert error(gradient, expected) <= error(own, expected) + gradient_tolerance(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sure_discriminator_keeps_its_relative_precision(impl):
    """Where D is right and sure, the loss is e^-z: small, and not lost in 1 + e^-z."""
    logits = torch.zeros(1, 2, 1, 1, device=DEVICE)
    sure = logits.clone()
    sure[:, 1] = 25.0
    loss = discriminator_loss(sure, -sure, impl=impl).loss
    assert loss.item() == pytest.approx(2 * math.exp(-25), rel=1e-5)


def test_gradcheck():
    tensors = Case((2, 2, 3), (3, 3, 1)).tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: discriminator_loss(*t, real_target=0.9).loss, tensors)


@needs_triton
def test_same_bits_every_time():
    tensors = CASES["many_patches"].tensors(torch.float32)
    runs = [evaluate(tensors, 0.9, 1.0, 1.0, "triton") for _ in range(2)]
    for first, second in zip([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]], strict=True):
        assert torch.equal(first, second)


@needs_triton
def test_more_images_than_a_tile(monkeypatch):
    from fastsimgan.kernels import discriminator_loss as kernels

    monkeypatch.setattr(kernels, "TILE", 4)
    tensors = Case((9, 2, 3), (5, 1, 1)).tensors(torch.float32)
    expected, _ = truth(*tensors, 0.9, 1.0, 1.0)
    for value, true in zip(evaluate(tensors, 0.9, 1.0, 1.0, "triton")[0], expected, strict=True):
        assert error(value, true) <= SUM_TOLERANCE


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl):
    for which in range(2):
        tensors = [tensor.detach() for tensor in CASES["gaze"].tensors(torch.float32)]
        tensors[which][1, 0, 2, 3] = math.nan
        assert discriminator_loss(*tensors, impl=impl).loss.isnan()


def test_only_the_loss_is_differentiable_and_only_once():
    tensors = CASES["one_patch"].tensors(torch.float32)
    result = discriminator_loss(*tensors)
    assert result.loss.requires_grad
    assert not result.refined_accuracy.requires_grad and not result.real_accuracy.requires_grad
    torch.autograd.grad(result.loss, tensors, retain_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(result.loss, tensors, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["different_sizes", "channels_last"])
def test_opcheck(name, impl):
    torch.library.opcheck(_op, (*CASES[name].tensors(torch.float32), 0.9, 1.0, impl))


@pytest.mark.slow
def test_compiles_into_one_graph():
    tensors = CASES["different_sizes"].tensors(torch.float32)

    def step(refined: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        result = discriminator_loss(2 * refined, real)
        return result.loss, result.refined_accuracy

    expected = step(*tensors)
    actual = torch.compile(step, fullgraph=True)(*tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(actual[0], tensors)
    for a, b in zip(gradients, torch.autograd.grad(expected[0], tensors), strict=True):
        torch.testing.assert_close(a, b)


# Mistakes that public ports make (numbers as in CONTRIBUTING.md).


@pytest.mark.parametrize("impl", IMPLS)
def test_mistake_2_softmax_is_over_classes_not_over_pixels(impl):
    """Patches that D is sure are real cost a refined image 20 each, the others nothing."""
    refined = torch.zeros(1, 2, 1, 4, device=DEVICE)
    refined[0, 0, 0] = torch.tensor([20.0, 20.0, 0.0, 0.0])
    refined[0, 1, 0] = torch.tensor([0.0, 0.0, 20.0, 20.0])
    sure_of_real = torch.tensor([20.0, 0.0], device=DEVICE).view(1, 2, 1, 1)
    result = discriminator_loss(refined, sure_of_real, impl=impl)
    assert result.loss.item() == pytest.approx(40.0)
    assert result.refined_accuracy.item() == 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_mistake_9_each_accuracy_comes_from_its_own_batch(impl):
    """A D that calls everything refined is always right about refined images and never about real ones."""
    says_refined = torch.tensor([0.0, 1.0], device=DEVICE).view(1, 2, 1, 1).expand(4, 2, 3, 3)
    result = discriminator_loss(says_refined, says_refined, impl=impl)
    assert result.refined_accuracy.item() == 1.0
    assert result.real_accuracy.item() == 0.0
    undecided = torch.zeros(4, 2, 3, 3, device=DEVICE)
    result = discriminator_loss(undecided, says_refined, impl=impl)
    assert result.refined_accuracy.item() == 0.5


# Arguments and implementations.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refined_logits": torch.zeros(2, 1, 1, 1)}, r"refined_logits must be \[B, 2, h, w\]"),
        ({"real_logits": torch.zeros(0, 2, 1, 1)}, r"real_logits must be \[B, 2, h, w\] and not empty"),
        ({"real_logits": torch.zeros(2, 2, 1, 1).half()}, "real_logits must have refined_logits' dtype"),
        (
            {"real_logits": torch.zeros(2, 2, 1, 1, device="meta")},
            "real_logits must be on refined_logits' cpu, got meta",
        ),
        ({"real_target": -0.1}, r"real_target must be in \[0, 1\], got -0.1"),
        ({"refined_target": math.nan}, r"refined_target must be in \[0, 1\], got nan"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference, got 'cuda'"),
    ],
)
def test_bad_arguments(change, message):
    good = {"refined_logits": torch.zeros(2, 2, 1, 1), "real_logits": torch.zeros(2, 2, 1, 1)}
    with pytest.raises(InputError, match=message):
        discriminator_loss(**(good | change))


@needs_triton
def test_a_request_that_cannot_be_met_raises():
    logits = torch.zeros(1, 2, 1, 1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UnavailableError, match="discriminator_loss impl='triton': torch.float64 is not"):
        discriminator_loss(logits, logits, impl="triton")


# On a GPU.


@pytest.mark.gpu
def test_gpu_one_pass_forward_and_nothing_of_note_backward():
    """Two launches forward (the second adds up), one product backward."""
    tensors = Case((512, 9, 14), (512, 9, 14)).tensors(torch.float32)
    for _ in range(3):
        evaluate(tensors, 0.9, 1.0, 1.0, "triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(discriminator_loss(*tensors, impl="triton").loss, tensors)
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=10))
    launches = {event.key: event.count for event in profile.key_averages() if event.self_device_time_total > 0}
    assert launches.pop("forward_kernel") == 1 and launches.pop("finish_kernel") == 1
    assert sum(launches.values()) <= 2  # backward's product, and autograd's 1 for the loss


@pytest.mark.gpu
def test_gpu_never_synchronises():
    tensors = CASES["different_sizes"].tensors(torch.float32)
    evaluate(tensors, 0.9, 1.0, 3.0, "triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(tensors, 0.9, 1.0, 3.0, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replay_equals_eager():
    case = CASES["different_sizes"]
    tensors = case.tensors(torch.float32)
    evaluate(tensors, 0.9, 1.0, 3.0, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(tensors, 0.9, 1.0, 3.0, "triton")
    for seed in (1, 2):
        for tensor, fresh in zip(tensors, case.tensors(torch.float32, seed), strict=True):
            tensor.data.copy_(fresh)
        graph.replay()
        eager = evaluate(tensors, 0.9, 1.0, 3.0, "triton")
        for a, b in zip([*captured[0], *captured[1]], [*eager[0], *eager[1]], strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    side, images = 1024, 2**10 + 1
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    refined = torch.randn(images, 2, side, side, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    real = torch.zeros(1, 2, 1, 1, device="cuda", dtype=torch.bfloat16)
    result = discriminator_loss(refined, real, impl="triton")
    (gradient,) = torch.autograd.grad(result.loss, refined)
    target = torch.ones(1, side, side, dtype=torch.long, device="cuda")
    sums = [F.cross_entropy(logits[None].float(), target, reduction="sum").item() for logits in refined.detach()]
    assert result.loss.item() == pytest.approx(sum(sums) / images + math.log(2), rel=1e-4)
    last = F.softmax(refined[-1].detach().float(), dim=0)[0] / images  # 1 - D: what is missing to "refined"
    torch.testing.assert_close(gradient[-1, 0].float(), last, rtol=2e-2, atol=0)
