"""The model card of an export: what the refiner is, how each file is called, and how far each agrees with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsimgan.exporting.exported_files import FORMS, QUANTISED, how_to_call
from fastsimgan.exporting.onnx_graph import IR_VERSION, OPSET, RUNS_IN
from fastsimgan.exporting.parity import Parity
from fastsimgan.inference.refiner import RefinerFile
from fastsimgan.reporting.templates import fill_in

_CARD = Path(__file__).with_suffix(".md")


def model_card(
    file: RefinerFile,
    facts: Mapping[str, Any],
    reports: Mapping[str, Parity],
    commands: Mapping[int, str],
    min_psnr: float,
) -> str:
    """The card as Markdown.

    Args:
        file: the refiner.
        facts: what export.json holds.
        reports: how far each file, by name, is from PyTorch.
        commands: the trtexec command by TensorRT's major version.
        min_psnr: that quantised files have at least, in dB.
    """
    forms = FORMS | dict(QUANTISED.values())
    data = facts["data_sha256"]
    return fill_in(
        _CARD,
        settings=file.settings,
        facts=facts,
        data=", ".join(f"{name} {value}" for name, value in data.items()) if isinstance(data, dict) else data,
        calls={name: how_to_call(forms[name], file) for name in reports if name in forms},
        reports=reports,
        commands=commands,
        min_psnr=min_psnr,
        runs_in=RUNS_IN,
        opset=OPSET,
        ir_version=IR_VERSION,
    )
