"""What tests of training on CUDA share: a small configuration, and when two runs are taken for equal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.storage.checkpoint import load_checkpoint

PRETEND = os.environ.get("FASTSIMGAN_PRETEND_CUDA") == "1"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = TrainConfig(
    hidden_channels=20, blocks=1, batch_size=4, history=10, pretrain_discriminator=1, steps=8, k_g=2, device="cuda",
    precision="float32", compile="off", eval_every=100, checkpoint_every=3, keep=9,
)  # fmt: skip
# kernels of a GPU add in another order; the pretend device's operators are the CPU's own
CLOSE = {"rtol": 1e-5 if PRETEND else 1e-3, "atol": 1e-6}


def losses(metrics: dict[str, Tensor]) -> list[float]:
    return [float(metrics["loss_refiner"]), float(metrics["loss_discriminator"])]


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def equal_runs(one: Path, other: Path) -> None:
    """Same metrics and the same checkpoints, but for rounding."""
    first, second = rows(one), rows(other)
    assert [sorted(row) for row in first] == [sorted(row) for row in second]
    for a, b in zip(first, second, strict=True):
        assert a.pop("phase") == b.pop("phase")
        np.testing.assert_allclose(list(a.values()), [b[key] for key in a], rtol=1e-3, atol=2e-6)
    names = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir())
    for name in names:
        (tensors, facts), (others, other_facts) = (load_checkpoint(run / "checkpoints" / name) for run in (one, other))
        assert tensors.keys() == others.keys()
        assert facts["positions"] == other_facts["positions"] and facts["done"] == other_facts["done"]
        assert facts["k_g"] == other_facts["k_g"] and facts["attempt"] == other_facts["attempt"]
        for key, value in tensors.items():
            if key.startswith(("refiner.", "discriminator.")):
                torch.testing.assert_close(value, others[key], rtol=0, atol=5e-5)  # a twelfth of one of D's steps
