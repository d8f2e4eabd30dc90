"""Realism: distances against torchmetrics and closed forms; the two-sample test on sets whose answer is known."""

import numpy as np
import pytest
import torch

from fastsimgan.errors import InputError
from fastsimgan.metrics.realism import (
    classifier_test,
    frechet_distance,
    kernel_distance,
    random_features,
    realism,
    wilson_interval,
)


def features(seed, count=120, size=10, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, size))


def test_kid_is_torchmetrics_unbiased_polynomial_mmd():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    a, b = features(0), features(1, shift=0.3)
    theirs = kid.poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=3, gamma=None, coef=1.0)
    assert kernel_distance(a, b) == pytest.approx(float(theirs), rel=1e-9)


def test_frechet_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    a, b = features(0), features(1, shift=0.3) * 1.5
    moments = [t for part in (a, b) for t in (torch.from_numpy(part.mean(0)), torch.from_numpy(np.cov(part.T)))]
    assert frechet_distance(a, b) == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-8)


def test_frechet_of_a_moved_set_is_the_squared_distance():
    a = features(0)
    assert frechet_distance(a, a + 0.5) == pytest.approx(0.25 * a.shape[1], rel=1e-9)


def test_kid_is_unbiased():
    """Over many small draws of one distribution it is zero on average, which the biased form is far from."""
    values = [kernel_distance(features(2 * i, 12), features(2 * i + 1, 12)) for i in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_wilson_interval_against_its_published_form():
    # R: prop.test(81, 263, correct = FALSE)$conf.int
    assert wilson_interval(81, 263) == pytest.approx((0.2552689, 0.3662072), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)


def noise(seed, count=100, top=256):
    return np.random.default_rng(seed).integers(0, top, (count, 24, 26), dtype=np.uint8)


def test_classifier_test_tells_apart_what_differs_and_guesses_what_does_not():
    same = classifier_test(noise(0), noise(1), steps=40)
    assert same["low"] < 50 < same["high"] and same["tested"] == 100
    assert classifier_test(noise(0), noise(1, top=128), steps=40)["low"] > 90


def test_realism_orders_sets_and_repeats_itself():
    near, far = realism(noise(0), noise(1), steps=3), realism(noise(0, top=128), noise(1), steps=3)
    assert near["kid"] < far["kid"] and near["frechet"] < far["frechet"]
    assert near == realism(noise(0), noise(1), steps=3)
    assert random_features(np.zeros((3, 20, 20, 3), np.uint8)).shape == (3, 256)


@pytest.mark.parametrize("bad", [np.zeros((1, 10)), np.zeros((5, 9)), np.zeros(10)])
def test_bad_features_are_refused(bad):
    with pytest.raises(InputError, match="features must be"):
        kernel_distance(features(0), bad)


def test_too_few_or_unequal_images_are_refused():
    with pytest.raises(InputError, match="at least 20"):
        classifier_test(noise(0, 5), noise(1))
    with pytest.raises(InputError, match="one size"):
        classifier_test(noise(0), noise(1)[:, :20])
