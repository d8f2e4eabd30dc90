"""Large pictures in tiles: the same bytes as whole, by whatever runs R here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from refiners import trained

from fastsimgan.config import TrainConfig
from fastsimgan.data import equalisation
from fastsimgan.data.equalisation import equalise
from fastsimgan.errors import UnavailableError
from fastsimgan.exporting.export import export
from fastsimgan.hardware.precision import cpu_has_bfloat16
from fastsimgan.inference import load_refiner, save_refiner, tiles

FILES = ["refiner.safetensors", "refiner.onnx", "refiner.fp16.onnx", "refiner.u8.fp16.onnx", "refiner.u8.int8-cpu.onnx"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("refiner")
    for how in ("keep", "equalise"):
        network = trained(width=32, blocks=4)
        (folder / how).mkdir()
        save_refiner(folder / how / "refiner.safetensors", network, histogram=how, training=TrainConfig())
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        export(folder / how, folder / how / "out", quantise=("int8-cpu",), min_psnr=0, log=lambda _: None)
        (folder / how / "out" / "refiner.safetensors").symlink_to(folder / how / "refiner.safetensors")
    return {how: folder / how / "out" for how in ("keep", "equalise")}


def test_the_margin_is_what_a_pixel_depends_on() -> None:
    for kernel, blocks in ((3, 4), (7, 2)):
        network = trained(width=8, blocks=blocks, first_kernel=kernel)
        around = tiles.margin({"first_kernel": kernel, "blocks": blocks})
        images = torch.zeros(1, 1, 61, 61, requires_grad=True)
        network(images)[0, 0, 30, 30].backward()
        assert images.grad is not None
        depends = images.grad[0, 0].abs()
        seen = (depends > 1e-7 * depends.max()).nonzero()  # a convolution by Winograd leaves rounding beyond
        assert int((seen - 30).abs().max()) <= around
        assert kernel == 7 or around == 9  # §3.1's R


@pytest.mark.parametrize("how", ["keep", "equalise"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiles_give_the_bytes_of_the_whole(
    how: str, name: str, dtype: str, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        refiner = load_refiner(exported[how] / name, "cpu")
    except UnavailableError as error:
        pytest.skip(str(error))
    if refiner.backend.dtype == torch.uint8 and dtype != "uint8":
        pytest.skip("such a file takes uint8 alone")
    images = np.random.default_rng(0).integers(0, 256, (1, 501, 594), dtype=np.uint8)
    if dtype != "uint8":
        images = images.astype(np.uint16) * 257 if dtype == "uint16" else (images / 255).astype(np.float32)
    whole = refiner(images)
    calls = []
    inner = refiner.backend.__class__.__call__
    monkeypatch.setattr(
        refiner.backend.__class__, "__call__", lambda self, part: calls.append(part.shape) or inner(self, part)
    )
    monkeypatch.setattr(tiles, "BYTES", 5 << 20)
    assert np.array_equal(refiner(images), whole)
    inside = refiner.backend.dtype == torch.uint8 and how == "equalise"  # the file equalises, so it must have it whole
    assert (len(calls) > 4) != inside


def test_tiles_in_bfloat16(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_has_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    refiner = load_refiner(exported["keep"] / "refiner.safetensors", "cpu", precision="bfloat16")
    images = np.random.default_rng(1).integers(0, 256, (1, 501, 594), dtype=np.uint8)
    whole = refiner(images)
    monkeypatch.setattr(tiles, "BYTES", 5 << 20)
    assert np.array_equal(refiner(images), whole)


def test_every_size_is_covered_once() -> None:
    for height, width in ((1, 1), (47, 900), (300, 301), (533, 480), (97, 2000)):
        images = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
        seen = []

        def call(part: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(part)
            return part

        assert torch.equal(tiles.in_tiles(call, images, margin=9, most=240**2, dtype=torch.float32), images)
        assert max(part.shape[2] * part.shape[3] for part in seen) <= 300**2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_large_picture_is_equalised_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(np.random.default_rng(0).normal(90, 20, (2, 1, 211, 307)).clip(0, 255)).to(torch.int32)
    images = (images * (1 if dtype == torch.uint8 else 200)).to(dtype)
    images[1] = 7
    whole = equalise(images)
    monkeypatch.setattr(equalisation, "LARGE", 1000)
    assert torch.equal(equalise(images), whole)


def test_narrow_refiners_have_tiles_no_larger_than_others() -> None:
    assert tiles.pixels({"width": 8}) == tiles.pixels({"width": 32}) == 2 * tiles.pixels({"width": 64})
