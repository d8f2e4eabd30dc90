"""The contact sheets of a run: always the same images, so that pictures can be compared."""

from __future__ import annotations

from pathlib import Path

import torch

from fastsimgan.data.pixel_values import to_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.reporting.contact_sheet import save_contact_sheet
from fastsimgan.training.state import TrainingState

_SHOWN, _NEIGHBOURS = 8, 20_000  # images in a contact sheet, and real ones that the nearest is looked for among


@torch.no_grad()
def draw_picture(state: TrainingState, path: Path) -> None:
    """Write the contact sheet of this moment to ``path``."""
    batches = state.batches
    synthetic = batches.some("synthetic", _SHOWN)
    refined = state.ema(prepare(synthetic, batches.drawn_histogram))
    save_contact_sheet(path, to_float(synthetic), refined, to_float(batches.some("real", _NEIGHBOURS)))
