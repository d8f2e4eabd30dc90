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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.gaze_angles import pitch_yaw
from fastsimgan.data.pixel_values import to_float
from fastsimgan.errors import InputError
from fastsimgan.evaluation.task_network import Judge, Labelled, train_and_predict
from fastsimgan.metrics.gaze_error import angular_errors

Array = NDArray[Any]

REACH = 3.0
"""Shifts are looked for up to this many pixels each way, at 35x55; the reach grows with the image."""

_RADII = torch.linspace(6.5, 10.5, 9)  # of the iris, in pixels of a 35x55 image; wider than any pupil
_ANGLES = 64  # points round the iris
_BATCH = 256
_DARK = 0.05  # how much the darkness of the disc counts beside its rim


@dataclass(frozen=True)
class Iris:
    """The rim of each iris, as found in x."""

    centre: Tensor  # [N, 2]
    radius: Tensor  # [N]
    found: Tensor  # [N] bool
    points: Tensor  # [N, K, 2] on the rim
    normals: Tensor  # [K, 2] outwards
    weights: Tensor  # [N, K]


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
        x, r = (_grey(images[first : first + _BATCH]) for images in (synthetic, refined))
        zoom = _zoom(x)
        before, after = _gradients(x, zoom), _gradients(r, zoom)
        iris = find_iris(x, before, zoom)
        shift = _rim_shift(after, iris, zoom) - _rim_shift(before, iris, zoom)
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
        x, r = (_grey(images[part]) for images in (synthetic, refined))
        zoom = _zoom(x)
        before, after = (_flattened(_gradients(images, zoom)) for images in (x, r))
        points = (
            _strongest(before, 24) if lid_margin is None else torch.from_numpy(np.asarray(lid_margin[part], np.float32))
        )
        height, width = x.shape[2:]
        usable = ((points >= 0) & (points <= torch.tensor([width - 1.0, height - 1.0]))).all(-1)
        normals = _sample(before, points)  # [N, P, 2], from dark to light
        strength = normals.norm(dim=-1)
        usable &= strength > 0.05
        normals = normals / strength.clamp_min(1e-6)[..., None]
        offsets = torch.arange(-round(REACH * 8), round(REACH * 8) + 1) * (zoom / 8)
        places = points[:, :, None] + normals[:, :, None] * offsets[:, None]  # [N, P, O, 2]
        # a slight preference for staying tells equal edges apart
        stay = 0.01 * (offsets / zoom).square()
        was, now = (
            offsets[((_sample(field, places) * normals[:, :, None]).sum(-1) - stay).argmax(-1)]
            for field in (before, after)
        )
        parts.append((now - was).abs().masked_fill(~usable, torch.nan).nanmedian(1).values)
    return torch.cat(parts).numpy()


def gaze_drift(synthetic: Labelled, refined: Array, *, seed: int = 0, judge: Judge | None = None) -> Array:
    """How far a gaze network's answer moves from x to R(x), in degrees ``[N]``; it is trained on the synthetic images.

    A drift of the labels shows here, and so does a change of look that the network was never taught.
    """
    both = np.concatenate([synthetic.images, refined])
    vectors = train_and_predict(
        synthetic, both, classes=0, seed=seed, judge=judge or Judge(), device=torch.device("cpu")
    )
    angles = pitch_yaw(vectors)
    return angular_errors(angles[: len(refined)], angles[len(refined) :])


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


def find_iris(images: Tensor, gradients: Tensor, zoom: float) -> Iris:
    """The iris in each of ``images`` ``[N, 1, H, W]``, from its ``gradients`` ``[N, 2, H, W]``."""
    flat = _flattened(gradients)
    tone = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True).clamp_min(1e-3)
    fields = torch.cat([flat, tone], 1)
    kernels = [_arc(radius, side, zoom) for radius in (_RADII * zoom).tolist() for side in (-1, 1)]
    arcs = _correlate(fields, kernels).unflatten(1, (-1, 2))
    response = arcs.amin(2)  # [N, radii, H, W]: both sides must be there, or a lid's corner would do
    height, width = images.shape[2:]
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows - (height - 1) / 2).abs() < 0.36 * height)[:, None] & (
        (columns - (width - 1) / 2).abs() < 0.36 * width
    )
    response = response.masked_fill(~inside, -9.0)
    best, index = response.flatten(1).max(1)
    which, place = index // (height * width), index % (height * width)
    centre = torch.stack([place % width, place // width], 1).float()
    radius = _RADII[which] * zoom

    angles = torch.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    normals = torch.stack([angles.cos(), angles.sin()], 1)
    # each point of the rim: where along its ray x gets lighter fastest, near the circle
    offsets = torch.arange(-2.5, 2.51, 0.25) * zoom
    along = radius[:, None] + offsets  # [N, O]
    places = centre[:, None, None] + normals[None, :, None] * along[:, None, :, None]  # [N, K, O, 2]
    sampled = _sample(flat, places)
    outwards = (sampled * normals[None, :, None]).sum(-1)  # [N, K, O]
    aligned = outwards / sampled.norm(dim=-1).clamp_min(1e-6)
    steep = outwards.clamp_min(0) * (-((offsets / (1.2 * zoom)) ** 2) / 2).exp()
    pull = (8 * steep).softmax(-1)
    rim = (pull * along[:, None]).sum(-1)  # [N, K]
    weights = (pull * steep * aligned.clamp_min(0) ** 4).sum(-1) * _side(angles.cos())
    points = centre[:, None] + normals * rim[..., None]
    return Iris(centre, radius, best > 0.3, points, normals, weights)


def _rim_shift(gradients: Tensor, iris: Iris, zoom: float) -> Tensor:
    """Where the rim's points, moved together, meet the steepest dark-to-light steps: ``[N, 2]`` from where they are."""
    flat = _flattened(gradients)

    def score(moves: Tensor) -> Tensor:  # [N or 1, M, 2] -> [N, M]
        places = iris.points[:, None] + moves[:, :, None]
        return ((_sample(flat, places) * iris.normals).sum(-1) * iris.weights[:, None]).sum(-1)

    reach = REACH * zoom
    best = _peak(score, torch.zeros(len(flat), 2), reach, 0.5 * zoom)
    return _peak(score, best, 0.5 * zoom, 0.125 * zoom, fine=True)


def _peak(score: Callable[[Tensor], Tensor], start: Tensor, reach: float, step: float, *, fine: bool = False) -> Tensor:
    """The move ``[N, 2]`` of the highest score on a grid round ``start``; if ``fine``, of a paraboloid through it."""
    ticks = torch.arange(-round(reach / step), round(reach / step) + 1) * step
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).flatten(0, 1)  # [M, 2]
    values = score(start[:, None] + grid)
    highest = grid[values.argmax(1)]
    if not fine:
        return start + highest
    dx, dy = grid.unbind(1)
    terms = torch.stack([dx * dx, dy * dy, dx * dy, dx, dy, torch.ones_like(dx)], 1)
    a, b, c, d, e, _ = (values @ torch.linalg.pinv(terms).T).unbind(1)
    determinant = 4 * a * b - c * c
    peak = torch.stack([c * e - 2 * b * d, c * d - 2 * a * e], 1) / determinant[:, None]
    curved = (a < 0) & (determinant > 0)
    return start + torch.where(curved[:, None], peak.clamp(-reach, reach), highest)


def _side(cosine: Tensor) -> Tensor:
    """The sides of an iris count, top and bottom, which lids cover, do not."""
    return cosine.abs()


def _arc(radius: float, side: int, zoom: float) -> Tensor:
    """``[3, S, S]``: lighter outwards along the left (-1) or right (1) half of a ring (x and y part), dark within."""
    pad = math.ceil(radius + 2 * zoom)
    axis = torch.arange(-pad, pad + 1).float()
    y, x = axis[:, None], axis[None]
    distance = (x * x + y * y).sqrt().clamp_min(1e-6)
    on = (-(((distance - radius) / (0.9 * zoom)) ** 2) / 2).exp() * _side(x / distance) * (x * side > 0)
    on /= on.sum()
    disc = (distance < 0.8 * radius).float()
    return torch.stack([x / distance * on, y / distance * on, -_DARK * disc / disc.sum()])


def _correlate(fields: Tensor, kernels: list[Tensor]) -> Tensor:
    """Cross-correlation of ``[N, C, H, W]`` with each of K odd ``[C, S, S]``, zeros outside: ``[N, K, H, W]``.

    By Fourier transform: kernels as large as an iris are slow otherwise.
    """
    height, width = fields.shape[2:]
    largest = max(kernel.shape[-1] for kernel in kernels)
    size = (height + largest, width + largest)
    spectrum = torch.fft.rfft2(fields, s=size)
    maps = []
    for kernel in kernels:
        half = kernel.shape[-1] // 2
        product = (spectrum * torch.fft.rfft2(kernel, s=size).conj()).sum(1)
        maps.append(torch.fft.irfft2(product, s=size).roll((half, half), (1, 2))[:, :height, :width])
    return torch.stack(maps, 1)


def _gradients(images: Tensor, zoom: float) -> Tensor:
    """Derivatives of Gaussian-smoothed ``images`` ``[N, 1, H, W]``: ``[N, 2, H, W]``, (x, y), per pixel."""
    sigma = 1.0 * zoom
    reach = math.ceil(3 * sigma)
    axis = torch.arange(-reach, reach + 1).float()
    bump = (-((axis / sigma) ** 2) / 2).exp()
    bump /= bump.sum()
    slope = axis / sigma**2 * bump
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    kernels = torch.stack([bump[:, None] * slope, slope[:, None] * bump])[:, None]
    return F.conv2d(padded, kernels)


def _flattened(gradients: Tensor) -> Tensor:
    """Gradients with their strength compressed: one glaring edge must not outvote the rest."""
    strength = gradients.square().sum(1, keepdim=True).sqrt()
    return gradients / (strength + strength.mean((2, 3), keepdim=True) + 1e-6)


def _sample(fields: Tensor, places: Tensor) -> Tensor:
    """Bilinear values ``[N, ..., C]`` of ``fields`` ``[N, C, H, W]`` at ``places`` ``[N, ..., 2]``; 0 outside."""
    height, width = fields.shape[2:]
    grid = (places + 0.5) * (2 / torch.tensor([width, height])) - 1
    values = F.grid_sample(fields, grid.flatten(1, -2)[:, None], align_corners=False)  # one long row: it is vectorised
    return values[:, :, 0].transpose(1, 2).unflatten(1, places.shape[1:-1])


def _pair(synthetic: Array, refined: Array) -> Array:
    if synthetic.shape != refined.shape or synthetic.ndim not in (3, 4):
        raise InputError(
            f"synthetic and refined images must have one shape, got {list(synthetic.shape)} and {list(refined.shape)}"
        )
    return synthetic


def _grey(images: Array) -> Tensor:
    planes: Tensor = torch.from_numpy(to_float(np.ascontiguousarray(images)))
    return planes.mean(1, keepdim=True)


def _zoom(images: Tensor) -> float:
    return min(images.shape[2] / 35, images.shape[3] / 55)
