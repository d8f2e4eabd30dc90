"""Label drift on built-in eyes whose iris, lids or whole picture were moved by known amounts."""

import numpy as np
import pytest
import torch

from fastsimgan.data.equalisation import equalise
from fastsimgan.data.simulators import eyes as simulator
from fastsimgan.errors import InputError
from fastsimgan.metrics.label_drift import describe, edge_shifts, label_drift, pupil_shifts


def moved_pair(count: int, move, camera: str = "synthetic", seed: int = 0):
    """Renders and the same eyes rendered again ``move`` = (right, down) pixels away, by either camera."""
    rng = np.random.default_rng(seed)
    geometry = simulator._draw(simulator._POPULATIONS["synthetic"], count, rng)
    other = simulator._draw(simulator._POPULATIONS[camera], count, rng)
    if camera == "synthetic":
        other = dict(geometry)
    for name in (*simulator._GEOMETRY, "pitch", "yaw"):
        other[name] = geometry[name]
    for name, pixels in zip(("crop_x", "crop_y"), move, strict=True):
        other[name] = geometry[name] + np.float32(pixels) / geometry["pixels_per_mm"]
    before, after = simulator._Eye(geometry, 35, 55), simulator._Eye(other, 35, 55)
    picture = after.render()
    if camera == "stand_in_real":
        picture = simulator._photograph(picture, after, rng, rng)
    stored = simulator._to_uint8(picture)
    if camera == "stand_in_real":
        stored = equalise(torch.from_numpy(stored)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(after.pupil_centre - before.pupil_centre, [move] * count, atol=1e-4)
    return simulator._to_uint8(before.render()), stored, before


@pytest.mark.parametrize("move", [(0.0, 0.0), (0.7, -0.4), (-1.3, 0.9)])
def test_a_known_shift_of_the_same_look_is_recovered_to_a_fifth_of_a_pixel(move):
    before, after, _ = moved_pair(60, move)
    shifts = pupil_shifts(before, after)
    assert np.isfinite(shifts).all()
    errors = np.linalg.norm(shifts - move, axis=1)
    assert np.median(errors) <= 0.2 and np.abs(np.median(shifts, 0) - move).max() <= 0.1


def test_a_shift_by_another_camera_is_recovered_to_a_fifth_of_a_pixel_beside_the_unmoved():
    """The other camera lights, blurs and equalises. What that alone seems to move is measured on unmoved eyes."""
    before, still, _ = moved_pair(150, (0, 0), "stand_in_real")
    floor = np.median(pupil_shifts(before, still), 0)
    for move in ((1.0, 0.0), (-0.8, 0.8)):
        _, after, _ = moved_pair(150, move, "stand_in_real")
        assert np.abs(np.median(pupil_shifts(before, after), 0) - floor - move).max() <= 0.2


def test_edges_of_the_lids_are_recovered():
    for right, down in ((0.0, 0.0), (0.0, 1.0)):
        before, after, eye = moved_pair(60, (right, down))
        margin = eye.lid_margin()[:, 2:7]  # the middle of the upper lid, where its normal is nearly vertical
        shifts = edge_shifts(before, after, margin)
        assert abs(np.nanmedian(shifts) - down) <= 0.2


def test_edges_without_a_margin_work_on_any_image():
    rng = np.random.default_rng(0)
    squares = np.full((6, 30, 30), 30, np.uint8)
    squares[:, 9:20, 9:20] = 220
    assert (edge_shifts(squares, squares) == 0).all()
    # every edge by 2 along its normal; smoothing makes it read low
    moved = edge_shifts(squares, np.roll(squares, (2, 2), (1, 2)))
    assert (moved > 1).all() and (moved < 2.2).all()
    colour = rng.integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    assert edge_shifts(colour, colour).max() == 0


def test_blank_images_have_no_iris_and_no_edges():
    blank = np.full((2, 35, 55), 128, np.uint8)
    assert np.isnan(pupil_shifts(blank, blank)).all() and np.isnan(edge_shifts(blank, blank)).all()
    drift = label_drift(blank, blank)
    assert drift["pupil_found"] == 0 and drift["pupil_px"] is None and drift["edges_px"] is None
    assert "no edges found" in describe(drift)


def test_the_summary_names_the_image_that_moved_most():
    before, after, _ = moved_pair(20, (0, 0))
    after[7] = moved_pair(20, (2, 0))[1][7]
    drift = label_drift(before, after)
    assert drift["worst"][0] == 7 and drift["pupil_px"]["max"] > 1.5 > drift["pupil_px"]["p90"]
    assert "iris moved" in describe(drift)
    assert "iris" not in describe(drift | {"pupil_found": 0.4})  # then these are hardly eyes


def test_sets_of_two_shapes_are_refused():
    with pytest.raises(InputError, match="must have one shape"):
        pupil_shifts(np.zeros((2, 35, 55), np.uint8), np.zeros((2, 35, 54), np.uint8))
