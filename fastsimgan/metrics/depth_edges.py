"""Depth images at their edges: where a refiner put its noise, and whether it moved the edges by a hand's joints (§3.2).

A depth image is stored with 0 where nothing is. An edge is where neighbours differ by a tenth of the depth that hands
span (from the 1st to the 99th per cent of all that is not 0), or where one of them is 0: so no unit need be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimgan.data.pixel_values import normalise
from fastsimgan.errors import InputError
from fastsimgan.metrics.label_drift import edge_shifts

Array = NDArray[Any]

_BATCH = 64


@dataclass(frozen=True)
class Noise:
    """How far some pixels are from what they were."""

    pixels: float
    """Their share of all."""
    error: float
    """Mean |noisy - clean| with black to white as 2, as networks see it."""
    lost: float
    """Per cent of those on the hand that came nearer to the background than to where they were."""


@dataclass(frozen=True)
class NoiseByPlace:
    """The same on edges, on the hand's flat parts, and in the background; no pixel is in two."""

    edges: Noise
    flat: Noise
    background: Noise
    edges_to_flat: float | None
    """Ratio of the two errors; None where the flat parts have none."""


def depth_edges(images: Array) -> Array:
    """The pixels on either side of an edge: bool ``[N, H, W]``, for stored ``images`` ``[N, H, W]``."""
    some = images[:: max(1, len(images) // 500)]
    present = some[some > 0]
    if not present.size:
        raise InputError("images must hold some depth, got 0 everywhere")
    low, high = np.quantile(present, [0.01, 0.99])
    edges = np.zeros(images.shape, bool)
    for start in range(0, len(images), _BATCH):
        depth, found = images[start : start + _BATCH].astype(np.float32), edges[start : start + _BATCH]
        for first, second in (((..., slice(1, None), slice(None)), (..., slice(-1), slice(None))),
                              ((..., slice(1, None)), (..., slice(-1)))):  # fmt: skip
            a, b = depth[first], depth[second]
            jump = (np.abs(a - b) > 0.1 * (high - low)) | ((a > 0) != (b > 0))
            found[first] |= jump
            found[second] |= jump
    return edges


def noise_by_place(clean: Array, noisy: Array) -> NoiseByPlace:
    """How far ``noisy`` is from ``clean``, by where: on edges, on the hand's flat parts, and in the background.

    Args:
        clean, noisy: stored images of one shape ``[N, H, W]`` and type, such as x and R(x).

    Raises:
        InputError: another shape, or no depth in them.
    """
    if clean.shape != noisy.shape or clean.ndim != 3:
        raise InputError(f"clean and noisy must have one shape [N, H, W], got {clean.shape} and {noisy.shape}")
    edges, hand = depth_edges(clean), clean > 0
    before, after = normalise(clean), normalise(noisy)
    error, lost = np.abs(after - before), after + 1 < (before + 1) / 2

    def noise(where: Array) -> Noise:
        on_hand = where & hand
        return Noise(
            float(where.mean()),
            float(error[where].mean()) if where.any() else 0.0,
            float(lost[on_hand].mean() * 100) if on_hand.any() else 0.0,
        )

    on_edges, flat, background = noise(edges), noise(hand & ~edges), noise(~hand & ~edges)
    return NoiseByPlace(on_edges, flat, background, on_edges.error / flat.error if flat.error else None)


def joint_edge_shifts(clean: Array, noisy: Array, joints: Array) -> Array:
    """How far the depth edges nearest to a hand's joints moved, along their normals: float32 ``[N]`` pixels.

    Args:
        clean, noisy: stored images of one shape ``[N, H, W]``, such as x and R(x).
        joints: ``[N, J, 2]`` pixels.

    Returns:
        The median over an image's joints; NaN where it has no edge.
    """
    edges = depth_edges(clean)
    points = np.full(joints.shape, -1.0, np.float32)  # out of the picture: passed over
    for number, (picture, places) in enumerate(zip(edges, joints, strict=True)):
        rows, columns = np.nonzero(picture)
        if len(rows):
            at = np.stack([columns, rows], 1)
            nearest = np.square(places[:, None] - at).sum(2).argmin(1)
            points[number] = at[nearest]
    return edge_shifts(clean, noisy, points)
