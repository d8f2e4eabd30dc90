"""residual_block: all implementations against float64, gradients, odd shapes, any layout, and the same bits always."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.models.refiner import Refiner
from fastsimgan.ops import residual_block as op
from fastsimgan.ops.residual_block import residual_block

needs_cpp = pytest.mark.skipif(op.implementations()["cpp"] is not None, reason=str(op.implementations()["cpp"]))

needs_amx = pytest.mark.skipif(op.implementations()["amx"] is not None, reason=str(op.implementations()["amx"]))

each_cpp = pytest.mark.parametrize(
    ("impl", "maps"), [pytest.param("cpp", 16, marks=needs_cpp), pytest.param("amx", 32, marks=needs_amx)]
)

# [B, C, H, W]: the paper's eye, the quick presets' widths, a last strip that is not full, tiles that are cut, one
# pixel; pairs of 16 lanes, of 8, and a last one alone
SHAPES = [(2, 64, 35, 55), (3, 32, 48, 48), (2, 24, 17, 9), (1, 40, 5, 3), (5, 8, 4, 4), (1, 8, 1, 1), (1, 16, 1, 33)]
SHAPES += [(2, 48, 11, 13)]


# Several strips an image, of unequal height; one row, one column, one pixel; maps that are no power of two
BFLOAT16_SHAPES = [(2, 64, 35, 55), (1, 32, 224, 224), (2, 96, 47, 57), (1, 64, 1, 33), (2, 32, 300, 1), (3, 32, 1, 1)]


def arguments(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Features in channels_last, and both layers."""
    random = torch.Generator().manual_seed(0)
    maps = shape[1]
    layers = [torch.randn(size, generator=random) for size in ((maps, maps, 3, 3), (maps,)) * 2]
    layers = [tensor / (3 * maps**0.5) if tensor.dim() == 4 else tensor / 5 for tensor in layers]
    return [torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last), *layers]


def run(arguments: list[Tensor], impl: str, dtype: torch.dtype, grad: Tensor) -> list[Tensor]:
    """Result, and gradients of all arguments."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments]
    with torch.autocast("cpu", torch.bfloat16, enabled=impl == "autocast"):
        out = residual_block(*leaves, "reference" if impl == "autocast" else impl)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def distance(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_result_and_gradients_are_those_of_float64(shape: tuple[int, int, int, int], impl: str) -> None:
    given = arguments(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    truth = run(given, "reference", torch.float64, grad)
    found = run(given, impl, torch.float32, grad)
    assert distance(found[0], truth[0]) < 1e-6
    for ours, theirs in zip(found[1:], truth[1:], strict=True):
        # A value within rounding of 0 passes its gradient or not: one in 10^5 of them changes 3e-3 of the norm.
        assert ours.shape == theirs.shape and distance(ours, theirs) < 1e-2


@needs_cpp
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_where_no_value_is_near_a_kink(shape: tuple[int, int, int, int]) -> None:
    """All is positive, so every ReLU passes, nothing can flip and the bound is that of rounding."""
    given = [tensor.abs() + 0.01 for tensor in arguments(shape)]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    truth = run(given, "reference", torch.float64, grad)
    plain, ours = (run(given, impl, torch.float32, grad) for impl in ("reference", "cpp"))
    for name, *three in zip(("out", "x", "w1", "b1", "w2", "b2"), ours, plain, truth, strict=True):
        assert distance(three[0], three[2]) <= 3 * distance(three[1], three[2]) + 5e-6, name  # sums over pixels cancel


@needs_cpp
def test_masks_are_the_relus_own() -> None:
    """Where the result, or the hidden value, is exactly 0 no gradient passes, as in PyTorch."""
    given = [torch.zeros_like(tensor) for tensor in arguments((1, 8, 6, 6))]
    for impl in ("cpp", "reference"):
        _, *gradients = run(given, impl, torch.float32, torch.ones(1, 8, 6, 6))
        assert all(not bool(gradient.any()) for gradient in gradients)


@needs_cpp
def test_a_gradient_of_exactly_zero_is_exactly_zero() -> None:
    """Features and gradients that meet in one tap only: Adam would make full steps of rounding in the others."""
    features = torch.zeros(1, 8, 12, 12)
    features[0, 1, 5, 6] = 1.7
    given = [features.contiguous(memory_format=torch.channels_last), *arguments((1, 8, 12, 12))[1:]]
    grad = torch.zeros(1, 8, 12, 12)
    grad[0, 2, 4, 7] = 0.3
    given[1] = given[1].abs()  # so that the hidden features are positive where it counts
    given[2] = torch.zeros(8)
    given[4] = given[4].abs() + 50  # and the result everywhere
    (_, _, truth1, _, truth2, _), (_, _, ours1, _, ours2, _) = (
        run(given, impl, dtype, grad) for impl, dtype in (("reference", torch.float64), ("cpp", torch.float32))
    )
    for ours, truth in ((ours1, truth1), (ours2, truth2)):
        assert 0 < int((truth == 0).sum()) < truth.numel()
        assert torch.equal(ours == 0, truth == 0)


@needs_cpp
def test_nan_comes_through() -> None:
    given = arguments((1, 8, 9, 9))
    given[0][0, 3, 4, 4] = float("nan")
    out = residual_block(*given, "cpp")
    assert bool(out[0, 3, 4, 4].isnan())


@each_cpp
def test_uninitialised_memory_is_never_read(impl: str, maps: int) -> None:
    """What malloc hands back holds NaN: what fills up the last strip or group must not leak into the others."""
    given = arguments((1, maps, 7, 7))
    expected = run(given, impl, torch.float32, torch.ones(1, maps, 7, 7))
    for _ in range(5):
        poison = [torch.full((size,), float("nan")) for size in (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)]
        del poison
        for ours, theirs in zip(run(given, impl, torch.float32, torch.ones(1, maps, 7, 7)), expected, strict=True):
            assert torch.equal(ours, theirs)


@each_cpp
def test_any_number_of_threads_gives_the_same_bits(impl: str, maps: int) -> None:
    shape = (6, 2 * maps, 35, 55)
    given = arguments(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(given, impl, torch.float32, grad)
        torch.set_num_threads(3)
        three = run(given, impl, torch.float32, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_any_layout(layout: str) -> None:
    given = arguments((3, 8, 6, 10))
    expected = run(given, "reference", torch.float32, torch.ones(3, 8, 6, 10))
    if layout == "contiguous":
        given = [tensor.contiguous() for tensor in given]
    elif layout == "channels_last":
        given = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous() for t in given]
    elif layout == "sliced":
        given[0] = torch.cat([given[0], given[0]], 3)[..., :10]
    else:
        given[0] = given[0].transpose(2, 3).contiguous().transpose(2, 3)
        given[1] = given[1].transpose(2, 3).contiguous().transpose(2, 3)
    found = run(given, "cpp", torch.float32, torch.ones(1, 1, 1, 1).expand(3, 8, 6, 10))
    assert all(distance(a, b.double()) < 5e-6 for a, b in zip(found, expected, strict=True))


@needs_cpp
def test_opcheck() -> None:
    given = [tensor.requires_grad_() for tensor in arguments((1, 8, 5, 6))]
    torch.library.opcheck(torch.ops.fastsimgan.residual_block.default, tuple(given))


@needs_cpp
def test_compiles_to_the_same_bits() -> None:
    given = arguments((1, 16, 9, 9))
    compiled = torch.compile(lambda *tensors: residual_block(*tensors), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), residual_block(*given, "cpp"))


@needs_cpp
def test_the_refiner_takes_it_and_can_be_told_not_to() -> None:
    refiner = Refiner(1, width=16, blocks=2)
    images = torch.rand(2, 1, 9, 11) * 2 - 1
    ours = refiner(images)
    refiner.impl = "reference"
    plain = refiner(images)
    assert not torch.equal(ours, plain)  # the implementations round differently
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


def test_what_cpp_cannot_serve_is_said_and_auto_takes_the_reference() -> None:
    narrow = arguments((1, 12, 5, 5))
    with pytest.raises(UnavailableError, match=r"residual_block impl='cpp': .*"):
        residual_block(*narrow, "cpp")
    assert torch.equal(residual_block(*narrow), residual_block(*narrow, "reference"))
    with pytest.raises(UnavailableError, match=r"residual_block impl='amx': .*"):
        residual_block(*narrow, "amx")
    with pytest.raises(InputError, match="impl must be one of auto, amx, cpp, reference, got 'fast'"):
        residual_block(*narrow, "fast")


@needs_cpp
def test_cpp_names_what_it_needs() -> None:
    with pytest.raises(UnavailableError, match="multiple of 8 feature maps, at most 1024, got 12"):
        residual_block(*arguments((1, 12, 5, 5)), "cpp")
    with pytest.raises(UnavailableError, match="float64"):
        residual_block(*(tensor.double() for tensor in arguments((1, 8, 5, 5))), "cpp")
    features, *others = arguments((1, 8, 5, 5))
    with pytest.raises(UnavailableError, match="empty"):
        residual_block(features[:0], *others, "cpp")
    with pytest.raises(RuntimeError, match="C=8"):
        residual_block(features, others[0][:4], *others[1:], "cpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert residual_block(features, *others).shape == features.shape  # the reference, in bfloat16


# -- products in bfloat16 ----------------------------------------------------------------------------------------------


@needs_amx
@pytest.mark.parametrize("shape", BFLOAT16_SHAPES)
def test_amx_is_no_further_off_than_pytorch_under_autocast(shape: tuple[int, int, int, int]) -> None:
    given = arguments(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    truth = run(given, "reference", torch.float64, grad)
    plain, ours = (run(given, impl, torch.float32, grad) for impl in ("autocast", "amx"))
    for name, *three in zip(("out", "x", "w1", "b1", "w2", "b2"), ours, plain, truth, strict=True):
        assert three[0].dtype == torch.float32
        assert distance(three[0], three[2]) <= 1.3 * distance(three[1], three[2]) + 1e-3, name


@needs_amx
def test_amx_sums_in_float32_and_rounds_only_products() -> None:
    """Small whole numbers are exact in bfloat16: result and gradients are those of float64 to the last bit."""
    random = torch.Generator().manual_seed(0)
    shape, maps = (3, 32, 40, 21), 32

    def whole(most: int, *size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=random).float()

    given = [whole(2, *shape), whole(1, maps, maps, 3, 3), whole(3, maps), whole(1, maps, maps, 3, 3), whole(3, maps)]
    given[1][torch.rand(given[1].shape, generator=random) < 0.9] = 0  # keep hidden and inner below 256
    given[3][torch.rand(given[3].shape, generator=random) < 0.9] = 0
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    grad = whole(2, *shape)
    truth, ours = run(given, "reference", torch.float64, grad), run(given, "amx", torch.float32, grad)
    for name, one, other in zip(("out", "x", "w1", "b1", "w2", "b2"), ours, truth, strict=True):
        assert torch.equal(one.double(), other), name


@needs_amx
def test_amx_leaves_the_matrix_unit_to_others_as_it_was() -> None:
    """PyTorch's own bfloat16 convolutions configure it once in a thread."""
    given = arguments((2, 32, 9, 9))
    image, weight = given[0].bfloat16(), given[1].bfloat16()
    before = torch.nn.functional.conv2d(image, weight)
    residual_block(*given, "amx")
    assert torch.equal(torch.nn.functional.conv2d(image, weight), before)


@needs_amx
def test_amx_any_layout_nan_and_masks() -> None:
    given = arguments((3, 32, 6, 10))
    expected = run(given, "amx", torch.float32, torch.ones(3, 32, 6, 10))
    turned = [tensor.transpose(2, 3).contiguous().transpose(2, 3) if tensor.dim() == 4 else tensor for tensor in given]
    found = run(turned, "amx", torch.float32, torch.ones(1, 1, 1, 1).expand(3, 32, 6, 10))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    zeros = [torch.zeros_like(tensor) for tensor in given]
    assert all(not bool(gradient.any()) for gradient in run(zeros, "amx", torch.float32, torch.ones(3, 32, 6, 10))[1:])
    given[0][0, 3, 4, 4] = float("nan")
    assert bool(residual_block(*given, "amx")[0, 3, 4, 4].isnan())


@needs_amx
def test_amx_opcheck() -> None:
    given = [tensor.requires_grad_() for tensor in arguments((1, 32, 5, 6))]
    torch.library.opcheck(torch.ops.fastsimgan.residual_block_bfloat16.default, tuple(given))


def test_the_fallback_of_the_bfloat16_op_is_autocast() -> None:
    """What other devices run under that name: the references, straight."""
    given = [tensor.requires_grad_() for tensor in arguments((2, 32, 7, 9))]
    grad = torch.randn(2, 32, 7, 9, generator=torch.Generator().manual_seed(9))
    plain = run(given, "autocast", torch.float32, grad)
    out, hidden = op._bfloat16_reference(*given)
    assert hidden.dtype == torch.bfloat16 and torch.equal(out, plain[0])
    through, weight1, bias1, weight2, bias2 = op._bfloat16_backward_reference(grad, given[0], hidden, out, *given[1::2])
    for ours, theirs in zip((through, weight1, bias1, weight2, bias2), plain[1:], strict=True):
        assert distance(ours.detach(), theirs.double()) < 2e-2


@needs_amx
def test_the_refiner_takes_amx_under_autocast() -> None:
    refiner = Refiner(1, width=32, blocks=2)
    images = torch.rand(2, 1, 9, 11) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        ours = refiner(images)
        refiner.impl = "reference"
        plain = refiner(images)
    assert ours.dtype == torch.float32 and not torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, atol=5e-3, rtol=0)
    with pytest.raises(UnavailableError, match="multiple of 32 feature maps, got 24"):
        residual_block(*arguments((1, 24, 5, 5)), "amx")
