"""The networks, against the numbers of the paper (§3.1, §3.2)."""

import pytest
import torch
from refiners import trained
from torch import nn

from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.errors import InputError
from fastsimgan.models.classifier import Classifier
from fastsimgan.models.discriminator import Discriminator
from fastsimgan.models.gaze import GazeNetwork
from fastsimgan.models.refiner import CURVE, Refiner, put_together


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_35x55_image_reaches_9600_features():
    assert GazeNetwork(35, 55).features(torch.zeros(2, 1, 35, 55)).shape == (2, 9600)


def test_parameter_counts():
    assert parameters(Refiner()) == 296_129
    assert parameters(Discriminator()) == 75_906


@pytest.mark.parametrize("shape", [(1, 1, 35, 55), (2, 3, 17, 9), (1, 1, 28, 28)])
def test_refiner_keeps_shape_and_range(shape):
    images = torch.rand(shape) * 2 - 1
    for refiner in (trained(shape[1], amount=2, width=8, blocks=1), Refiner(shape[1], width=8, computes="image")):
        refined = refiner(images)
        assert refined.shape == shape and refined.abs().max() <= 1 and not torch.equal(refined, images)


def test_hand_networks():
    refiner = Refiner(1, blocks=10, first_kernel=7)
    assert refiner.first.kernel_size == (7, 7) and len(refiner.blocks) == 10
    assert Discriminator(kind="hand")(torch.zeros(1, 1, 224, 224)).shape == (1, 2, 7, 7)


@pytest.mark.parametrize(("local", "patches"), [(True, (9, 14)), (False, (1, 1))])
def test_local_discriminator_has_a_map_and_global_one_patch(local, patches):
    assert Discriminator(local=local)(torch.zeros(3, 1, 35, 55)).shape == (3, 2, *patches)


def test_discriminator_is_not_linear_and_its_logits_are_free():
    """Mistake 3: a D without activations is affine, and a ReLU on the logits makes them non-negative."""
    torch.manual_seed(0)
    d = Discriminator()
    a, b = 100 * torch.randn(2, 64, 1, 35, 55)
    affine_gap = d(a + b) - d(a) - d(b) + d(torch.zeros_like(a))
    assert affine_gap.abs().max() > 0.1
    assert (d(a) < 0).any()
    assert isinstance(d.layers[-1], nn.Conv2d)  # no activation after the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "width"), [(1, 32), (3, 32), (4, 7), (1, 1)])
@pytest.mark.parametrize("stored", [torch.uint8, torch.uint16])
def test_a_fresh_refiner_is_the_identity_to_the_bit(dtype, channels, width, stored):
    """Of any width, any number of channels, and with all features in 16 bits."""
    every = torch.arange(256 if stored == torch.uint8 else 65536, dtype=torch.int32).to(stored)
    images = every.reshape(1, 1, 16, -1).repeat(1, channels, 1, 1)
    prepared = prepare(images, "keep")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        refined = Refiner(channels, width=width, blocks=2)(prepared)
    assert refined.dtype == torch.float32 and torch.equal(refined, prepared)
    assert torch.equal(from_float(refined, stored).int(), images.int())


def test_no_change_leaves_the_range_and_none_is_out_of_reach():
    """Black can become white and white black; what rounding would push out stays in."""
    random = torch.Generator().manual_seed(0)
    images = torch.cat([torch.rand(1 << 20, generator=random) * 2 - 1, 1 - torch.rand(1 << 20, generator=random) ** 8])
    for computed in (torch.randn(images.shape, generator=random) * 3, torch.full_like(images, 9.5)):
        for sign in (1, -1):
            refined = put_together(sign * images, computed, "change")
            assert refined.abs().max() <= 1
    far = torch.tensor([20.0, -20.0])
    assert put_together(torch.tensor([-1.0, 1.0]), far, "change").tolist() == [1, -1]


def test_the_change_is_added_before_the_tanh():
    images, change = torch.linspace(-1, 1, 41).double()[:, None], torch.linspace(-3, 3, 31).double()
    expected = (torch.atanh(CURVE * images) + change).tanh().div(CURVE).clamp(-1, 1)
    torch.testing.assert_close(put_together(images, change, "change"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("computes", ["change", "image"])
def test_only_the_computed_change_is_rounded_to_16_bits(computes):
    images, computed = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for dtype in (torch.float16, torch.bfloat16):
        exact = put_together(images, computed.to(dtype).float(), computes)
        assert torch.equal(put_together(images, computed.to(dtype), computes), exact)


@pytest.mark.parametrize("channels", [1, 3])
def test_at_the_identity_every_pixel_has_its_gradient(channels):
    refiner = Refiner(channels, width=8, blocks=1)
    images = torch.tensor([-1.0, -0.5, 0.0, 1.0]).expand(1, channels, 4, 4)
    change = torch.zeros(images.shape, requires_grad=True)
    put_together(images, change, "change").sum().backward()
    assert (change.grad > 0.4).all()  # at black and white too
    refiner(images).square().sum().backward()
    assert refiner.last.weight.grad.abs().max() > 0
    assert not refiner.first.weight.grad.any()  # nothing passes the last layer, which is zero, in the first step
    with torch.no_grad():
        refiner.last.weight -= 0.1 * refiner.last.weight.grad
    refiner(images).square().sum().backward()
    assert refiner.first.weight.grad.abs().max() > 0 and refiner.blocks[0].conv2.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("dtype", "levels"), [(torch.bfloat16, 0.5), (torch.float16, 0.08)])
def test_autocast_takes_all_features_in_16_bits(dtype, levels):
    refiner = trained(1, width=32)
    images = torch.rand(4, 1, 20, 30) * 2 - 1
    seen = []
    for layer in (refiner.first, *refiner.blocks, refiner.last):
        layer.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    with torch.no_grad():
        expected = refiner(images)
        seen.clear()
        with torch.autocast("cpu", dtype):
            found = refiner(images)
    assert set(seen) == {dtype} and found.dtype == torch.float32
    assert (expected - images).abs().mean() * 127.5 > 10
    assert 0 < (found - expected).square().mean().sqrt() * 127.5 < levels  # 54 and 70 dB


def test_the_papers_network_computes_the_image():
    torch.manual_seed(0)
    refiner = Refiner(1, width=8, blocks=1, computes="image")
    images = torch.rand(1, 1, 9, 9) * 2 - 1
    plain = torch.relu(refiner.first(images))
    block = refiner.blocks[0]
    refiner.impl = "reference"
    plain = torch.relu(plain + block.conv2(torch.relu(block.conv1(plain))))
    assert torch.equal(refiner(images), torch.tanh(refiner.last(plain)))


def test_bad_arguments():
    with pytest.raises(InputError, match="first_kernel must be odd.*got 4"):
        Refiner(1, first_kernel=4)
    with pytest.raises(InputError, match="computes must be one of change, image, got 'both'"):
        Refiner(1, computes="both")
    with pytest.raises(InputError, match=r'kind must be "gaze" or "hand", got .face.'):
        Discriminator(kind="face")
    with pytest.raises(InputError, match="at least 23x23.*got 20x55"):
        GazeNetwork(20, 55)


def test_classifier_takes_any_size():
    assert Classifier(10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
