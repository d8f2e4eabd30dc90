"""The whole job, a few steps of it, on the real data sets that FASTSIMGAN_DATA names (not part of the project)."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastsimgan.data.formats.open_images import open_images
from fastsimgan.evaluate import main as evaluate
from fastsimgan.refine import main as refine
from fastsimgan.train import main as train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FASTSIMGAN_DATA" not in os.environ, reason="FASTSIMGAN_DATA is not set"),
]


@pytest.mark.parametrize(
    ("kind", "histogram", "count"),
    [("eyes", "equalise", 12_000), ("digits", "keep", 5_365)],
)
def test_two_files_to_a_table(kind, histogram, count, tmp_path, capsys):
    data = Path(os.environ["FASTSIMGAN_DATA"]) / kind
    assert len(open_images(data / "rendered.npz")) == count
    run, refined = tmp_path / "run", tmp_path / "refined.npz"
    pair = ["--synthetic", str(data / "rendered.npz"), "--real", str(data / "real_unlabelled.npz")]
    small = [
        "--hidden-channels",
        "20",
        "--blocks",
        "1",
        "--steps",
        "3",
        "--pretrain-discriminator",
        "2",
        "--device",
        "cpu",
    ]
    assert train([*pair, "--out", str(run), *small]) == 0
    assert ("each synthetic image is equalised" in capsys.readouterr().out) == (histogram == "equalise")
    few = tmp_path / "few.npz"
    with np.load(data / "rendered.npz") as arrays:
        np.savez(few, **{name: arrays[name][:200] for name in arrays.files})
    assert refine(["--refiner", str(run), "--input", str(few), "--output", str(refined)]) == 0
    with np.load(few) as before, np.load(refined) as after:
        assert before.files == after.files
        for name in set(before.files) - {"images"}:
            assert before[name].tobytes() == after[name].tobytes()
        assert before["images"].shape == after["images"].shape and after["images"].dtype == np.uint8
    sets = ["--synthetic", str(few), "--refined", str(refined), "--real", str(data / "real_validation.npz")]
    assert evaluate([*sets, "--seeds", "1", "--steps", "2", "--device", "cpu"]) == 0
    assert "refined" in capsys.readouterr().out
