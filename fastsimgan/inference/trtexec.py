"""The trtexec command that builds an engine from an exported file (a pure function), and the sizes an engine is for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsimgan.errors import InputError
from fastsimgan.inference.graph_format import Form, input_name

Size = tuple[int, int, int]  # batch, height, width


@dataclass(frozen=True)
class Profile:
    """Smallest, usual (what an engine is tuned for) and largest (batch, height, width) of an engine's input."""

    smallest: Size
    usual: Size
    largest: Size

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= low <= middle <= high:
                raise InputError(
                    "profile must have 1 <= smallest <= usual <= largest in batch, height and width, "
                    f"got {self.smallest}, {self.usual}, {self.largest}"
                )


def command(onnx: Path, engine: Path, profile: Profile, major: int, form: Form, settings: Mapping[str, Any]) -> str:
    """The command line for TensorRT 10 or 11.

    Precision comes from the file: 10 is told so by --stronglyTyped, 11 knows no other way and has no such flag. Neither
    may use TF32, which rounds float32 as float16 would.
    """
    if major not in (10, 11):
        raise InputError(f"TensorRT's major version must be 10 or 11, got {major}")
    name = input_name(form.uint8, settings["histogram"])

    def shape(size: Size) -> str:
        batch, height, width = size
        return f"{name}:{batch}x{settings['channels']}x{height}x{width}"

    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}"]
    words += ["--stronglyTyped"] if major == 10 else []
    words += ["--noTF32", f"--minShapes={shape(profile.smallest)}", f"--optShapes={shape(profile.usual)}"]
    words += [f"--maxShapes={shape(profile.largest)}", "--skipInference"]
    return shlex.join(words)
