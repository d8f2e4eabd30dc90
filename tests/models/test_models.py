"""The networks, against the numbers of the paper (§3.1, §3.2)."""

import pytest
import torch
from torch import nn

from fastsimgan.errors import InputError
from fastsimgan.models.classifier import Classifier
from fastsimgan.models.discriminator import Discriminator
from fastsimgan.models.gaze import GazeNetwork
from fastsimgan.models.refiner import Refiner


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_35x55_image_reaches_9600_features():
    assert GazeNetwork(35, 55).features(torch.zeros(2, 1, 35, 55)).shape == (2, 9600)


def test_parameter_counts():
    assert parameters(Refiner()) == 296_129
    assert parameters(Discriminator()) == 75_906


@pytest.mark.parametrize("shape", [(1, 1, 35, 55), (2, 3, 17, 9), (1, 1, 28, 28)])
def test_refiner_keeps_shape_and_range(shape):
    refined = Refiner(shape[1], width=8, blocks=1)(torch.rand(shape) * 2 - 1)
    assert refined.shape == shape and refined.abs().max() <= 1


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


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_init_is_near_the_identity_and_can_learn(channels):
    torch.manual_seed(0)
    refiner = Refiner(channels)
    assert refiner.identity_init_()
    images = torch.rand(4, channels, 20, 30) * 2 - 1
    change = (refiner(images) - images).abs()
    assert change.mean() * 127.5 < 2.5  # grey levels
    refiner(images).sum().backward()
    assert refiner.blocks[0].conv2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_identity_to_a_hundredth_of_a_grey_level(dtype):
    """All in bfloat16 it is 2 grey levels off on average: 8 bits cannot hold the skip path's features."""
    torch.manual_seed(0)
    refiner = Refiner(1, width=32)
    assert refiner.identity_init_()
    images = torch.rand(4, 1, 20, 30) * 2 - 1
    with torch.no_grad():
        expected = refiner(images)
        with torch.autocast("cpu", dtype):
            found = refiner(images)
            convolved = refiner.blocks[0].conv1(images.expand(-1, 32, -1, -1))
    assert (found - expected).abs().max() * 127.5 < 0.01 and found.dtype == torch.float32
    assert convolved.dtype == dtype  # the branches do compute in half precision


def test_identity_init_refuses_a_narrow_network():
    refiner = Refiner(3, width=32)
    before = {name: value.clone() for name, value in refiner.state_dict().items()}
    assert not refiner.identity_init_()
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())


def test_bad_arguments():
    with pytest.raises(InputError, match="first_kernel must be odd.*got 4"):
        Refiner(1, first_kernel=4)
    with pytest.raises(InputError, match=r'kind must be "gaze" or "hand", got .face.'):
        Discriminator(kind="face")
    with pytest.raises(InputError, match="at least 23x23.*got 20x55"):
        GazeNetwork(20, 55)


def test_classifier_takes_any_size():
    assert Classifier(10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
