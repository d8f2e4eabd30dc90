"""Two-sample tests: how well a network learns to tell two sets of images apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from fastsimgan.data.pixel_values import to_float
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.metrics.statistics import wilson_interval
from fastsimgan.models.classifier import Classifier
from fastsimgan.models.discriminator import Discriminator

Array = NDArray[Any]

LIMIT = 5000  # images of each set that are looked at


@dataclass(frozen=True)
class ClassifierTest:
    """How often a classifier was right, in per cent, with the 95 % Wilson interval; 50 is guessing."""

    accuracy: float
    low: float
    high: float
    tested: float
    """Images that it was asked about."""


def classifier_test(a: Array, b: Array, *, steps: int = 150, seed: int = 0) -> ClassifierTest:
    """Classifier two-sample test: a small network learns to tell half of the images apart and is asked about the rest.

    Both sets count alike. 50 % is guessing, so the sets look alike *to this network*; 100 % means that it tells them
    apart at sight.

    Args:
        a, b: stored images ``[N, H, W]`` or ``[N, H, W, C]`` of one size; at least 20 of each.
        steps: of the training.
        seed: of the halves and the weights.

    Raises:
        InputError: sizes differ, or too few images.
    """
    right, tested = _tell_apart(a, b, lambda channels: Classifier(2, channels), steps=steps, seed=seed)
    low, high = wilson_interval(right, tested)
    return ClassifierTest(100 * right / tested, 100 * low, 100 * high, float(tested))


def patch_test(a: Array, b: Array, *, kind: str = "gaze", steps: int = 150, seed: int = 0) -> float:
    """A discriminator of the paper's kind, from scratch, learns to tell patches of half of the images apart.

    Args:
        a, b: as `classifier_test` takes them.
        kind: architecture of the discriminator, "gaze" or "hand".
        steps: of the training.
        seed: of the halves and the weights.

    Returns:
        The share of patches of the other halves that it is right about, in per cent: 50 is guessing. No interval:
        patches of one image are not independent.

    Raises:
        InputError: sizes differ, or too few images.
    """
    right, tested = _tell_apart(a, b, lambda channels: Discriminator(channels, kind=kind), steps=steps, seed=seed)
    return 100 * right / tested


def _tell_apart(a: Array, b: Array, build: Callable[[int], nn.Module], *, steps: int, seed: int) -> tuple[int, int]:
    """Train ``build(channels)``, with logits ``[N, 2]`` or ``[N, 2, h, w]``, on half of each set and ask about the
    rest: how many answers were right, and how many there were."""
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"both sets must have images of one size, got {list(a.shape[1:])} and {list(b.shape[1:])}")
    count = min(len(a), len(b), LIMIT)
    if count < 20:
        raise InputError(f"a classifier test needs at least 20 images of each set, got {len(a)} and {len(b)}")
    rng = np.random.default_rng(seed)
    chosen = [part[rng.permutation(len(part))[:count]] for part in (a, b)]
    half = count // 2
    floats = [torch.from_numpy(to_float(part)) for part in chosen]
    train = torch.cat([part[:half] for part in floats])
    target = torch.cat([torch.full((half,), kind) for kind in (0, 1)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(train.shape[1])
    optimiser = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    sampler = Sampler(len(train), seed)
    for _ in range(steps):
        indices = sampler.draw(32)
        logits = network(train[indices])
        each = target[indices].view(-1, *[1] * (logits.ndim - 2)).expand(-1, *logits.shape[2:])
        loss = F.cross_entropy(logits, each)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    right = tested = 0
    with torch.inference_mode():
        for kind, part in enumerate(floats):
            for first in range(half, count, 256):
                answers = network(part[first : first + 256]).argmax(1)
                right += int((answers == kind).sum())
                tested += answers.numel()
    return right, tested
