"""The trainer that ours is timed against does the same work: same weights and images in, same losses out."""

import numpy as np
import pytest

from bench.bench_train_step import losses_side_by_side


@pytest.mark.parametrize(
    ("computes", "batch", "width", "size"), [("image", 8, 20, (16, 20)), ("change", 4, 32, (20, 24))]
)
def test_losses_of_twenty_iterations_are_equal(computes, batch, width, size):
    ours, plain = losses_side_by_side(20, batch=batch, width=width, size=size, computes=computes)
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
    assert not np.allclose(ours[0], ours[-1], rtol=0.01)  # they did learn something
