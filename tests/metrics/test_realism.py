"""Realism: distances against torchmetrics and closed forms; the two-sample test on sets whose answer is known."""

import numpy as np
import pytest
import torch

from fastsimgan.errors import InputError
from fastsimgan.metrics.features import onnx_features, random_features
from fastsimgan.metrics.realism import frechet_distance, high_frequency_energy, kernel_distance, realism
from fastsimgan.metrics.statistics import wilson_interval
from fastsimgan.metrics.two_sample import classifier_test, patch_test


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
    assert same.low < 50 < same.high and same.tested == 100
    assert classifier_test(noise(0), noise(1, top=128), steps=40).low > 90


def test_realism_orders_sets_and_repeats_itself():
    near, far = realism(noise(0), noise(1), steps=3), realism(noise(0, top=128), noise(1), steps=3)
    assert near.kid < far.kid and near.frechet < far.frechet
    assert near == realism(noise(0), noise(1), steps=3)
    assert random_features(np.zeros((3, 20, 20, 3), np.uint8)).shape == (3, 256)


def save_pooling(path, rank=4, kind=1):
    """An ONNX file whose features are the image's channel mean over 2×2 windows; ``kind`` 1 is float32, 10 float16."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper = onnx.helper
    shape = ["n", 1, "h", "w"][:rank]
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    values = [helper.make_tensor_value_info(name, kind, s) for name, s in (("x", shape), ("y", [None] * 4))]
    graph = helper.make_graph([node], "pooling", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_file_of_the_users_own_gives_the_features(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    features = onnx_features(save_pooling(tmp_path / "pool.onnx"))
    images = noise(0, 300)
    assert features(images) == pytest.approx(images.mean((1, 2))[:, None] / 127.5 - 1, abs=1e-5)
    kid = realism(noise(0), noise(1), features=features, steps=1).kid
    assert kid == pytest.approx(kernel_distance(features(noise(0)), features(noise(1))), rel=1e-6)


def test_a_file_that_gives_no_features_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (tmp_path / "no.onnx").write_bytes(b"not a network")
    for path in (tmp_path / "none.onnx", tmp_path / "no.onnx", save_pooling(tmp_path / "half.onnx", kind=10)):
        with pytest.raises(InputError, match=path.name):
            onnx_features(path)
    with pytest.raises(InputError, match="refuses images"):  # three channels to a network of one
        onnx_features(save_pooling(tmp_path / "pool.onnx"))(np.zeros((2, 20, 20, 3), np.uint8))


@pytest.mark.parametrize("bad", [np.zeros((1, 10)), np.zeros((5, 9)), np.zeros(10)])
def test_bad_features_are_refused(bad):
    with pytest.raises(InputError, match="features must be"):
        kernel_distance(features(0), bad)


def test_too_few_or_unequal_images_are_refused():
    with pytest.raises(InputError, match="at least 20"):
        classifier_test(noise(0, 5), noise(1))
    with pytest.raises(InputError, match="one size"):
        classifier_test(noise(0), noise(1)[:, :20])


def test_patch_test_tells_apart_a_texture_and_guesses_between_halves_of_one_set():
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 200, (160, 1, 1)) + np.zeros((1, 16, 24))
    noisy = (smooth + rng.normal(0, 25, smooth.shape)).clip(0, 255).astype(np.uint8)
    smooth = smooth.astype(np.uint8)
    assert patch_test(smooth, noisy, steps=100) > 95
    assert 35 < patch_test(noisy[:80], noisy[80:], steps=100) < 65


def test_high_frequency_energy_is_what_the_blur_takes():
    flat = np.full((3, 9, 9), 128, np.uint8)
    slope = np.repeat(np.arange(9, dtype=np.uint8)[None, None] * 10, 9, 1)
    board = ((np.indices((9, 9)).sum(0) % 2) * 255).astype(np.uint8)[None]
    assert high_frequency_energy(flat) == pytest.approx(0, abs=1e-12)
    assert high_frequency_energy(slope) == pytest.approx(0, abs=1e-12)  # a blur keeps a plane
    assert high_frequency_energy(board) == pytest.approx(1)  # a checkerboard of -1 and 1 is blurred to 0
    assert high_frequency_energy(np.stack([board] * 3, -1)) == pytest.approx(1)
