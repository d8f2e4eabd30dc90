"""How alike two sets of images are, seen by a network: kernel and Fréchet distance, and a classifier two-sample test.

No features are downloaded: the default network is a fixed, randomly weighted convolution, the same for every run. Its
distances compare sets within one project; they are not the Inception distances of the literature. A task network's
hidden layer or the user's own ONNX file can stand in its place.

The sizes of two distances are only comparable if they were taken with the same features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fastsimgan.data.pixel_values import to_float
from fastsimgan.errors import InputError
from fastsimgan.metrics.features import random_features
from fastsimgan.metrics.two_sample import LIMIT, ClassifierTest, classifier_test

Array = NDArray[Any]


@dataclass(frozen=True)
class Realism:
    """How like real images a set is."""

    kid: float
    """Kernel distance, see `kernel_distance`."""
    frechet: float
    """See `frechet_distance`."""
    c2st: ClassifierTest
    """How well a classifier tells them apart."""
    images: int
    """How many of each set were compared."""


def kernel_distance(a: Array, b: Array) -> float:
    """KID (Bińkowski et al. 2018): the unbiased squared MMD with the kernel ``(x·y / d + 1)³``; it can be negative.

    Args:
        a, b: features ``[N, d]`` and ``[M, d]``, at least two rows each.

    Raises:
        InputError: another shape.
    """
    _check(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(p: Array, q: Array) -> Array:
        return (p @ q.T / p.shape[1] + 1) ** 3

    def within(p: Array) -> float:  # without the diagonal, which is what makes it unbiased
        k = kernel(p, p)
        return float((k.sum() - np.trace(k)) / (len(p) * (len(p) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def frechet_distance(a: Array, b: Array) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features ``[N, d]`` and ``[M, d]``.

    It is biased upwards for few images: compare only sets of one size, and of many more images than d.

    Raises:
        InputError: another shape, or fewer than two rows.
    """
    _check(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C1 C2)^½ is the sum of the square roots of C1 C2's eigenvalues, which C1^½ C2 C1^½ shares and is symmetric
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root)
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.atleast_2d(first)) + np.trace(np.atleast_2d(second))
    return float(distance - 2 * np.sqrt(mixed.clip(0)).sum())


def high_frequency_energy(images: Array) -> float:
    """What a 3×3 binomial blur takes out of the images: the mean square of image minus blurred image, inner pixels.

    Args:
        images: stored, ``[N, H, W]`` or ``[N, H, W, C]``, at least 3×3; black to white counts as 2.
    """
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    total = count = 0.0
    for first in range(0, len(images), 256):
        batch = torch.from_numpy(to_float(np.ascontiguousarray(images[first : first + 256])))
        channels = batch.shape[1]
        weight = torch.outer(kernel, kernel).expand(channels, 1, 3, 3)
        detail = batch[..., 1:-1, 1:-1] - F.conv2d(batch, weight, groups=channels)
        total += float(detail.square().sum(dtype=torch.float64))
        count += detail.numel()
    return total / count


def realism(
    images: Array, real: Array, *, features: Callable[[Array], Array] = random_features, steps: int = 150, seed: int = 0
) -> Realism:
    """All three numbers of one set against real images (at most 5,000 of each, drawn by ``seed``).

    Args:
        images, real: stored images of one size.
        features: in which the two distances are taken, stored images to ``[N, d]``.
        steps: of the classifier's training.
        seed: of the draw and of the classifier.
    """
    rng = np.random.default_rng(seed)
    count = min(len(images), len(real), LIMIT)
    parts = [part[np.sort(rng.permutation(len(part))[:count])] for part in (images, real)]
    a, b = (features(part) for part in parts)
    test = classifier_test(*parts, steps=steps, seed=seed)
    return Realism(kernel_distance(a, b), frechet_distance(a, b), test, count)


def _check(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"features must be [N, d] and [M, d] with N and M at least 2, got {list(a.shape)} and {list(b.shape)}"
        )
