"""The iris in an image of an eye: its rim is found in x, then looked for again in R(x).

The rim is a ring along which x gets lighter outwards, its sides before top and bottom, which lids cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsimgan.metrics.gradients import REACH, flattened, sample

_RADII = torch.linspace(6.5, 10.5, 9)  # of the iris, in pixels of a 35x55 image; wider than any pupil
_ANGLES = 64  # points round the iris
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


def find_iris(images: Tensor, gradients: Tensor, zoom: float) -> Iris:
    """The iris in each of ``images`` ``[N, 1, H, W]``, from its ``gradients`` ``[N, 2, H, W]``."""
    flat = flattened(gradients)
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
    sampled = sample(flat, places)
    outwards = (sampled * normals[None, :, None]).sum(-1)  # [N, K, O]
    aligned = outwards / sampled.norm(dim=-1).clamp_min(1e-6)
    steep = outwards.clamp_min(0) * (-((offsets / (1.2 * zoom)) ** 2) / 2).exp()
    pull = (8 * steep).softmax(-1)
    rim = (pull * along[:, None]).sum(-1)  # [N, K]
    weights = (pull * steep * aligned.clamp_min(0) ** 4).sum(-1) * _side(angles.cos())
    points = centre[:, None] + normals * rim[..., None]
    return Iris(centre, radius, best > 0.3, points, normals, weights)


def rim_shift(gradients: Tensor, iris: Iris, zoom: float) -> Tensor:
    """Where the rim's points, moved together, meet the steepest dark-to-light steps: ``[N, 2]`` from where they are."""
    flat = flattened(gradients)

    def score(moves: Tensor) -> Tensor:  # [N or 1, M, 2] -> [N, M]
        places = iris.points[:, None] + moves[:, :, None]
        return ((sample(flat, places) * iris.normals).sum(-1) * iris.weights[:, None]).sum(-1)

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
