"""Features of images for the distances of `metrics.realism`: a fixed random convolution's, or an ONNX file's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastsimgan.data.pixel_values import to_float
from fastsimgan.errors import InputError, UnavailableError

Array = NDArray[Any]

_MAPS = 128  # of the last random convolution; twice as many features


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
