"""Depth at its edges: noise is counted where it is, and a moved edge by a joint is seen."""

from __future__ import annotations

import numpy as np
import pytest

from fastsimgan.data.simulators.hands import EVALUATED, simulate_hands, through_sensor
from fastsimgan.errors import InputError
from fastsimgan.metrics.depth_edges import depth_edges, joint_edge_shifts, noise_by_place

HANDS = simulate_hands(40, 0, height=64, width=64)
IMAGES, JOINTS = HANDS["images"], HANDS["joints"][:, EVALUATED]


def test_edges_are_where_depth_jumps_or_ends() -> None:
    image = np.zeros((1, 8, 8), np.uint16)
    image[0, 2:6, 2:6] = 1000
    image[0, 2:6, 4:6] = 1004  # a gentle step, of what this hand spans from 1000 to 1400
    image[0, 5, 2:6] = 1400
    found = depth_edges(image)[0]
    assert found[2, 1] and found[2, 2] and not found[0].any()  # both sides of the outline
    assert found[4, 3] and found[5, 3]  # both sides of the jump
    assert not found[3, 3] and not found[3, 4]


def test_noise_is_counted_where_it_was_put() -> None:
    edges = depth_edges(IMAGES)
    rng = np.random.default_rng(0)
    for where, other in ((edges, "flat"), ((IMAGES > 0) & ~edges, "edges")):
        noisy = np.where(where, np.clip(IMAGES + rng.normal(0, 500, IMAGES.shape), 0, 65535), IMAGES).astype(np.uint16)
        found = noise_by_place(IMAGES, noisy)
        assert getattr(found, other).error == 0 < getattr(found, "flat" if other == "edges" else "edges").error
        assert found.background.error == 0
    missing = np.where(edges, 0, IMAGES)
    found = noise_by_place(IMAGES, missing)
    assert found.edges.lost == 100 and found.flat.lost == 0 and found.edges_to_flat is None
    assert found.edges.pixels + found.flat.pixels + found.background.pixels == pytest.approx(1)


def test_the_stand_in_sensors_noise_is_at_edges() -> None:
    seen = through_sensor(IMAGES, 0)
    assert seen.dtype == np.uint16 and np.array_equal(seen, through_sensor(IMAGES, 0))
    assert noise_by_place(IMAGES, seen).edges_to_flat > 3


def test_a_moved_picture_is_seen_at_the_joints_and_a_still_one_is_not() -> None:
    assert np.nanmax(joint_edge_shifts(IMAGES, IMAGES, JOINTS)) == 0
    moved = joint_edge_shifts(IMAGES, np.roll(IMAGES, 2, 2), JOINTS)
    # along normals, which point all ways: from 0 to 2
    assert 0.8 < np.nanmedian(moved) <= 2.2
    blank = np.zeros_like(IMAGES[:1])
    assert np.isnan(joint_edge_shifts(np.concatenate([blank, IMAGES]), np.concatenate([blank, IMAGES]),
                                      np.concatenate([JOINTS[:1], JOINTS]))[0])  # fmt: skip


def test_bad_images_are_refused() -> None:
    with pytest.raises(InputError, match="must hold some depth"):
        depth_edges(np.zeros((2, 8, 8), np.uint16))
    with pytest.raises(InputError, match="one shape"):
        noise_by_place(IMAGES, IMAGES[1:])
