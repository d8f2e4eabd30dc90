"""``python -m fastsimgan.refine``: the command, with a real refiner file."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimgan.config import TrainConfig
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.inference import load_refiner, save_refiner
from fastsimgan.models.refiner import RefinerNetwork
from fastsimgan.refine import main

RNG = np.random.default_rng(0)


@pytest.fixture
def refiner(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "refiner.safetensors"
    save_refiner(path, RefinerNetwork(1, hidden_channels=4, blocks=1), histogram="keep", training=TrainConfig())
    return path


def refine(refiner: Path, old: Path, new: Path, *flags: str) -> int:
    return main(["--refiner", str(refiner), "--input", str(old), "--output", str(new), "--device", "cpu", *flags])


def test_folder(refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    stack = {"uint8": RNG.integers(0, 256, (3, 35, 55), dtype=np.uint8)}
    stack["uint16"] = RNG.integers(0, 65536, (3, 35, 55), dtype=np.uint16)
    for kind, images in stack.items():
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "in" / f"{kind}_{i}.png")
            (tmp_path / "in" / f"{kind}_{i}.json").write_text(f'{{"gaze": "{i}"}}')

    assert refine(refiner, tmp_path / "in", tmp_path / "out", "--batch-size", "2") == 0

    function = load_refiner(refiner, device="cpu")
    change = []
    for kind, images in stack.items():
        expected = function(images)
        for i in range(3):
            with Image.open(tmp_path / "out" / f"{kind}_{i}.png") as image:
                refined = np.asarray(image)
            # Another batch size may round the last bit of a float another way, and so a grey level now and then.
            assert np.abs(refined.astype(int) - expected[i]).max() <= 1
            assert (tmp_path / "out" / f"{kind}_{i}.json").read_text() == f'{{"gaze": "{i}"}}'
            change.append(np.abs(refined.astype(float) - images[i]).mean() * 255 / np.iinfo(kind).max)
    described, *stages, summary = capsys.readouterr().out.splitlines()
    assert described == (
        f"{tmp_path}/in: folder, 6 images, 3 35x55 8-bit grey PNG, 3 35x55 16-bit grey PNG, 6 other files "
        f"(sidecars .json)"
    )
    assert len(stages) == 4 and sum("<- the limit" in line for line in stages) == 1
    assert summary.startswith(f"{tmp_path}/out: 6 images (0 skipped), 6 other files; 6 in ")
    assert f"refiner sha256 {hashlib.sha256(refiner.read_bytes()).hexdigest()}" in summary
    found = re.search(
        r"([\d.]+) images/s once loaded, by torch float32; mean \|R\(x\) - x\| ([\d.]+) grey levels of 255", summary
    )
    assert found is not None
    assert float(found[2]) == pytest.approx(np.mean(change), abs=0.01)


def test_arrays(refiner: Path, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (5, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, pitch_yaw=np.arange(10.0).reshape(5, 2))
    assert refine(refiner, tmp_path / "a.npz", tmp_path / "b.npz") == 0
    assert np.array_equal(open_images(tmp_path / "b.npz").load(), load_refiner(refiner, device="cpu")(images))
    assert np.array_equal(open_images(tmp_path / "b.npz").labels()["pitch_yaw"], np.arange(10.0).reshape(5, 2))


def test_skipping(refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(RNG.integers(0, 256, (8, 9), dtype=np.uint8)).save(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "2.png").write_bytes(b"")
    assert refine(refiner, tmp_path / "in", tmp_path / "out", "--on-error", "skip") == 1
    output = capsys.readouterr()
    assert "error: at most 1% of the images may be bad, got 1 of 2; the output holds the others" in output.err
    assert f"skipped {tmp_path}/in/2.png: cannot be recognised as PNG, JPEG or TIFF (an empty file)" in (
        output.err.splitlines()
    )
    assert "1 images (1 skipped)" in output.out


def rgb(path: Path) -> None:
    path.mkdir()
    Image.new("RGB", (7, 5)).save(path / "x.png")


def truncated(path: Path) -> None:
    path.mkdir()
    Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)).save(path / "x.png")
    (path / "x.png").write_bytes((path / "x.png").read_bytes()[:2000])


HOSTILE = {
    "missing": (lambda path: None, "{in}: must exist (a folder of images, .tar shards, an .npz, .npy or HDF5 file)"),
    "empty": (
        lambda path: path.mkdir(),
        "{in}: must hold at least one image (.png .jpg .jpeg .tif .tiff), got 0 other files",
    ),
    "rgb": (rgb, "{in}/x.png: must have 1 channel(s), as the refiner has, got 3"),
    "truncated": (
        truncated,
        "{in}/x.png: PNG must end with an IEND chunk, got a truncated file (--on-error skip leaves bad images out, if "
        "they are at most 1 %)",
    ),
    "no images": (
        lambda path: path.write_text("hello"),
        "{in}: must be a folder of images, an .npz or an .npy, got something else",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    case: str, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = HOSTILE[case]
    make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / ("out")
    assert refine(refiner, tmp_path / "in", output) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if " images [" not in line and line.strip()]
    assert lines == ["error: " + message.replace("{in}", str(tmp_path / "in"))]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_refiner_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 5, 7), np.uint8))
    assert refine(tmp_path / "gone", tmp_path / "a.npy", tmp_path / "b.npy") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/gone: the refiner cannot be read: No such file or directory\n"
    assert not (tmp_path / "b.npy").exists()


def test_a_misspelt_flag_is_answered_with_the_right_one() -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "fastsimgan.refine", "--refinr", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--refiner" in done.stderr


def test_help_imports_no_torch() -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    code = (
        "import sys\nfrom fastsimgan.refine import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "JPEG of quality 95" in " ".join(done.stdout.split())


def test_an_output_is_of_one_precision(
    refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsimgan.inference.torch_backend.cpu_has_bfloat16", lambda: True)  # any CPU can emulate it
    images = RNG.integers(0, 256, (4, 35, 55), dtype=np.uint8)
    np.save(tmp_path / "in.npy", images)
    assert refine(refiner, tmp_path / "in.npy", tmp_path / "out.npy", "--precision", "bfloat16") == 0
    expected = load_refiner(refiner, device="cpu", precision="bfloat16")(images)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    assert refine(refiner, tmp_path / "in.npy", tmp_path / "out.npy") == 2
    assert "precision" in capsys.readouterr().err
    assert refine(refiner, tmp_path / "in.npy", tmp_path / "other.npy", "--precision", "float16") == 2
    assert "precision float16 needs a CUDA device, got cpu" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))
