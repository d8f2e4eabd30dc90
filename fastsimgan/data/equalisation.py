"""Histogram equalisation, which real eye datasets (MPIIGaze among them) apply and renderers do not.

It maps grey values and moves no pixel, so labels stay true. It is global in the image, and so out of reach of R,
which sees 19 pixels at a time (35 for hands): where the real images are equalised, the synthetic ones are first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimgan.errors import InputError

LARGE = 1 << 22
"""Pixels of an image beyond which it is equalised in pieces."""


def equalise(images: Tensor) -> Tensor:
    """Equalise the histogram of each grey image on its own.

    The rule is the usual one (OpenCV's ``equalizeHist``): ``v -> round((cdf(v) - cdf_min) / (pixels - cdf_min) * top)``
    with ``top`` 255 or 65,535. An image of one single value is returned as it is.

    Args:
        images: ``[B, 1, H, W]``, uint8 or uint16.

    Returns:
        A new tensor of the same shape and dtype.
    """
    if images.dtype not in (torch.uint8, torch.uint16) or images.ndim != 4 or images.shape[1] != 1:
        raise InputError(
            f"images must be uint8 or uint16 of shape [B, 1, H, W], got {images.dtype} {list(images.shape)}"
        )
    if images.shape[2] * images.shape[3] > LARGE:
        return torch.cat([_equalise_large(image[None]) for image in images])
    top = 255 if images.dtype == torch.uint8 else 65_535
    values = images.flatten(1).long()
    pixels = values.shape[1]
    # counted in integers: sums of floats along an axis are not repeatable on CUDA, and torch 2.11 refuses them there
    # where it is told to be deterministic
    counts = torch.zeros(len(values), top + 1, dtype=torch.int32, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values, dtype=counts.dtype))
    cdf = counts.cumsum(1, dtype=torch.int32).float()
    first = torch.where(cdf > 0, cdf, float("inf")).amin(1, keepdim=True)  # cdf at the darkest value that occurs
    table = ((cdf - first) / (pixels - first).clamp_min(1) * top).round().clamp_(0, top)
    flat = torch.where(first == pixels, values.to(table.dtype), table.gather(1, values))
    return flat.to(images.dtype).view_as(images)


def _equalise_large(image: Tensor) -> Tensor:
    """`equalise` of one large picture, piece by piece; counts are exact beyond float32's whole numbers."""
    top = 255 if image.dtype == torch.uint8 else 65_535
    flat = image.flatten()
    pieces = flat.split(LARGE)
    counts = torch.zeros(top + 1, dtype=torch.float64, device=image.device)
    for piece in pieces:
        counts += torch.bincount(piece.long(), minlength=top + 1)
    cdf = counts.cumsum(0)
    first = cdf[counts > 0][0]
    if first == len(flat):
        return image.clone()
    table = ((cdf - first) / (len(flat) - first) * top).round().clamp_(0, top)
    return torch.cat([table[piece.long()].to(image.dtype) for piece in pieces]).view_as(image)


def non_uniformity(images: Tensor) -> float:
    """How far from equalised images are: the mean over images of max |cdf(v) - uniform cdf(v)|, 0 to 1.

    The cdf is read at 16 even grey values. Equalised 8-bit images measure below 0.05, ordinary ones 0.15 and more.

    Args:
        images: ``[B, 1, H, W]``, uint8 or uint16.
    """
    top = 256 if images.dtype == torch.uint8 else 65_536
    edges = torch.arange(1, 16, device=images.device) / 16
    below = images.flatten(1).float().div(top).sort(1).values
    cdf = torch.searchsorted(below, edges.expand(len(below), -1).contiguous()) / below.shape[1]
    return float((cdf - edges).abs().amax(1).mean())
