"""fastsimgan: train a refiner that makes synthetic images look real while their labels stay true.

    import fastsimgan
    refiner = fastsimgan.fit(synthetic, real)            # two arrays of images
    refiner = fastsimgan.load_refiner("runs/refiner")
    refined = refiner(images)
    fastsimgan.evaluate(synthetic, refined, real)["rows"]

Importing it does not import torch; the first use does. It sets how long OpenMP's threads spin (`hardware.openmp`) in
the environment, unless that is set there or torch is loaded already.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsimgan.hardware import openmp

if TYPE_CHECKING:
    from fastsimgan import evaluate as evaluate
    from fastsimgan.config import TrainConfig as TrainConfig
    from fastsimgan.inference import load_refiner as load_refiner
    from fastsimgan.training.loop import fit as fit

# Here, since every process of ours imports this before it imports torch: commands, workers, Ray's workers.
openmp.wait_briefly()

__version__ = "0.1.0"
__all__ = ["TrainConfig", "evaluate", "fit", "load_refiner"]

_HOMES = {
    "TrainConfig": "fastsimgan.config",
    "fit": "fastsimgan.training.loop",
    "load_refiner": "fastsimgan.inference",
}


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return importlib.import_module("fastsimgan.evaluate")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsimgan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
