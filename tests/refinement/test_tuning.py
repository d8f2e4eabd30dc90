"""How many images a run refines at a time: a rule of the GPU's size; on a CPU as ever."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError
from fastsimgan.inference import save_refiner
from fastsimgan.models.refiner import Refiner
from fastsimgan.ops import _dispatch, residual_block, residual_block_race
from fastsimgan.ops.residual_block_race import RaceResult
from fastsimgan.refinement import tuning
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.tuning import Choice, choose, fitting, read_shape, useful_pixels

GB = 1 << 30


@pytest.fixture
def refiner(tmp_path: Path) -> Path:
    save_refiner(tmp_path / "refiner.safetensors", Refiner(1), histogram="keep", training=TrainConfig())
    return tmp_path / "refiner.safetensors"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two GPUs, as far as `choose` looks; the second has half of everything."""
    about = [
        SimpleNamespace(multi_processor_count=132, total_memory=80 * GB),
        SimpleNamespace(multi_processor_count=66, total_memory=40 * GB),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about[getattr(device, "index", device)])
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: SimpleNamespace())
    return about


@pytest.mark.parametrize(
    ("processors", "memory", "width", "pixels"),
    [
        (132, 80 * GB, 64, 1 << 20),  # an H100: 544 gaze images, 20 hands
        (148, 180 * GB, 64, 1 << 20),
        (108, 40 * GB, 64, 1 << 19),  # an A100
        (16, 8 * GB, 64, 1 << 18),  # no fewer than on a CPU
        (132, 8 * GB, 64, 1 << 18),  # a quarter of a gigabyte for what is alive in it, and 3 KB a pixel
        (132, 80 * GB, 1024, 1 << 17),
        (16, GB // 2, 64, 1 << 14),
    ],
)
def test_pixels_follow_from_the_gpu(processors: int, memory: int, width: int, pixels: int) -> None:
    assert useful_pixels(processors, memory, width) == pixels
    assert pixels * width * tuning.BYTES_PER_MAP <= memory * tuning.SHARE_OF_MEMORY


def test_images_in_a_batch() -> None:
    assert fitting(1024, 1 << 20, 35, 55) == 544 and fitting(64, 1 << 20, 35, 55) == 64
    assert fitting(64, 1 << 18, 4000, 4000) == 1


def test_the_smallest_device_decides_where_workers_share_them(refiner: Path, gpu: list[SimpleNamespace]) -> None:
    assert choose("cuda", refiner, None) == choose("auto", refiner, None) == Choice(1024, 1 << 19)
    assert choose("cuda:0", refiner, None) == Choice(1024, 1 << 20)
    assert choose("cpu", refiner, None) == Choice(64, 1 << 18)


def test_compiling_is_for_much_work_alone(
    refiner: Path, gpu: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 9 * 64 + 8 * 9 * 64 * 64 + 64
    assert read_shape(refiner).weights == read_shape(refiner.parent).weights == weights
    enough = int(tuning.COMPILE_FROM / (2 * weights * 35 * 55)) + 1
    assert choose("cuda:0", refiner, (enough, 35, 55)).compiled
    assert not choose("cuda:0", refiner, (enough - 1, 35, 55)).compiled
    assert not choose("cuda:0", refiner, None).compiled  # files: codecs are waited for
    assert not choose("cpu", refiner, (enough, 35, 55)).compiled
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="R is not compiled, although there is work enough: triton is not installed"):
        assert not choose("cuda:0", refiner, (enough, 35, 55)).compiled


def test_with_much_work_in_16_bits_a_race_names_the_residual_blocks(
    refiner: Path, gpu: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raced = []

    def race(shape, dtype, backward, device, *, features):
        raced.append((shape, dtype, backward, device, features))
        return RaceResult("the race", "triton", {"triton": 1.0, "reference": 2.0})

    monkeypatch.setattr(residual_block_race, "race", race)
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(residual_block, "implementations", lambda: {"triton": None})
    enough = 10**8
    assert choose("cuda:0", refiner, (enough, 35, 55), "float16").residual_block == "triton"
    assert raced == [((544, 64, 35, 55), torch.float16, False, torch.device("cuda:0"), torch.float16)]
    assert "the race: triton won (triton 1 ms; reference 2 ms)" in capsys.readouterr().err
    for precision, images in [("float32", (enough, 35, 55)), ("float16", (100, 35, 55)), ("float16", None)]:
        assert choose("cuda:0", refiner, images, precision).residual_block == tuning.RESIDUAL_BLOCK
    monkeypatch.setattr(residual_block, "implementations", lambda: {"triton": "triton is not installed"})
    assert choose("cuda:0", refiner, (enough, 35, 55), "float16").residual_block == tuning.RESIDUAL_BLOCK
    assert len(raced) == 1


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_refiner_is_left_to_whoever_loads_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "refiner.safetensors").write_bytes(content)
    assert read_shape(tmp_path) == tuning.Shape()
    assert read_shape(tmp_path / "nothing.safetensors") == read_shape(tmp_path / "refiner.onnx") == tuning.Shape()


def test_on_a_cpu_a_run_is_what_it_always_was(tmp_path: Path, refiner: Path) -> None:
    """Runs of earlier versions go on: nothing new stands in the record, and 64 given is 64 by itself."""
    np.save(tmp_path / "in.npy", np.zeros((70, 4, 5), np.uint8))
    job = Job(refiner, tmp_path / "in.npy", tmp_path / "out.npy", device="cpu")
    run = open_session(job).run
    record = json.loads((run.state / "run.json").read_text())["identity"]
    assert record["batch size"] == 64
    assert not {"pixels in a batch", "compiled", "residual block"} & record.keys()
    given = Job(refiner, tmp_path / "in.npy", tmp_path / "out.npy", device="cpu", batch_size=64)
    assert open_session(given).run.identity == run.identity
    assert refine(given).images == 70 and refine(job).images == 70


def test_a_run_in_16_bits_of_an_earlier_version_is_not_gone_on_with(refiner: Path, tmp_path: Path) -> None:
    """Their features were float32 between the blocks, and so were the first and the last layer: other bytes."""
    np.save(tmp_path / "in.npy", np.zeros((70, 4, 5), np.uint8))
    job = Job(refiner, tmp_path / "in.npy", tmp_path / "out.npy", device="cpu", precision="bfloat16")
    run = open_session(job).run
    assert run.identity["features"] == "16 bits" and open_session(job).run.identity == run.identity
    record = json.loads((run.state / "run.json").read_text())
    del record["identity"]["features"]
    (run.state / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="its features is None, here it is 16 bits"):
        open_session(job)
