"""Label drift: how far the refiner moved what the labels speak of, between x and R(x), in pixels.

The paper drew the pupils' outlines by hand: the shift was "quite small", about 1 px (§3.1.2). Here it is measured on
edges, since a refiner changes every grey value: what stays comparable is where dark meets light.

- **pupil**: it sits in the middle of the iris, whose rim shows even where a dark iris hides the pupil. The rim is
  found in x: a ring along which it gets lighter outwards, its sides before top and bottom, which lids cover. It is then
  looked for in x and in R(x) alike; the shift is the difference, so that what the finder gets wrong in both cancels.
- **edges**: points on the lid margin if it is given, else the strongest edges of x away from the iris; each is looked
  for in R(x) along its own normal.

All images here are grey: colour is averaged. Positions are (x, y) in pixels, (0, 0) the centre of the top left pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.errors import InputError
from fastsimgan.metrics.gradients import REACH, flattened, gradients_of, grey, sample, zoom_of
from fastsimgan.metrics.iris import find_iris, rim_shift

Array = NDArray[Any]

_BATCH = 256


def pupil_shifts(synthetic: Array, refined: Array) -> Array:
    """How far the pupil's centre moved from each x to its R(x).

    Args:
        synthetic, refined: ``[N, H, W]`` or ``[N, H, W, C]`` stored images of one shape, eyes at least 20 pixels high.

    Returns:
        float32 ``[N, 2]``: (right, down) in pixels; NaN where no iris is found in x.

    Raises:
        InputError: the shapes differ, or are no images.
    """
    parts = []
    for first in range(0, len(_pair(synthetic, refined)), _BATCH):
        x, r = (grey(images[first : first + _BATCH]) for images in (synthetic, refined))
        zoom = zoom_of(x)
        before, after = gradients_of(x, zoom), gradients_of(r, zoom)
        iris = find_iris(x, before, zoom)
        shift = rim_shift(after, iris, zoom) - rim_shift(before, iris, zoom)
        parts.append(torch.where(iris.found[:, None], shift, torch.nan))
    return torch.cat(parts).numpy()


def edge_shifts(synthetic: Array, refined: Array, lid_margin: Array | None = None) -> Array:
    """How far edges moved along their normals from each x to its R(x): the median over an image's points.

    Args:
        synthetic, refined: as for `pupil_shifts`; any images will do.
        lid_margin: ``[N, P, 2]`` (x, y) in pixels, points on the lids' margin in x; if None, each image's 24 strongest
            edges of x stand in for it.

    Returns:
        float32 ``[N]``, pixels, at least 0; NaN where no point lies within the image or x has no edge.

    Raises:
        InputError: the shapes differ, or are no images.
    """
    parts = []
    for first in range(0, len(_pair(synthetic, refined)), _BATCH):
        part = slice(first, first + _BATCH)
        x, r = (grey(images[part]) for images in (synthetic, refined))
        zoom = zoom_of(x)
        before, after = (flattened(gradients_of(images, zoom)) for images in (x, r))
        points = (
            _strongest(before, 24) if lid_margin is None else torch.from_numpy(np.asarray(lid_margin[part], np.float32))
        )
        height, width = x.shape[2:]
        usable = ((points >= 0) & (points <= torch.tensor([width - 1.0, height - 1.0]))).all(-1)
        normals = sample(before, points)  # [N, P, 2], from dark to light
        strength = normals.norm(dim=-1)
        usable &= strength > 0.05
        normals = normals / strength.clamp_min(1e-6)[..., None]
        offsets = torch.arange(-round(REACH * 8), round(REACH * 8) + 1) * (zoom / 8)
        places = points[:, :, None] + normals[:, :, None] * offsets[:, None]  # [N, P, O, 2]
        # a slight preference for staying tells equal edges apart
        stay = 0.01 * (offsets / zoom).square()
        was, now = (
            offsets[((sample(field, places) * normals[:, :, None]).sum(-1) - stay).argmax(-1)]
            for field in (before, after)
        )
        parts.append((now - was).abs().masked_fill(~usable, torch.nan).nanmedian(1).values)
    return torch.cat(parts).numpy()


def label_drift(synthetic: Array, refined: Array, lid_margin: Array | None = None) -> dict[str, Any]:
    """Both measures as numbers: what ``evaluate --drift`` writes and `describe` says.

    Returns:
        ``images``; ``pupil_found`` (share of images, 0 to 1); ``pupil_px`` and ``edges_px``, the distribution of the
        distances (``mean``, ``median``, ``p90``, ``max``; None where nothing was found); ``pupil_mean_shift_px``
        ``[right, down]``, what all have in common; ``worst``, the indices of the eight images whose pupil (or, where
        none is found, edges) moved most.
    """
    shifts, edges = pupil_shifts(synthetic, refined), edge_shifts(synthetic, refined, lid_margin)
    distances = np.linalg.norm(shifts, axis=1)
    found = np.isfinite(distances)
    ranked = np.nan_to_num(distances if found.any() else edges, nan=-1.0)
    return {
        "images": len(edges),
        "pupil_found": float(found.mean()),
        "pupil_px": _distribution(distances),
        "pupil_mean_shift_px": shifts[found].mean(0).tolist() if found.any() else None,
        "edges_px": _distribution(edges),
        "worst": np.argsort(-ranked, kind="stable")[:8].tolist(),
    }


def describe(drift: dict[str, Any]) -> str:
    """A `label_drift` in one line; without the iris where most images show none."""
    edges, pupil = drift["edges_px"], drift["pupil_px"]
    text = "label drift: "
    if pupil is not None and drift["pupil_found"] >= 0.5:
        right, down = drift["pupil_mean_shift_px"]
        text += (
            f"iris moved {pupil['median']:.2f} px (median; 90 % within {pupil['p90']:.2f}; mean shift {right:+.2f} "
            f"right, {down:+.2f} down; found in {drift['pupil_found']:.0%}), "
        )
    return text + ("no edges found" if edges is None else f"edges {edges['median']:.2f} px (90 % {edges['p90']:.2f})")


def _distribution(values: Array) -> dict[str, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p90": float(np.quantile(values, 0.9)),
        "max": float(values.max()),
    }


def _strongest(field: Tensor, count: int) -> Tensor:
    """The ``count`` strongest local maxima of ``field`` ``[N, 2, H, W]``: ``[N, count, 2]``, (x, y)."""
    strength = field.square().sum(1, keepdim=True)
    border = torch.zeros_like(strength)
    border[:, :, 2:-2, 2:-2] = 1
    peaks = strength * border * (strength == F.max_pool2d(strength, 3, 1, 1))
    indices = peaks.flatten(1).topk(min(count, peaks[0].numel())).indices
    width = field.shape[3]
    return torch.stack([indices % width, indices // width], -1).float()


def _pair(synthetic: Array, refined: Array) -> Array:
    if synthetic.shape != refined.shape or synthetic.ndim not in (3, 4):
        raise InputError(
            f"synthetic and refined images must have one shape, got {list(synthetic.shape)} and {list(refined.shape)}"
        )
    return synthetic
