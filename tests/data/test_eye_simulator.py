"""The built-in eyes: their labels describe what is in the picture, and the two populations are what they say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastsimgan.data.simulators import eyes as simulator
from fastsimgan.data.simulators.eyes import population_seed, simulate_eyes
from fastsimgan.errors import InputError

POPULATIONS = ("synthetic", "stand_in_real")


def dark_blob(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid and standard deviation, both (x, y) [N, 2], of what is as dark as only a synthetic pupil is."""
    weight = np.clip(24.0 - images, 0, None)
    axes = np.meshgrid(np.arange(images.shape[2]), np.arange(images.shape[1]))
    mass = weight.sum(axis=(1, 2))
    centroid = np.stack([(weight * axis).sum(axis=(1, 2)) / mass for axis in axes], axis=1)
    spread = [
        np.sqrt((weight * (axis - centroid[:, i, None, None]) ** 2).sum(axis=(1, 2)) / mass)
        for i, axis in enumerate(axes)
    ]
    return centroid, np.stack(spread, axis=1)


def clear_of_lids(eyes: dict[str, np.ndarray], pixels: float) -> np.ndarray:
    """Which eyes have both lids at least this far above and below the pupil's centre."""
    clear = []
    for (x, y), margin in zip(eyes["pupil_centre"], eyes["lid_margin"], strict=True):
        upper, lower = margin[:9], np.vstack([margin[9:], margin[:1]])[::-1]
        clear.append(
            y - np.interp(x, upper[:, 0], upper[:, 1]) > pixels and np.interp(x, lower[:, 0], lower[:, 1]) - y > pixels
        )
    return np.array(clear)


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize(("height", "width"), [(35, 55), (8, 8), (36, 60), (61, 33)])
def test_shapes_dtypes_and_ranges(population, height, width):
    eyes = simulate_eyes(50, 0, population=population, height=height, width=width)
    assert eyes["images"].shape == (50, height, width)
    assert eyes["images"].dtype == np.uint8
    assert eyes["images"].std(axis=(1, 2)).min() > 5  # no flat picture
    for name, shape in {"pitch_yaw": (50, 2), "pupil_centre": (50, 2), "lid_margin": (50, 16, 2)}.items():
        assert eyes[name].shape == shape
        assert eyes[name].dtype == np.float32
        assert np.isfinite(eyes[name]).all()
    assert np.abs(np.rad2deg(eyes["pitch_yaw"])).max() < 30
    assert (eyes["pupil_centre"] > 0).all()
    assert (eyes["pupil_centre"] < (width - 1, height - 1)).all()


@pytest.mark.parametrize("scale", [1, 3])
def test_pupil_centre_is_where_the_dark_pupil_is(scale):
    eyes = simulate_eyes(400, 1, height=35 * scale, width=55 * scale)
    clear = clear_of_lids(eyes, 5.5 * scale)
    assert clear.sum() > 50
    error = np.linalg.norm(dark_blob(eyes["images"])[0] - eyes["pupil_centre"], axis=1)[clear]
    # The corneal reflection may hide a part of the pupil, hence the tail.
    assert np.median(error) < 0.2 * scale
    assert np.quantile(error, 0.95) < 1.0 * scale


@pytest.mark.parametrize("population", POPULATIONS)
def test_no_lid_covers_the_pupil_centre(population):
    assert clear_of_lids(simulate_eyes(1000, 12, population=population), 0).all()


@pytest.mark.parametrize("population", POPULATIONS)
def test_the_pupil_moves_as_the_gaze_vector_says(population):
    eyes = simulate_eyes(2000, 2, population=population)
    pitch, yaw = eyes["pitch_yaw"].T
    gaze_x, gaze_y = -np.cos(pitch) * np.sin(yaw), -np.sin(pitch)  # right and down in the image
    x, y = eyes["pupil_centre"].T
    assert np.corrcoef(x, gaze_x)[0, 1] > 0.9
    assert np.corrcoef(y, gaze_y)[0, 1] > 0.9
    # About 16 pixels a unit: the iris lies 10.5 mm from the eyeball's centre, and 1.5 pixels make a mm.
    assert np.polyfit(gaze_x, x, 1)[0] == pytest.approx(15.8, rel=0.05)
    assert np.polyfit(gaze_y, y, 1)[0] == pytest.approx(15.8, rel=0.05)


def test_the_picture_follows_left_right_up_and_down():
    eyes = simulate_eyes(2000, 3)
    blob = dark_blob(eyes["images"])[0]
    pitch, yaw = np.rad2deg(eyes["pitch_yaw"]).T
    level, ahead = np.abs(pitch) < 6, np.abs(yaw) < 6
    assert blob[level & (yaw > 18), 0].mean() < 27 - 4  # positive yaw: left of the image's centre
    assert blob[level & (yaw < -18), 0].mean() > 27 + 4
    assert blob[ahead & (pitch > 8), 1].mean() < 17 - 1.5  # positive pitch: up
    assert blob[ahead & (pitch < -12), 1].mean() > 17 + 1.5


def test_a_turned_iris_is_foreshortened(monkeypatch):
    monkeypatch.setitem(simulator._POPULATIONS["synthetic"], "glint", (0, 0))  # it would hide a part of the disc
    eyes = simulate_eyes(800, 4, height=105, width=165)
    pitch, yaw = np.abs(np.rad2deg(eyes["pitch_yaw"])).T
    clear = clear_of_lids(eyes, 15) & (pitch < 6)
    spread = dark_blob(eyes["images"])[1]
    aspect = spread[:, 0] / spread[:, 1]
    ahead, turned = clear & (yaw < 6), clear & (yaw > 22)
    assert np.median(aspect[ahead]) == pytest.approx(1, abs=0.02)
    assert np.median(aspect[turned]) == pytest.approx(np.cos(np.deg2rad(yaw[turned])).mean(), abs=0.02)


def test_lid_margin_encloses_the_eyeball():
    eyes = simulate_eyes(200, 5, height=105, width=165)
    inside = np.zeros(eyes["images"].shape, bool)
    for mask, margin in zip(inside, eyes["lid_margin"], strict=True):
        canvas = Image.new("1", (165, 105))
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in margin], fill=1)
        mask[:] = np.asarray(canvas)
    # Only the sclera is this bright where the skin is dark enough to tell.
    dark_skin = np.array([np.quantile(i[~m], 0.9) < 170 for i, m in zip(eyes["images"], inside, strict=True)])
    assert dark_skin.sum() > 50
    bright = eyes["images"][dark_skin] > 210
    assert bright.sum(axis=(1, 2)).mean() > 360
    assert (bright & inside[dark_skin]).sum() / bright.sum() > 0.98


def test_lid_margin_starts_at_the_inner_corner_and_opens_with_the_pitch():
    eyes = simulate_eyes(1000, 6)
    margin, pitch = eyes["lid_margin"], eyes["pitch_yaw"][:, 0]
    assert (margin[:, 0, 0] == margin[:, :, 0].min(axis=1)).all()  # the inner corner is on the left
    assert (margin[:, 8, 0] == margin[:, :, 0].max(axis=1)).all()
    assert (margin[:, 1:8, 1] < margin[:, :8:-1, 1]).all()  # the upper lid is above the lower, point by point
    assert np.corrcoef(margin[:, 12, 1] - margin[:, 4, 1], pitch)[0, 1] > 0.2
    assert np.corrcoef(margin[:, 4, 1], pitch)[0, 1] < -0.7


@pytest.mark.parametrize("population", POPULATIONS)
def test_same_arguments_same_bytes_and_a_prefix_does_not_depend_on_count(population):
    long, again, short = (simulate_eyes(n, 7, population=population) for n in (100, 100, 5))
    for name in long:
        assert long[name].tobytes() == again[name].tobytes()
        assert long[name][:5].tobytes() == short[name].tobytes()
    other = simulate_eyes(5, 8, population=population)
    assert not np.isin(other["pitch_yaw"], short["pitch_yaw"]).any()


def test_populations_never_share_an_eye_even_with_one_seed():
    a, b = (simulate_eyes(100, 9, population=population) for population in POPULATIONS)
    position = [(e["pupil_centre"] - e["pupil_centre"].mean(axis=0)).T for e in (a, b)]
    assert abs(np.corrcoef(position[0][0], position[1][0])[0, 1]) < 0.4


def test_population_seeds_differ_by_role_and_by_base():
    roles = ("synthetic", "real_unlabelled", "real_validation")
    seeds = [population_seed(base, role) for base, role in product(range(200), roles)]
    assert len(set(seeds)) == len(seeds)
    assert population_seed(3, "synthetic") == population_seed(3, "synthetic")
    assert all(0 <= seed < 2**64 for seed in seeds)
    train, test = (simulate_eyes(200, population_seed(0, role), population="stand_in_real") for role in roles[1:])
    assert not np.isin(train["pitch_yaw"], test["pitch_yaw"]).all(axis=1).any()


def distance_from_uniform(images: np.ndarray) -> np.ndarray:
    """Mean distance of each image's cumulative grey levels from the straight line, in [0, 0.5]."""
    levels = np.sort(images.reshape(len(images), -1), axis=1) / 255
    return np.abs(levels - np.linspace(0, 1, levels.shape[1])).mean(axis=1)


def test_only_the_stand_in_is_equalised():
    synthetic, stand_in = (simulate_eyes(200, 10, population=population)["images"] for population in POPULATIONS)
    assert distance_from_uniform(stand_in).mean() < 0.02
    assert distance_from_uniform(synthetic).mean() > 0.1
    assert (stand_in.min(axis=(1, 2)) == 0).all()
    assert (stand_in.max(axis=(1, 2)) == 255).all()


def test_the_stand_in_looks_at_a_narrower_range():
    wide, narrow = (simulate_eyes(1000, 11, population=population)["pitch_yaw"] for population in POPULATIONS)
    assert (narrow.std(axis=0) < 0.7 * wide.std(axis=0)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"count": 2.5}, "count must be an integer of at least 1, got 2.5"),
        ({"count": True}, "count must be an integer of at least 1, got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"height": 7}, "height must be an integer of at least 8, got 7"),
        ({"width": "55"}, "width must be an integer of at least 8, got '55'"),
        ({"population": "real"}, "population must be one of synthetic, stand_in_real; got 'real'"),
    ],
)
def test_bad_arguments_name_the_rule_and_the_value(change, message):
    with pytest.raises(InputError) as error:
        simulate_eyes(**{"count": 1, "seed": 0, **change})
    assert str(error.value) == message


def test_a_bad_role_is_refused():
    with pytest.raises(InputError, match="role must be one of synthetic, real_unlabelled, real_validation; got 'test'"):
        population_seed(0, "test")
