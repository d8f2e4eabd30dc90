"""How alike two sets of images are, seen by a network: kernel and Fréchet distance, and a classifier two-sample test.

No features are downloaded: the default network is a fixed, randomly weighted convolution, the same for every run. Its
distances compare sets within one project; they are not the Inception distances of the literature. A task network's
hidden layer or the user's own ONNX file can stand in its place.

The sizes of two distances are only comparable if they were taken with the same features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from fastsimgan.data.pixel_values import to_float
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError, UnavailableError

Array = NDArray[Any]

_MAPS = 128  # of the last random convolution; twice as many features
_LIMIT = 5000  # images of each set that are looked at


def random_features(images: Array, seed: int = 0) -> Array:
    """Features of a fixed random network: three strided 3×3 convolutions, then mean and deviation of each map.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]`` stored images (uint8, uint16, float32 in [0, 1]).
        seed: of the weights; the same seed gives the same features for images of as many channels.

    Returns:
        float64 ``[N, 256]``.
    """
    channels = 1 if images.ndim == 3 else images.shape[3]
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64), (64, _MAPS)):
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a layer is born with weights of the caller's dice
            layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            layer.weight.normal_(0, math.sqrt(2 / (9 * inputs)), generator=generator)
            assert layer.bias is not None
            layer.bias.normal_(0, 0.1, generator=generator)
        layers += [layer, nn.LeakyReLU(0.2)]
    network = nn.Sequential(*layers)
    parts = []
    with torch.inference_mode():
        for first in range(0, len(images), 256):
            maps = network(torch.from_numpy(to_float(np.ascontiguousarray(images[first : first + 256]))))
            parts.append(torch.cat([maps.mean((2, 3)), maps.std((2, 3), correction=0)], 1))
    return torch.cat(parts).double().numpy()


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


def classifier_test(a: Array, b: Array, *, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Classifier two-sample test: a small network learns to tell half of the images apart and is asked about the rest.

    Both sets count alike. 50 % is guessing, so the sets look alike *to this network*; 100 % means that it tells them
    apart at sight.

    Args:
        a, b: stored images ``[N, H, W]`` or ``[N, H, W, C]`` of one size; at least 20 of each.
        steps: of the training.
        seed: of the halves and the weights.

    Returns:
        ``accuracy`` (per cent) with its 95 % Wilson interval ``low`` and ``high``, and ``tested``, the number of
        images that it was asked about.

    Raises:
        InputError: sizes differ, or too few images.
    """
    from fastsimgan.models.classifier import Classifier

    found = _tell_apart(a, b, lambda channels: Classifier(2, channels), steps=steps, seed=seed)
    low, high = wilson_interval(int(found["right"]), int(found["tested"]))
    return {"accuracy": found["accuracy"], "low": 100 * low, "high": 100 * high, "tested": found["tested"]}


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
    from fastsimgan.models.discriminator import Discriminator

    return _tell_apart(a, b, lambda channels: Discriminator(channels, kind=kind), steps=steps, seed=seed)["accuracy"]


def _tell_apart(a: Array, b: Array, build: Callable[[int], nn.Module], *, steps: int, seed: int) -> dict[str, float]:
    """Train ``build(channels)``, with logits ``[N, 2]`` or ``[N, 2, h, w]``, on half of each set and ask about the
    rest: how many answers there were (``tested``), how many were right, and that as a share (``accuracy``, %)."""
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"both sets must have images of one size, got {list(a.shape[1:])} and {list(b.shape[1:])}")
    count = min(len(a), len(b), _LIMIT)
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
    return {"right": float(right), "tested": float(tested), "accuracy": 100 * right / tested}


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


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share ``right / count``."""
    z = 1.959963984540054
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def onnx_features(path: Path) -> Callable[[Array], Array]:
    """Features by a network of the user's own, run by onnxruntime on the CPU.

    Args:
        path: an ONNX file with one input, float32 ``[N, C, H, W]`` in [-1, 1], N, H and W not fixed (or fixed to what
            is asked of it); its first output is the features, float ``[N, d]``, or ``[N, d, h, w]``, which are averaged
            over h and w.

    Returns:
        A function from stored images to float64 ``[N, d]``; it raises InputError where the network refuses the images.

    Raises:
        InputError: not such a file. UnavailableError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            f"{path}: features from ONNX need onnxruntime: pip install 'fastsimgan[onnx]'"
        ) from error
    if not path.is_file():
        raise InputError(f"{path}: --features must be 'random', 'task' or an ONNX file, got no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions share no base class
        raise InputError(f"{path}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        raise InputError(f"{path}: must have one input of float32, got {', '.join(i.type for i in inputs)}")

    def features(images: Array) -> Array:
        parts = []
        for first in range(0, len(images), 256):
            batch = to_float(np.ascontiguousarray(images[first : first + 256]))
            try:
                found = session.run([session.get_outputs()[0].name], {inputs[0].name: batch})[0]
            except Exception as error:
                raise InputError(f"{path}: refuses images {list(batch.shape)}: {str(error).splitlines()[0]}") from error
            parts.append(found.mean((2, 3)) if found.ndim == 4 else found)
        joined = np.concatenate(parts).astype(np.float64)
        if joined.ndim != 2 or len(joined) != len(images) or not np.isfinite(joined).all():
            raise InputError(f"{path}: features must be finite [{len(images)}, d], got {list(joined.shape)}")
        return joined

    return features


def realism(
    images: Array, real: Array, *, features: Callable[[Array], Array] = random_features, steps: int = 150, seed: int = 0
) -> dict[str, Any]:
    """All three numbers of one set against real images (at most 5,000 of each, drawn by ``seed``).

    Args:
        images, real: stored images of one size.
        features: in which the two distances are taken, stored images to ``[N, d]``.
        steps: of the classifier's training.
        seed: of the draw and of the classifier.

    Returns:
        ``kid``, ``frechet`` and ``c2st`` (see `classifier_test`), and ``images``, how many of each set were compared.
    """
    rng = np.random.default_rng(seed)
    count = min(len(images), len(real), _LIMIT)
    parts = [part[np.sort(rng.permutation(len(part))[:count])] for part in (images, real)]
    a, b = (features(part) for part in parts)
    return {
        "kid": kernel_distance(a, b),
        "frechet": frechet_distance(a, b),
        "c2st": classifier_test(*parts, steps=steps, seed=seed),
        "images": count,
    }


def _check(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"features must be [N, d] and [M, d] with N and M at least 2, got {list(a.shape)} and {list(b.shape)}"
        )
