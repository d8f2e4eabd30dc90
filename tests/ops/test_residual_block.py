"""residual_block: all implementations against float64, gradients, odd shapes, any layout, and the same bits always."""

from __future__ import annotations

import math

import pytest
import torch
from refiners import trained
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops import residual_block as op
from fastsimgan.ops.residual_block import residual_block

needs_cpp = pytest.mark.skipif(op.implementations()["cpp"] is not None, reason=str(op.implementations()["cpp"]))

needs_amx = pytest.mark.skipif(op.implementations()["amx"] is not None, reason=str(op.implementations()["amx"]))

needs_triton = pytest.mark.skipif(bool(op.implementations()["triton"]), reason=str(op.implementations()["triton"]))

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
    refiner = trained(1, width=16, blocks=2)
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
    with pytest.raises(InputError, match="impl must be one of auto, triton, amx, cpp, reference, got 'fast'"):
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
def test_amx_takes_bfloat16_features_and_gives_float32_ones() -> None:
    """What a first layer under autocast hands on."""
    features, *layers = arguments((2, 32, 7, 9))
    narrow = features.bfloat16().requires_grad_()
    out = residual_block(narrow, *layers, "amx")
    assert out.dtype == torch.float32 and torch.equal(out, residual_block(narrow.float(), *layers, "amx"))
    (grad,) = torch.autograd.grad(out.sum(), narrow)
    assert grad.dtype == torch.bfloat16 and bool(grad.any())


def test_cpp_takes_no_16_bits() -> None:
    features, *layers = arguments((1, 16, 5, 5))
    with pytest.raises(UnavailableError, match=r"residual_block impl='cpp': (it needs float32 on a CPU|.*)"):
        residual_block(features.bfloat16(), *layers, "cpp")


@needs_amx
def test_the_refiner_takes_amx_under_autocast() -> None:
    refiner = trained(1, amount=0.1, width=32, blocks=2)
    images = torch.rand(2, 1, 9, 11) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        ours = refiner(images)
        refiner.impl = "reference"
        plain = refiner(images)
    assert ours.dtype == torch.float32 and not torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, atol=5e-3, rtol=0)
    with pytest.raises(UnavailableError, match="multiple of 32 feature maps, got 24"):
        residual_block(*arguments((1, 24, 5, 5)), "amx")


# -- Triton: on a GPU, or in its interpreter ---------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = pytest.mark.parametrize("products", [torch.float16, torch.bfloat16], ids=str)
FEATURES = pytest.mark.parametrize("features", ["float32", "16 bits"])

# the paper's eye, narrow; its width; one row, one pixel; no power of two; several steps a tap, two tiles of maps
TRITON_SHAPES = [(1, 16, 35, 55), (1, 64, 11, 13), (3, 32, 9, 7), (1, 16, 1, 33), (2, 16, 1, 1), (1, 48, 5, 3)]
TRITON_SHAPES += [(1, 128, 7, 9), (1, 160, 2, 3)]
# Every pair of shape, features' type and products' is quick, and one half of all three together.
TRITON_CASES = [
    pytest.param(
        shape, features, products, marks=[pytest.mark.slow] * ((i + j + k) % 2), id=f"{shape}-{features}-{products}"
    )
    for i, shape in enumerate(TRITON_SHAPES)
    for j, features in enumerate(["float32", "16 bits"])
    for k, products in enumerate([torch.float16, torch.bfloat16])
]


def slack(products: torch.dtype) -> float:
    """What "triton" may be off by beyond the reference under autocast, relative: half a rounding; the interpreter
    truncates to bfloat16 where a GPU rounds, which is up to two of them."""
    return torch.finfo(products).eps * (2 if products == torch.bfloat16 and DEVICE == "cpu" else 0.5)


def run_half(given: list[Tensor], impl: str, products: torch.dtype, features: str, grad: Tensor) -> list[Tensor]:
    """Result and gradients under autocast to ``products``; impl "truth": of the same values in float64."""
    dtype = products if features == "16 bits" else torch.float32
    given = [given[0].to(dtype), *given[1:]]  # so that "truth" starts from the same features
    wide = torch.float64 if impl == "truth" else None
    leaves = [tensor.detach().to(DEVICE, wide or tensor.dtype).requires_grad_() for tensor in given]
    with torch.autocast(DEVICE, products, enabled=wide is None):
        out = residual_block(*leaves, "reference" if wide else impl)
    out.backward(grad.to(DEVICE, dtype).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def check_half(given: list[Tensor], products: torch.dtype, features: str, more: float = 1.0) -> None:
    grad = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(9))
    truth, plain, ours = (run_half(given, impl, products, features, grad) for impl in ("truth", "reference", "triton"))
    for name, one, other, true, leaf in zip(
        ("out", "x", "w1", "b1", "w2", "b2"), ours, plain, truth, [given[0], *given], strict=True
    ):
        assert one.shape == leaf.shape and one.dtype == other.dtype, name
        allowed = distance(other, true) + more * slack(products)
        assert distance(one, true) <= allowed, (name, distance(one, true), allowed)


@needs_triton
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("shape", "features", "products"), TRITON_CASES)
def test_triton_where_no_value_is_near_a_kink(shape, features, products) -> None:
    """All is positive, so every ReLU passes, nothing can flip and the bound is that of rounding."""
    check_half([tensor.abs() + 0.01 for tensor in arguments(shape)], products, features)


@needs_triton
@pytest.mark.usefixtures("poisoned_memory")
@HALVES
@FEATURES
@pytest.mark.parametrize("shape", [(1, 64, 17, 9), (2, 32, 9, 7)])
def test_triton_with_both_signs(shape, features, products) -> None:
    """Values within rounding of 0 pass their gradient on one side only, so gradients are further apart."""
    check_half(arguments(shape), products, features, more=16)


@needs_triton
@pytest.mark.usefixtures("poisoned_memory")
@HALVES
@FEATURES
@pytest.mark.parametrize("maps", [16, 96])
def test_triton_sums_in_float32_and_rounds_only_operands(maps, features, products) -> None:
    """Small whole numbers are exact in 16 bits: result and gradients are those of float64 to the last bit."""
    random = torch.Generator().manual_seed(0)
    shape = (2, maps, 13, 11)  # more pixels than a tile, and not a multiple

    def whole(most: int, *size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=random).float()

    def sparse(most: int) -> Tensor:  # sums stay below 256, bfloat16's last exact whole number
        weight = whole(1, maps, maps, 3, 3)
        weight[torch.rand(weight.shape, generator=random) > 4 / maps] = 0
        return weight

    given = [whole(1, *shape), sparse(1), whole(2, maps), sparse(1), whole(2, maps)]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    grad = whole(1, *shape)
    truth, ours = (run_half(given, impl, products, features, grad) for impl in ("truth", "triton"))
    assert max(float(tensor.abs().max()) for tensor in (truth[0], truth[1])) < 256
    for name, one, true in zip(("out", "x", "w1", "b1", "w2", "b2"), ours, truth, strict=True):
        if name in ("w1", "w2"):  # sums over pixels, which torch rounds to 16 bits
            torch.testing.assert_close(one.double(), true, rtol=torch.finfo(products).eps, atol=0)
        else:
            assert torch.equal(one.double(), true), name


@needs_triton
@HALVES
def test_triton_rounds_nothing_that_goes_through_the_skip_connection(products) -> None:
    """Of float32 features, whatever the products are rounded to."""
    features, *layers = (torch.zeros_like(tensor) for tensor in arguments((1, 16, 9, 9)))
    features.normal_(generator=torch.Generator().manual_seed(0))
    grad = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    out, through, *_ = run_half([features, *layers], "triton", products, "float32", grad)
    assert torch.equal(out.cpu(), features.relu())
    assert torch.equal(through.cpu(), torch.where(features > 0, grad, 0.0))


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="it watches the interpreter")
@pytest.mark.parametrize("shape", [(1, 16, 5, 7), (2, 48, 9, 9), (1, 160, 3, 3)])
def test_triton_touches_nothing_outside_its_tensors(monkeypatch, shape) -> None:
    """Values that are read there and dropped again would show in no result, and end a GPU's process."""
    from triton.runtime import interpreter

    from fastsimgan.kernels import residual_block as kernels

    bounds: list[tuple[int, int]] = []
    seen = []

    class Watched:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
                bounds[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
                self.kernel[grid](*args, **kwargs)

            return launch

    def check(pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[mask.data].astype("int64").reshape(-1)
        inside = sum(((touched >= low) & (touched + size <= high)).astype("int64") for low, high in bounds)
        assert inside.all(), f"{(inside == 0).sum()} addresses outside of all tensors"
        seen.append(touched.size)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(
        builder, "create_masked_load", lambda self, p, mask, *r: check(p, mask) or load(self, p, mask, *r)
    )
    monkeypatch.setattr(
        builder,
        "create_masked_store",
        lambda self, p, value, mask, *r: check(p, mask) or store(self, p, value, mask, *r),
    )
    for name in ("convolution_kernel", "gate_kernel"):
        monkeypatch.setattr(kernels, name, Watched(getattr(kernels, name)))
    run_half(arguments(shape), "triton", torch.float16, "float32", torch.ones(shape))
    assert len(seen) > 50  # or the interpreter is no longer watched


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_triton_any_layout(layout: str) -> None:
    given = arguments((3, 16, 6, 10))
    expected = run_half(given, "triton", torch.float16, "float32", torch.ones(3, 16, 6, 10))
    if layout == "contiguous":
        given = [tensor.contiguous() for tensor in given]
    elif layout == "channels_last":
        given = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given]
    elif layout == "sliced":
        given[0] = torch.cat([given[0], given[0]], 3)[..., :10]
        given[2] = torch.stack([given[2], given[2]], 1)[:, 0]
    else:
        given = [t.transpose(2, 3).contiguous().transpose(2, 3) if t.dim() == 4 else t for t in given]
    found = run_half(given, "triton", torch.float16, "float32", torch.ones(1, 1, 1, 1).expand(3, 16, 6, 10))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_triton
def test_triton_nan_comes_through_and_masks_are_the_relus_own() -> None:
    given = arguments((1, 16, 9, 9))
    zeros = [torch.zeros_like(tensor) for tensor in given]
    for gradient in run_half(zeros, "triton", torch.bfloat16, "float32", torch.ones(1, 16, 9, 9))[1:]:
        assert not bool(gradient.any())
    given[0][0, 3, 4, 4] = float("nan")
    out = run_half(given, "triton", torch.float16, "float32", torch.ones(1, 16, 9, 9))[0]
    assert bool(out[0, 3, 4, 4].isnan()) and not bool(out[0, :, 0, 0].isnan().any())


@needs_triton
@HALVES
@FEATURES
def test_triton_opcheck(features, products) -> None:
    given = [tensor.to(DEVICE) for tensor in arguments((1, 16, 5, 6))]
    given[0] = given[0].to(products if features == "16 bits" else torch.float32)
    leaves = tuple(tensor.requires_grad_() for tensor in given)
    torch.library.opcheck(torch.ops.fastsimgan.residual_block_triton.default, (*leaves, products))
    out, hidden = torch.ops.fastsimgan.residual_block_triton(*given, products)
    kept = [tensor.detach() for tensor in (out, given[0], hidden, out, given[1], given[3])]
    torch.library.opcheck(torch.ops.fastsimgan.residual_block_triton_backward.default, tuple(kept))


@needs_triton
def test_triton_compiles_to_the_same_bits() -> None:
    given = [tensor.to(DEVICE).requires_grad_() for tensor in arguments((1, 16, 9, 9))]
    compiled = torch.compile(lambda *tensors: residual_block(*tensors, "triton"), backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = [block(*given) for block in (compiled, lambda *tensors: residual_block(*tensors, "triton"))]
    one, other = ([out, *torch.autograd.grad(out, given, torch.ones_like(out))] for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@needs_triton
def test_the_refiner_can_be_told_to_take_triton() -> None:
    refiner = trained(1, amount=0.1, width=32, blocks=2).to(DEVICE)
    images = (torch.rand(2, 1, 9, 11) * 2 - 1).to(DEVICE)
    found = {}
    with torch.autocast(DEVICE, torch.float16):
        for impl in ("triton", "reference"):
            refiner.impl = impl
            found[impl] = refiner(images)
    assert found["triton"].dtype == torch.float32 and not torch.equal(found["triton"], found["reference"])
    torch.testing.assert_close(found["triton"], found["reference"], atol=1e-3, rtol=0)


@needs_triton
def test_triton_names_what_it_needs_and_auto_leaves_it_to_the_race() -> None:
    given = [tensor.to(DEVICE) for tensor in arguments((1, 16, 5, 5))]
    features, *layers = given
    with pytest.raises(UnavailableError, match="multiplies in float16 or bfloat16, .* got torch.float32"):
        residual_block(*given, "triton")
    half = [tensor.half() for tensor in given]
    assert residual_block(*half, "triton").dtype == torch.float16  # no autocast needed
    with pytest.raises(UnavailableError, match="must be torch.float32 or torch.float16, got torch.bfloat16"):
        residual_block(half[0], half[1].bfloat16(), *half[2:], "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        with pytest.raises(UnavailableError, match="must be torch.float32 or torch.bfloat16, got torch.float16"):
            residual_block(*half, "triton")
        with pytest.raises(UnavailableError, match="multiple of 16 feature maps, at most 1024, got 24"):
            residual_block(*(tensor.to(DEVICE) for tensor in arguments((1, 24, 5, 5))), "triton")
        with pytest.raises(UnavailableError, match="empty"):
            residual_block(features[:0], *layers, "triton")
        with pytest.raises(UnavailableError, match=r"(needs CUDA|must be on features') ?.*"):
            residual_block(features.to("meta"), *layers, "triton")
    assert torch.equal(residual_block(*half), residual_block(*half, "reference"))


def test_triton_missing_is_said(monkeypatch) -> None:
    monkeypatch.setitem(op._MISSING, "triton", "no CUDA device")
    with pytest.raises(UnavailableError, match="residual_block impl='triton': no CUDA device"):
        residual_block(*(tensor.half() for tensor in arguments((1, 16, 5, 5))), "triton")


@needs_triton
@HALVES
@pytest.mark.parametrize(
    ("features", "backward", "bytes_a_value"),
    [("float32", False, 16), ("16 bits", False, 10), ("float32", True, 36), ("16 bits", True, 18)],
)
def test_bytes_moved_a_value_are_those_of_the_launches(monkeypatch, features, backward, bytes_a_value, products):
    """What a block's launches are given, each tensor once, is what `traffic` says; weights and sums are small."""
    from fastsimgan.kernels import residual_block as kernels

    shape, launches = (64, 32, 35, 55), []
    values = math.prod(shape)

    class Recorder:
        def __init__(self, outputs: tuple[str, ...], names: list[str]) -> None:
            self.outputs, self.names = outputs, names

        def __getitem__(self, grid):
            def record(*args, **_):
                moved = {True: 0.0, False: 0.0}
                for name, tensor in zip(self.names, args, strict=False):
                    if isinstance(tensor, Tensor) and tensor.numel() == values:
                        moved[name in self.outputs] += tensor.element_size()
                    elif isinstance(tensor, Tensor):
                        assert tensor.numel() * tensor.element_size() < 0.1 * values
                launches.append((moved[False], moved[True]))

            return record

    for name, outputs in {"convolution_kernel": ("target",), "gate_kernel": ("outer", "operand")}.items():
        monkeypatch.setattr(kernels, name, Recorder(outputs, list(getattr(kernels, name).arg_names)))
    monkeypatch.setattr(kernels, "conv2d_weight", lambda _, size, *args, **kwargs: torch.empty(size, device="meta"))
    dtype = products if features == "16 bits" else torch.float32
    block = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight, bias = torch.empty((32, 32, 3, 3), device="meta"), torch.empty(32, device="meta")
    out, hidden = kernels.forward(block, weight, bias, weight, bias, products)
    if backward:
        launches.clear()
        kernels.backward(out, block, hidden, out, weight, weight)
    said = kernels.traffic(dtype, products, backward)
    assert launches == [(launch.read, launch.written) for launch in said]
    assert sum(map(sum, launches)) == bytes_a_value
