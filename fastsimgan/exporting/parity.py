"""Whether an exported file agrees with PyTorch: PyTorch's answers, the difference, and the rules for it."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.inference.graph_format import Form
from fastsimgan.inference.refiner import RefinerFile
from fastsimgan.models import refiner as network
from fastsimgan.reporting.contact_sheet import save_rows


@dataclass(frozen=True)
class Parity:
    """How one exported file differs from PyTorch's float32, in grey levels of 255."""

    largest: float
    mean: float
    psnr: float
    """Decibels, of the difference against 255; infinity where there is none."""
    within_one: float
    """Share of the pixels whose uint8 values differ by at most one."""
    most_levels: int
    """Largest difference of the uint8 values."""
    worst_image: int

    def __str__(self) -> str:
        return (
            f"largest {self.largest:8.4f}  mean {self.mean:.5f} levels  PSNR {self.psnr:5.1f} dB  "
            f"within one level {self.within_one:.3%}"
        )

    def record(self) -> dict[str, Any]:
        """As JSON holds it, which has no infinity."""
        return asdict(self) | {"psnr": self.psnr if math.isfinite(self.psnr) else None}

    def broken_rule(self, form: Form, own_error: float, min_psnr: float) -> str | None:
        """The rule that does not hold, with its value, or None.

        float32 files must agree to four times PyTorch's own float32 error (against float64), or 1e-5 of [-1, 1] if that
        is more; float16 ones within one level on 99.5 % of the pixels and within two on all; quantised ones in PSNR.
        """
        if form.quantised:
            if self.psnr >= min_psnr:
                return None
            return (
                f"PSNR must be at least {min_psnr:g} dB, got {self.psnr:.1f} (--min-psnr {math.floor(self.psnr)} takes "
                "it; nothing is written now, so leave it out of --quantise to have the others)"
            )
        if form.branches == "float32":
            allowed = max(4 * own_error, 1e-5 * 127.5)
            return None if self.largest <= allowed else f"must be within {allowed:.2g} levels, got {self.largest:.2g}"
        if self.within_one < 0.995 or self.most_levels > 2:
            return (
                "must be within one grey level on 99.5 % of the pixels and two on all, "
                f"got {self.within_one:.2%} and {self.most_levels}"
            )
        return None


class Truth:
    """PyTorch's answers on some images, and how far others are from them.

    Args:
        file: the refiner.
        images: ``[N, C, H, W]`` uint8.
    """

    @torch.inference_mode()
    def __init__(self, file: RefinerFile, images: Tensor) -> None:
        self.file = file
        self.images = images
        self.prepared = prepare(images, file.settings["histogram"]).contiguous()
        self.refined = file.module(self.prepared)
        exact = deepcopy(file.module).double()(self.prepared.double())
        self.own_error = float((self.refined - exact).abs().max()) * 127.5
        """Largest error of PyTorch's float32 against float64, in grey levels."""

    def input(self, form: Form) -> Tensor:
        return self.images if form.uint8 else self.prepared

    def compare(self, refined: Tensor, form: Form) -> Parity:
        """``refined`` as the form gives it (uint8, or floats in [-1, 1]) against PyTorch's."""
        levels = refined if form.uint8 else from_float(refined, torch.uint8)
        steps = (levels.int() - from_float(self.refined, torch.uint8).int()).abs()
        exact = steps.double() if form.uint8 else (refined.double() - self.refined).abs() * 127.5
        square = float(exact.square().mean())
        return Parity(
            largest=float(exact.max()),
            mean=float(exact.mean()),
            psnr=10 * math.log10(255**2 / square) if square else math.inf,
            within_one=float((steps <= 1).double().mean()),
            most_levels=int(steps.max()),
            worst_image=int(exact.flatten(1).amax(1).argmax()),
        )

    @torch.inference_mode()
    def rounded_as_on_a_gpu(self, form: Form) -> Tensor:
        """What the float16 form gives where each layer's weights, input and output are rounded to float16.

        The products are summed in float32, as tensor cores do; a CPU's own float16 convolutions are very slow.
        """

        def rounded(values: Tensor) -> Tensor:
            return values.half().float()

        module = deepcopy(self.file.module)
        for parameter in module.parameters():
            parameter.copy_(rounded(parameter))
        x = rounded(F.relu(module.first(rounded(self.prepared))))
        for block in module.blocks:
            assert isinstance(block, network.ResidualBlock)
            hidden = rounded(F.relu(block.conv1(x)))
            x = rounded(F.relu(x + rounded(block.conv2(hidden))))
        refined = network.put_together(self.prepared, rounded(module.last(x)), module.computes)
        return from_float(refined, torch.uint8) if form.uint8 else refined

    def draw_worst(self, path: Path, refined: Tensor, parity: Parity) -> None:
        """The image with the largest difference: before, by PyTorch, by the exported file, and the difference × 16."""
        one = slice(parity.worst_image, parity.worst_image + 1)
        ours = refined[one] if refined.dtype == torch.uint8 else from_float(refined[one], torch.uint8)
        theirs = from_float(self.refined[one], torch.uint8)
        difference = ((ours.int() - theirs.int()) * 16 + 128).clamp(0, 255).to(torch.uint8)
        rows = {"synthetic": self.images[one], "PyTorch": theirs, "exported": ours, "diff. x16": difference}
        if theirs.shape[1] not in (1, 3):
            rows = {name: image[:, :1] for name, image in rows.items()}
        save_rows(path, {name: _as_array(image) for name, image in rows.items()})


def _as_array(images: Tensor) -> Any:
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()
