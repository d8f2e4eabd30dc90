"""Joints of a hand: drawn as heat maps and found in them again, moved along with a picture, and judged (Fig. 12).

Places are (x, y) in pixels, (0, 0) the centre of the top left pixel. A heat map's cell stands for
``stride`` × ``stride`` pixels of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[Any]


def draw_heat_maps(joints: Tensor, height: int, width: int, stride: int, sigma: float = 1.0) -> Tensor:
    """A Gaussian of height 1 at each joint.

    Args:
        joints: ``[B, J, 2]``, pixels of the picture; one outside leaves what reaches in.
        height, width: of the heat maps, cells.
        stride: pixels a cell.
        sigma: of the Gaussian, cells.

    Returns:
        ``[B, J, height, width]``.
    """
    x, y = ((joints + 0.5) / stride - 0.5).unbind(-1)
    across = torch.arange(width, device=joints.device) - x[..., None]
    down = torch.arange(height, device=joints.device) - y[..., None]
    bell = -1 / (2 * sigma**2)
    return (across.square() * bell).exp()[..., None, :] * (down.square() * bell).exp()[..., None]


def find_joints(maps: Tensor, stride: int) -> Tensor:
    """The place of each heat map's peak: ``[B, J, 2]``, pixels of the picture, for ``[B, J, H, W]``.

    Within a cell by a parabola through the logarithms of the peak and its neighbours, which is exact for a Gaussian.
    """
    height, width = maps.shape[2:]
    peak, index = maps.flatten(2).max(2)
    row, column = index // width, index % width
    floor = 0.05 * peak.clamp_min(1e-3)  # what a network leaves near zero is noise, or negative
    values = torch.maximum(F.pad(maps, (1, 1, 1, 1)), floor[..., None, None]).log().flatten(2)

    def at(down: int, right: int) -> Tensor:
        where = (row + 1 + down) * (width + 2) + column + 1 + right
        return values.gather(2, where[..., None])[..., 0]

    middle = at(0, 0)

    def offset(before: Tensor, after: Tensor) -> Tensor:
        bend = (2 * middle - before - after).clamp_min(1e-6)
        return ((after - before) / (2 * bend)).clamp(-0.5, 0.5)

    # A peak on the border has no neighbour there to tell by.
    x = column + torch.where((column > 0) & (column < width - 1), offset(at(0, -1), at(0, 1)), 0)
    y = row + torch.where((row > 0) & (row < height - 1), offset(at(-1, 0), at(1, 0)), 0)
    return (torch.stack([x, y], -1) + 0.5) * stride - 0.5


def probabilities(logits: Tensor) -> Tensor:
    """Heat maps ``[B, J, H, W]`` that sum to 1 each, from a network's ``logits``."""
    return logits.flatten(2).softmax(2).view_as(logits)


def heat_map_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of `probabilities` of ``logits`` with the heat maps ``target``, mean over joints in the picture.

    Both ``[B, J, H, W]``. A joint whose Gaussian lies outside by more than half has no place to be learnt: it counts 0.
    """
    wanted = target.flatten(2)
    weight = wanted.sum(2)
    inside = weight > weight.amax().clamp_min(1e-6) / 2
    wanted = wanted / weight.clamp_min(1e-6)[..., None]
    each = -(wanted * logits.flatten(2).log_softmax(2)).sum(2)
    return (each * inside).sum() / inside.sum().clamp_min(1)


@dataclass(frozen=True)
class Views:
    """How B pictures are seen: a place p of the picture is at ``matrix @ (p - centre) + centre_seen + shift``."""

    matrix: Tensor
    """``[B, 2, 2]``: rotation and magnification."""
    shift: Tensor
    """``[B, 2]``, pixels of what is seen."""
    size: tuple[int, int]
    """(height, width) of the pictures."""
    size_seen: tuple[int, int]

    def images(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] as seen, bilinear; outside of the picture all is -1, the background."""
        (height, width), seen = self.size, self.size_seen
        inverse = torch.linalg.inv(self.matrix)
        # affine_grid's unit is half of the image: from what is seen back to the picture
        half, half_seen = torch.tensor([width / 2, height / 2]), torch.tensor([seen[1] / 2, seen[0] / 2])
        turn = inverse * half_seen / half[:, None]
        move = -(inverse @ self.shift[..., None])[..., 0] / half
        theta = torch.cat([turn, move[..., None]], 2).to(images.device)
        grid = F.affine_grid(theta, [len(images), 1, *seen], align_corners=False)
        moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
        return moved.contiguous(memory_format=torch.channels_last)

    def joints(self, joints: Tensor) -> Tensor:
        """``[B, J, 2]`` of the picture as places in what is seen."""
        return (joints - _centre(self.size)) @ self.matrix.mT + _centre(self.size_seen) + self.shift[:, None]

    def joints_back(self, joints: Tensor) -> Tensor:
        """The inverse of `joints`."""
        moved = joints - _centre(self.size_seen) - self.shift[:, None]
        return moved @ torch.linalg.inv(self.matrix).mT + _centre(self.size)


def random_views(
    count: int,
    size: tuple[int, int],
    size_seen: tuple[int, int],
    generator: torch.Generator,
    *,
    rotation: float = 20.0,
    zoom: float = 1.15,
    shift: float = 0.05,
) -> Views:
    """Each picture turned by up to ``rotation`` degrees, magnified by 1 / ``zoom`` to ``zoom``, and moved by up to
    ``shift`` of its size each way (§3.2); beyond that it fills ``size_seen``. All three 0, 1, 0: the plain picture.
    """
    turn, log_scale, across, down = torch.rand(4, count, generator=generator) * 2 - 1
    angle = torch.deg2rad(rotation * turn)
    scale = zoom**log_scale * min(size_seen[0] / size[0], size_seen[1] / size[1])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2))
    moved = torch.stack([across * size_seen[1], down * size_seen[0]], 1) * shift
    return Views(matrix, moved, size, size_seen)


def joint_errors(predicted: Array, true: Array) -> Array:
    """Distances ``[N, J]`` in pixels between two sets of joints ``[N, J, 2]``."""
    return np.linalg.norm(predicted.astype(np.float64) - true, axis=-1)


def share_within(errors: Array, distances: Array) -> Array:
    """Per cent of all joints within each of ``distances`` ``[D]`` pixels, for ``errors`` of any shape (Fig. 12)."""
    ranked = np.sort(errors, axis=None)
    return np.searchsorted(ranked, distances, side="right") * (100 / ranked.size)


def _centre(size: tuple[int, int]) -> Tensor:
    return torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
