"""Joints as heat maps and back, moved along with a picture, and a pose network that can learn them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastsimgan.data.simulators.hands import EVALUATED, simulate_hands
from fastsimgan.errors import InputError
from fastsimgan.evaluation import pose_network
from fastsimgan.evaluation.pose_network import PoseJudge, train_and_find_joints
from fastsimgan.metrics.joints import (
    draw_heat_maps,
    find_joints,
    heat_map_loss,
    joint_errors,
    probabilities,
    random_views,
    share_within,
)
from fastsimgan.models.hourglass import StackedHourglass


def places(count: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(count, 14, 2, generator=torch.Generator().manual_seed(0)) * (high - low) + low


@pytest.mark.parametrize("stride", [2, 4])
def test_joints_come_back_from_their_heat_maps(stride: int) -> None:
    joints = places(20, 8, 54)
    maps = draw_heat_maps(joints, 64 // stride, 80 // stride, stride)
    assert maps.shape == (20, 14, 64 // stride, 80 // stride) and maps.max() <= 1
    assert (find_joints(maps, stride) - joints).abs().max() < 1e-3
    assert (find_joints(probabilities(maps.clamp_min(1e-9).log()), stride) - joints).abs().max() < 1e-3


def test_a_peak_on_the_border_and_an_empty_map_give_a_place_in_the_picture() -> None:
    joints = torch.tensor([[[-0.5, 3.0], [63.0, 63.0], [500.0, 3.0]]])
    found = find_joints(draw_heat_maps(joints, 16, 16, 4), 4)
    assert ((found >= 0) & (found <= 63)).all()
    assert (found[0, :2] - joints[0, :2]).abs().max() < 2.1  # half a cell


def test_rotation_and_crop_take_joints_along_and_back() -> None:
    joints = places(200, -10, 80)
    views = random_views(200, (48, 64), (96, 128), torch.Generator().manual_seed(1))
    seen = views.joints(joints)
    assert (views.joints_back(seen) - joints).abs().max() < 0.01
    angles = torch.atan2(views.matrix[:, 1, 0], views.matrix[:, 0, 0]).rad2deg()
    scale = views.matrix.det().sqrt() / 2  # what is seen is twice as large
    assert 15 < angles.abs().max() <= 20 and 1 / 1.151 < scale.min() < 0.9 and 1.1 < scale.max() < 1.151


def test_the_picture_moves_as_its_joints_do() -> None:
    joints = places(20, 24, 40)[:, :3]
    images = draw_heat_maps(joints, 64, 64, 1, sigma=2.0) * 2 - 1  # a blob at each joint, one a channel
    views = random_views(20, (64, 64), (64, 64), torch.Generator().manual_seed(2))
    moved = views.images(images)
    off = find_joints((moved + 1) / 2, 1) - views.joints(joints)
    assert off.abs().max() < 0.2 and off.mean((0, 1)).abs().max() < 0.02  # bilinear blobs are no Gaussians any more
    plain = random_views(20, (64, 64), (64, 64), torch.Generator(), rotation=0, zoom=1, shift=0)
    assert (plain.images(images) - images).abs().max() < 1e-5
    assert torch.equal(plain.joints(joints), joints)
    turned = random_views(20, (8, 8), (8, 8), torch.Generator(), rotation=20)
    assert turned.images(torch.ones(20, 1, 8, 8))[..., 0, 0].min() == -1  # background where there was no picture


def test_the_loss_is_least_at_the_target_and_passes_over_joints_that_are_out_of_the_picture() -> None:
    target = draw_heat_maps(torch.tensor([[[10.0, 20.0], [-90.0, 20.0]]]), 16, 16, 2)
    right = target.clamp_min(1e-30).log()
    wrong = right.roll(3, 3)
    assert heat_map_loss(right, target) < heat_map_loss(wrong, target)
    assert heat_map_loss(right, target) == heat_map_loss(right[:, :1], target[:, :1])
    assert heat_map_loss(right, target[:, [1, 1]]) == 0


def test_share_within_counts_all_joints() -> None:
    errors = joint_errors(np.array([[[0.0, 0], [3, 4]], [[0, 1], [9, 0]]]), np.zeros((2, 2, 2)))
    assert errors.tolist() == [[0, 5], [1, 9]]
    assert share_within(errors, np.array([0.0, 1, 4.9, 5, 10])).tolist() == [25, 50, 50, 75, 100]


def test_the_hourglass_is_newells() -> None:
    network = StackedHourglass(16, 3).eval()
    # two modules of one residual each have 6.7 M parameters in public ports of Newell's
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(6.7e6, rel=0.03)
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, 256, 256))
    assert [tuple(each.shape) for each in maps] == [(1, 16, 64, 64)] * 2


def test_every_module_is_supervised_and_odd_sizes_come_back() -> None:
    network = StackedHourglass(3, modules=3, features=8, depth=2, stride=2)
    maps = network(torch.randn(2, 1, 36, 44))
    assert [tuple(each.shape) for each in maps] == [(2, 3, 18, 22)] * 3
    maps[0].sum().backward()  # the first module's own maps train it, with no later one
    assert network.hourglasses[0][0].inner.inner.branch[2].weight.grad is not None
    assert network.hourglasses[1][0].beside.branch[2].weight.grad is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"features": 6}, "features must be a multiple of 4, got 6"), ({"stride": 3}, "stride must be 2 or 4, got 3"),
     ({"modules": 0}, "modules must be at least 1, got 0")],
)  # fmt: skip
def test_bad_arguments_of_the_hourglass(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StackedHourglass(14, **wrong)
    with pytest.raises(InputError, match="images must be at least 64 pixels each way here, got 32x80"):
        StackedHourglass(14, features=8)(torch.zeros(1, 1, 32, 80))


def test_a_small_one_overfits_32_hands() -> None:
    hands = simulate_hands(32, 0, height=32, width=32)
    joints = hands["joints"][:, EVALUATED]
    judge = PoseJudge(
        steps=150, batch_size=16, learning_rate=5e-3, ema_decay=0.9, input_size=32, features=48, depth=2, stride=2,
        rotation=0, zoom=1, shift=0,
    )  # fmt: skip
    arguments = (hands["images"], joints, hands["images"])
    found = train_and_find_joints(*arguments, seed=0, judge=judge, device=torch.device("cpu"))
    assert found.shape == joints.shape and found.dtype == np.float32
    assert share_within(joint_errors(found, joints), np.array([2.0]))[0] > 99


def test_the_same_seed_trains_the_same_network_whatever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[nn.Module] = []
    train = pose_network.train_task_network

    def keep(*args, **kwargs):
        trained.append(train(*args, **kwargs))
        return trained[-1]

    monkeypatch.setattr(pose_network, "train_task_network", keep)
    hands = simulate_hands(6, 0, height=16, width=16)
    judge = PoseJudge(steps=2, batch_size=4, input_size=16, features=8, depth=1, stride=2)
    for count in (2, 6):
        train_and_find_joints(
            hands["images"], hands["joints"], hands["images"][:count], seed=1, judge=judge, device=torch.device("cpu")
        )
    first, second = (each.state_dict() for each in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = trained[0].stem[1].running_mean  # batch norm's statistics are averaged too, not left as they began
    assert moved.abs().max() > 0 and not trained[0].training
