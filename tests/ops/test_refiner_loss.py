"""refiner_loss (Eq. 4): the reference against float64 autograd, the Triton kernels against both."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops import _dispatch
from fastsimgan.ops import refiner_loss as module
from fastsimgan.ops.refiner_loss import PSI, _op, refiner_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_triton = pytest.mark.skipif(module.implementations()["triton"] is not None, reason="triton is not installed")
IMPLS = ("reference", pytest.param("triton", marks=needs_triton))
# What an implementation may be off by beyond the reference's own error, relative to the largest value: sums are in
# float32; gradients are rounded to their dtype, twice where the incoming gradient is not 1, and Triton's interpreter
# truncates to bfloat16 where a GPU rounds.
SUM_TOLERANCE = 1e-6


def gradient_tolerance(dtype: torch.dtype) -> float:
    return 3 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Case:
    images: tuple[int, int, int, int]  # B, C, H, W
    patches: tuple[int, int]
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor
    logit_scale: float = 1.0

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, refined, synthetic: leaves that ask for a gradient, in this case's layout."""
        random = torch.Generator().manual_seed(seed)
        logits = self.logit_scale * torch.randn((self.images[0], 2, *self.patches), generator=random)
        refined = torch.rand(self.images, generator=random) * 2 - 1
        synthetic = torch.rand(self.images, generator=random) * 2 - 1
        synthetic[..., ::3, :] = refined[..., ::3, :]  # pixels that R left alone: a gradient of zero
        return tuple(  # type: ignore[return-value]
            self.layout(tensor.to(DEVICE, dtype)).detach().requires_grad_() for tensor in (logits, refined, synthetic)
        )


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def every_other_column(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=3)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


CASES = {
    "gaze": Case((4, 1, 35, 55), (9, 14)),
    "batch_of_one": Case((1, 1, 35, 55), (9, 14)),
    "one_patch": Case((3, 1, 35, 55), (1, 1)),
    "colour": Case((3, 3, 35, 55), (9, 14)),
    "channels_last": Case((3, 3, 35, 55), (9, 14), channels_last),
    "every_other_column": Case((3, 3, 7, 11), (5, 3), every_other_column),
    "transposed": Case((3, 2, 7, 11), (5, 3), transposed),
    "one_pixel": Case((5, 1, 1, 1), (1, 1)),
    "many_blocks": Case((2, 1, 96, 101), (40, 33)),
    "extreme_logits": Case((3, 1, 5, 7), (6, 6), logit_scale=1e4),
}


def truth(logits: Tensor, refined: Tensor, synthetic: Tensor, lam: float, psi: str, real_target: float, scale: float):
    """Eq. 4 in float64, by PyTorch's own softmax and autograd: the three values, then the three gradients."""
    logits, refined, synthetic = (t.detach().double().requires_grad_() for t in (logits, refined, synthetic))
    log_real, log_refined = F.log_softmax(logits, dim=1).unbind(1)
    adversarial = -(real_target * log_real + (1 - real_target) * log_refined).sum((1, 2))
    features = {
        "identity": lambda image: (image,),
        "channel_mean": lambda image: (image.mean(1, keepdim=True),),
        "gradients": lambda image: (
            image[..., 1:] - image[..., :-1],
            image[..., 1:, :] - image[..., :-1, :],
        ),
    }[psi]
    distance = sum((a - b).abs().sum((1, 2, 3)) for a, b in zip(features(refined), features(synthetic), strict=True))
    loss = (adversarial + lam * distance).mean()
    gradients = torch.autograd.grad(loss * scale, (logits, refined, synthetic))
    return [value.detach() for value in (loss, adversarial, distance)], gradients


def evaluate(tensors: tuple[Tensor, Tensor, Tensor], lam, psi, real_target, scale, impl):
    result = refiner_loss(*tensors, lam=lam, psi=psi, real_target=real_target, impl=impl)
    return list(result), torch.autograd.grad(result.loss * scale, tensors)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest value; infinite if anything is not a number."""
    worst = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return worst.item() if worst.isfinite() else math.inf


# Each case in each dtype; the scale by turns, so that each case and each dtype meets both.
EVERY_PAIR = [
    pytest.param(name, dtype, scale, id=f"{name}-{dtype}-{scale_name}")
    for i, name in enumerate(CASES)
    for j, dtype in enumerate(DTYPES)
    for scale, scale_name in [((1.0, "plain"), (3.0, "scaled"))[(i + j) % 2]]
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "dtype", "scale"), EVERY_PAIR)
def test_values_and_gradients_against_float64(name, impl, dtype, scale):
    tensors = CASES[name].tensors(dtype)
    arguments = (0.3, "identity", 0.9, scale)
    true_values, true_gradients = truth(*tensors, *arguments)
    values, gradients = evaluate(tensors, *arguments, impl)
    own_values, own_gradients = evaluate(tensors, *arguments, "reference")
    for value, own, expected in zip(values, own_values, true_values, strict=True):
        assert value.dtype == torch.float32
        assert error(own, expected) <= SUM_TOLERANCE
        assert error(value, expected) <= error(own, expected) + SUM_TOLERANCE
    for gradient, own, expected, tensor in zip(gradients, own_gradients, true_gradients, tensors, strict=True):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        assert error(own, expected) <= gradient_tolerance(dtype)
        assert error(gradient, expected) <= error(own, expected) + gradient_tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("psi", ["channel_mean", "gradients"])
def test_other_psi_against_float64(psi, dtype):
    tensors = CASES["colour"].tensors(dtype)
    true_values, true_gradients = truth(*tensors, 0.3, psi, 1.0, 3.0)
    values, gradients = evaluate(tensors, 0.3, psi, 1.0, 3.0, "auto")
    for value, expected in zip(values, true_values, strict=True):
        assert error(value, expected) <= SUM_TOLERANCE
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        assert error(gradient, expected) <= gradient_tolerance(dtype)


@pytest.mark.parametrize("psi", PSI)
def test_gradcheck(psi):
    tensors = Case((2, 3, 4, 5), (2, 3)).tensors(torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda *t: refiner_loss(*t, lam=0.3, psi=psi, real_target=0.9).loss, tensors)


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    patches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_blocks_that_straddle_images(batch, channels, height, width, patches):
    """With blocks of a few pixels and tiles of a few sums, every branch of the walk is taken."""
    from fastsimgan.kernels import refiner_loss as kernels

    tensors = Case((batch, channels, height, width), patches).tensors(torch.float32)
    expected, expected_gradients = evaluate(tensors, 0.3, "identity", 1.0, 3.0, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_BYTES", 32)
        patch.setattr(kernels, "TILE", 64)
        patch.setattr(kernels, "SCALE_PROGRAMS", 3)
        values, gradients = evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")
    for actual, own in zip([*values, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(actual, own, rtol=1e-5, atol=1e-6)


@needs_triton
def test_same_bits_every_time():
    tensors = CASES["many_blocks"].tensors(torch.float32)
    runs = [evaluate(tensors, 0.3, "identity", 1.0, 1.0, "triton") for _ in range(2)]
    for first, second in zip([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_keeps_a_small_lam_under_a_loss_scaler(impl):
    """lam / B = 1e-7 is a float16 subnormal of 1.7 units: rounded before the scaler's factor, it would be 19 % off."""
    tensors = Case((3, 1, 5, 7), (1, 1)).tensors(torch.float16)
    _, expected = truth(*tensors, 3e-7, "identity", 1.0, 65536.0)
    _, gradients = evaluate(tensors, 3e-7, "identity", 1.0, 65536.0, impl)
    assert error(gradients[1], expected[1]) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_through_a_kept_graph(impl):
    logits, refined, synthetic = CASES["one_patch"].tensors(torch.float32)
    loss = refiner_loss(logits, refined, synthetic, lam=0.3, impl=impl).loss
    (first,) = torch.autograd.grad(3 * loss, refined, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(5 * loss, refined)
    assert torch.equal(first, kept), "the second backward changed the first one's gradient"
    torch.testing.assert_close(second, first * 5 / 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_layouts_and_dtypes(impl):
    logits, refined, synthetic = CASES["colour"].tensors(torch.float32)
    expected = refiner_loss(logits, refined, synthetic.bfloat16(), lam=0.3, impl="reference")
    mixed = channels_last(refined).detach().requires_grad_()
    actual = refiner_loss(channels_last(logits), mixed, synthetic.bfloat16(), lam=0.3, impl=impl)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(actual.loss, mixed)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss, refined)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl):
    for which in range(3):
        tensors = [tensor.detach() for tensor in CASES["extreme_logits"].tensors(torch.float32)]
        tensors[which][1, 0, 2, 3] = math.nan
        result = refiner_loss(*tensors, lam=0.3, impl=impl)
        assert result.loss.isnan()
        assert (result.adversarial if which == 0 else result.self_regularisation).isnan().tolist() == [
            False,
            True,
            False,
        ]


def test_only_the_loss_is_differentiable_and_only_once():
    tensors = CASES["one_patch"].tensors(torch.float32)
    result = refiner_loss(*tensors, lam=0.3)
    assert result.loss.requires_grad
    assert not result.adversarial.requires_grad and not result.self_regularisation.requires_grad
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(result.loss, tensors, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["colour", "channels_last", "transposed"])
def test_opcheck(name, impl):
    torch.library.opcheck(_op, (*CASES[name].tensors(torch.float32), 0.3, "identity", 0.9, impl))


@pytest.mark.parametrize("psi", ["channel_mean", "gradients"])
def test_opcheck_other_psi(psi):
    torch.library.opcheck(_op, (*CASES["colour"].tensors(torch.bfloat16), 0.3, psi, 0.9, "reference"))


def test_compiles_into_one_graph():
    logits, refined, synthetic = CASES["gaze"].tensors(torch.float32)

    def step(logits: Tensor, refined: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
        result = refiner_loss(logits, refined.tanh(), synthetic, lam=0.3)
        return result.loss, result.self_regularisation

    expected = step(logits, refined, synthetic)
    actual = torch.compile(step, fullgraph=True)(logits, refined, synthetic)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(actual[0], (logits, refined))
    for a, b in zip(gradients, torch.autograd.grad(expected[0], (logits, refined)), strict=True):
        torch.testing.assert_close(a, b)


# Mistakes that public ports make (numbers as in CONTRIBUTING.md).


@pytest.mark.parametrize("impl", IMPLS)
def test_mistake_2_softmax_is_over_classes_not_over_pixels(impl):
    """Patches that D is sure are real cost nothing, the others 20 each; a [B*h*w, 2] reshape would mix neighbours."""
    logits = torch.zeros(1, 2, 1, 4, device=DEVICE)
    logits[0, 0, 0] = torch.tensor([20.0, 20.0, 0.0, 0.0])
    logits[0, 1, 0] = torch.tensor([0.0, 0.0, 20.0, 20.0])
    image = torch.zeros(1, 1, 2, 2, device=DEVICE)
    assert refiner_loss(logits, image, image, lam=1.0, impl=impl).adversarial.item() == pytest.approx(40.0)
    shift = torch.randn(1, 1, 1, 4, device=DEVICE)  # the same to both classes of a patch: no softmax over them sees it
    assert refiner_loss(logits + shift, image, image, lam=1.0, impl=impl).loss.item() == pytest.approx(40.0, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_mistake_4_the_adversarial_gradient_reaches_the_refiner(impl):
    """With lam = 0, what moves R comes through D alone: and it raises D's logit for real."""
    brightness = torch.zeros((), device=DEVICE, requires_grad=True)
    synthetic = torch.zeros(2, 1, 4, 4, device=DEVICE)
    refined = synthetic + brightness
    logits = torch.cat((refined, -refined), dim=1)  # a D that calls bright images real
    (gradient,) = torch.autograd.grad(refiner_loss(logits, refined, synthetic, lam=0.0, impl=impl).loss, brightness)
    assert gradient.item() == pytest.approx(-16.0)  # 16 patches, D = 1/2, z falls by 2 for each unit


@pytest.mark.parametrize("impl", IMPLS)
def test_mistake_6_lam_means_the_same_at_every_batch_size(impl):
    tensors = CASES["gaze"].tensors(torch.float32)
    once, gradients = evaluate(tensors, 0.3, "identity", 1.0, 1.0, impl)
    doubled = tuple(torch.cat((t, t)).detach().requires_grad_() for t in tensors)
    twice, doubled_gradients = evaluate(doubled, 0.3, "identity", 1.0, 1.0, impl)
    torch.testing.assert_close(once[0], twice[0])
    for gradient, half in zip(gradients, doubled_gradients, strict=True):
        torch.testing.assert_close(gradient, 2 * half[: len(gradient)])


# Arguments and implementations.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 1, 1)}, r"logits must be \[B, 2, h, w\]"),
        ({"logits": torch.zeros(3, 2, 1, 1)}, "logits must hold refined's 2 images, got 3"),
        ({"logits": torch.zeros(2, 2, 1, 1).int()}, "logits must be floating point"),
        ({"refined": torch.zeros(2, 4, 4)}, r"refined must be \[B, C, H, W\]"),
        ({"synthetic": torch.zeros(2, 1, 4, 5)}, "synthetic must have refined's shape"),
        ({"synthetic": torch.zeros(2, 1, 4, 4).byte()}, "must be floating point"),
        ({"synthetic": torch.zeros(2, 1, 4, 4, device="meta")}, "must be on one device"),
        ({"lam": -1.0}, "lam must be finite and at least 0, got -1.0"),
        ({"lam": math.nan}, "lam must be finite"),
        ({"psi": "edges"}, "psi must be one of identity, channel_mean, gradients, got 'edges'"),
        ({"real_target": 1.1}, r"real_target must be in \[0, 1\], got 1.1"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference, got 'cuda'"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "logits": torch.zeros(2, 2, 1, 1),
        "refined": torch.zeros(2, 1, 4, 4),
        "synthetic": torch.zeros(2, 1, 4, 4),
        "lam": 1.0,
    }
    with pytest.raises(InputError, match=message):
        refiner_loss(**(good | change))


@needs_triton
def test_a_request_that_cannot_be_met_raises():
    tensors = CASES["one_patch"].tensors(torch.float32)
    with pytest.raises(UnavailableError, match="psi='identity' only, got 'gradients'"):
        refiner_loss(*tensors, lam=0.3, psi="gradients", impl="triton")
    with pytest.raises(UnavailableError, match="float64 is not"):
        refiner_loss(*(tensor.double() for tensor in tensors), lam=0.3, impl="triton")


def test_without_triton_the_reference_works_and_triton_says_why():
    program = """
import sys
sys.modules["triton"] = None
import torch
from fastsimgan.ops.refiner_loss import implementations, refiner_loss
assert implementations() == {"triton": "triton is not installed", "reference": None}
image = torch.zeros(1, 1, 2, 2)
refiner_loss(torch.zeros(1, 2, 1, 1), image, image, lam=1.0)
refiner_loss(torch.zeros(1, 2, 1, 1), image, image, lam=1.0, impl="triton")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("UnavailableError: refiner_loss impl='triton': triton is not installed\n")


# On a GPU.


@pytest.mark.gpu
def test_gpu_one_pass_forward_and_nothing_of_note_backward():
    """One launch reads the images; the sums' launch and backward's together take a tenth of its time."""
    tensors = Case((512, 1, 224, 224), (7, 7)).tensors(torch.float32)
    for _ in range(3):
        refiner_loss(*tensors, lam=0.3, impl="triton").loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(refiner_loss(*tensors[:2], tensors[2].detach(), lam=0.3, impl="triton").loss, tensors[:2])
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=10))
    launches = {event.key: event for event in profile.key_averages() if event.self_device_time_total > 0}
    assert {name: launches[name].count for name in ("forward_kernel", "finish_kernel", "scale_kernel")} == {
        "forward_kernel": 1,
        "finish_kernel": 1,
        "scale_kernel": 1,
    }
    rest = sum(event.self_device_time_total for name, event in launches.items() if name != "forward_kernel")
    assert rest <= 0.1 * launches["forward_kernel"].self_device_time_total


@pytest.mark.gpu
def test_gpu_never_synchronises():
    tensors = CASES["gaze"].tensors(torch.float32)
    evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replay_equals_eager():
    case = CASES["gaze"]
    tensors = case.tensors(torch.float32)
    evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")
    for seed in (1, 2):
        for tensor, fresh in zip(tensors, case.tensors(torch.float32, seed), strict=True):
            tensor.data.copy_(fresh)
        graph.replay()
        eager = evaluate(tensors, 0.3, "identity", 1.0, 3.0, "triton")
        for a, b in zip([*captured[0], *captured[1]], [*eager[0], *eager[1]], strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    side, images = 1024, 2**11 + 1
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    refined = torch.empty(images, 1, side, side, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)
    synthetic = torch.empty_like(refined).uniform_(-1, 1)
    refined.requires_grad_()
    logits = torch.randn(images, 2, 1, 1, device="cuda", dtype=torch.bfloat16)
    result = refiner_loss(logits, refined, synthetic, lam=0.3, impl="triton")
    (gradient,) = torch.autograd.grad(3 * result.loss, refined)
    for image in (0, images // 2, images - 1):
        difference = refined[image].detach().float() - synthetic[image].float()
        torch.testing.assert_close(result.self_regularisation[image], difference.abs().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient[image].float(), difference.sign() * (0.9 / images), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "the interpreter of triton 3.6.0 needs numpy < 2.4, got 2.4.6"),
        ("3.6.0", "2.3.5", None),
        ("3.9.0", "2.4.6", None),
    ],
)
def test_an_interpreter_that_this_numpy_breaks_is_said_to_be_missing(monkeypatch, triton, numpy, reason):
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    monkeypatch.setattr(_dispatch.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda _: True)
    assert _dispatch._triton_missing() == reason
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    assert _dispatch._triton_missing() is None
