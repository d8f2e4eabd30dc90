"""Exported files: that they agree with PyTorch, that they say what they need, and that altered ones are refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed ([onnx])")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed ([onnx])")

from refiners import before_computes, trained  # noqa: E402

from fastsimgan.config import TrainConfig  # noqa: E402
from fastsimgan.data.equalisation import equalise  # noqa: E402
from fastsimgan.data.pixel_values import from_float  # noqa: E402
from fastsimgan.data.preprocess import prepare  # noqa: E402
from fastsimgan.data.simulators.eyes import simulate_eyes  # noqa: E402
from fastsimgan.errors import InputError, UnavailableError  # noqa: E402
from fastsimgan.export import main  # noqa: E402
from fastsimgan.exporting import export as exporting  # noqa: E402
from fastsimgan.exporting import gptq, onnx_graph  # noqa: E402
from fastsimgan.exporting.exported_files import QUANTISED  # noqa: E402
from fastsimgan.inference import load_refiner, onnx_file, save_refiner  # noqa: E402
from fastsimgan.inference.graph_format import Form  # noqa: E402
from fastsimgan.inference.onnxruntime_backend import OnnxRuntimeBackend  # noqa: E402
from fastsimgan.inference.refiner import describe  # noqa: E402
from fastsimgan.inference.trtexec import Profile, command  # noqa: E402
from fastsimgan.models import refiner as network  # noqa: E402
from fastsimgan.ops import residual_block, residual_block_int8  # noqa: E402
from fastsimgan.refine import main as refine  # noqa: E402

FLOATS = ("refiner.onnx", "refiner.fp16.onnx")
ALL = (*FLOATS, "refiner.u8.fp16.onnx", *(name for name, _ in QUANTISED.values()))


def saved(folder: Path, histogram: str, **shape: Any) -> Path:
    module = trained(**shape)
    folder.mkdir()
    save_refiner(folder / "refiner.safetensors", module, histogram=histogram, training=TrainConfig(lam=0.25))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("export") / "run", "equalise", channels=1, width=8, blocks=2)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    exporting.export(run, out, quantise=tuple(QUANTISED), min_psnr=30, log=lambda line: None)
    return out


QUICK = [(64, 17, 9), (3, 35, 55), (1, 48, 64), (1, 224, 224)]  # each batch and each size
SLOW = [(b, *size) for b in (1, 3, 64) for size in [(17, 9), (35, 55), (48, 64), (224, 224)] if (b, *size) not in QUICK]


@pytest.mark.parametrize(
    ("batch", "height", "width"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_every_file_agrees_at_every_size(run: Path, exported: Path, batch: int, height: int, width: int) -> None:
    eyes = torch.from_numpy(simulate_eyes(3, 5)["images"])[:, None]
    images = torch.nn.functional.interpolate(eyes.float(), (height, width)).to(torch.uint8)
    images = images.repeat(-(-batch // 3), 1, 1, 1)[:batch]
    reference = load_refiner(run, "cpu")
    want = reference(images).int()
    prepared = prepare(images, "equalise")
    with torch.inference_mode():
        floats = reference.backend(prepared)
    for name in FLOATS:
        file = onnx_file.read(exported / name)
        difference = (OnnxRuntimeBackend(file, torch.device("cpu"))(prepared) - floats).abs().max()
        assert difference <= (1e-5 if name == "refiner.onnx" else 1 / 127.5), name
    steps = (load_refiner(exported / "refiner.u8.fp16.onnx", "cpu")(images).int() - want).abs()
    assert steps.max() <= 2 and (steps <= 1).float().mean() >= 0.995
    assert want.float().std() > 1  # a flat image would agree by chance


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_load_refiner_takes_every_file(run: Path, exported: Path, name: str, batch_size: int) -> None:
    images = simulate_eyes(5, 1)["images"]
    refiner = load_refiner(exported / name, device="cpu")
    refined = refiner(images, batch_size)
    allowed = 1 if name in (*FLOATS, "refiner.u8.fp16.onnx") else 40  # 8 bits: what they lose is the export's to judge
    assert np.abs(refined.astype(int) - load_refiner(run, "cpu")(images)).max() <= allowed
    assert refiner.sha256 == json.loads((exported / "export.json").read_text())["files"][name]
    assert refiner.backend.name.startswith("onnxruntime ")


def test_colour_keeps_its_channels(tmp_path: Path) -> None:
    """Images prepared in channels_last are handed on by address; a wrong order would be another image."""
    folder = saved(tmp_path / "rgb", "keep", channels=3, width=12, blocks=1)
    reports = exporting.export(folder, tmp_path / "out", log=lambda line: None)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    want = load_refiner(folder, "cpu")(images)
    for name in (*FLOATS, "refiner.u8.fp16.onnx"):
        assert np.abs(load_refiner(tmp_path / "out" / name, "cpu")(images).astype(int) - want).max() <= 1
    assert reports["refiner.onnx"].largest < 0.01


@pytest.mark.parametrize(("channels", "width"), [(1, 32), (3, 32), (4, 7)])
def test_a_fresh_refiner_is_the_identity_to_the_bit_in_every_form(tmp_path: Path, channels: int, width: int) -> None:
    torch.manual_seed(0)
    module = network.Refiner(channels, width=width, blocks=2)
    save_refiner(tmp_path / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    quantise = tuple(QUANTISED)
    exporting.export(tmp_path / "refiner.safetensors", tmp_path / "out", quantise=quantise, log=lambda line: None)
    for stored in (np.uint8, np.uint16):
        every = np.arange(np.iinfo(stored).max + 1, dtype=stored).reshape(1, 16, -1, 1).repeat(channels, 3)
        for name in ALL if stored == np.uint8 else FLOATS:
            refiner = load_refiner(tmp_path / "out" / name, "cpu")
            assert np.array_equal(refiner(every), every), (name, refiner.backend.name)


def test_the_papers_network_is_exported_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", "equalise", channels=1, width=8, blocks=2, computes="image")
    exporting.export(folder, tmp_path / "out", quantise=tuple(QUANTISED), min_psnr=30, log=lambda line: None)
    images = simulate_eyes(5, 1)["images"]
    want = load_refiner(folder, "cpu")(images)
    for name in (*FLOATS, "refiner.u8.fp16.onnx"):
        assert np.abs(load_refiner(tmp_path / "out" / name, "cpu")(images).astype(int) - want).max() <= 1
    assert np.abs(want.astype(int) - images).mean() > 20  # at random weights it is no identity


def test_a_refiner_that_carries_the_image_in_its_features_is_float32_alone(tmp_path: Path) -> None:
    """One of a version before --computes; its header has no such setting, and says how it began."""
    run = before_computes(tmp_path / "run", identity_init=True, width=20, blocks=2)
    said: list[str] = []
    reports = exporting.export(run, tmp_path / "out", log=said.append)
    assert list(reports) == ["refiner.onnx"] and "float32 alone is good enough" in said[0]
    assert "trtexec --onnx=refiner.onnx" in (tmp_path / "out" / "trtexec10.sh").read_text()
    with pytest.raises(InputError, match=r"quantise must be left out here: .* train it again for 16 and 8 bits"):
        exporting.export(run, tmp_path / "o", quantise=("int8-cpu",), log=said.append)
    narrow = before_computes(tmp_path / "narrow", identity_init=True, width=19)  # it began at random
    assert "refiner.u8.fp16.onnx" in exporting.export(narrow, tmp_path / "other", log=said.append)


def test_eight_bits_hold_for_channels_of_very_different_range(tmp_path: Path) -> None:
    """Trained refiners have them; with one scale for all channels, the small ones drown in rounding."""
    folder = saved(tmp_path / "run", "keep", channels=1, width=24, blocks=3)
    module = exporting.read_refiner(folder).module
    with torch.no_grad():
        for block in module.blocks:
            block.conv2.weight[:20] *= 0.05
            block.conv1.bias += torch.linspace(0, 2, 24)
        module.last.weight[:, :20] *= 10
    save_refiner(folder / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    reports = exporting.export(
        folder, tmp_path / "out", quantise=("int8-cpu", "int8-tensorrt", "fp8"), min_psnr=10, log=lambda line: None
    )
    found = {name: reports[QUANTISED[name][0]].psnr for name in QUANTISED}
    assert min(found["int8-cpu"], found["int8-tensorrt"]) > 55 and found["fp8"] > 45, found


# The CPU's int8 file in kernels of our own.

needs_int8 = pytest.mark.skipif(
    residual_block_int8.implementations()["vnni"] is not None,
    reason=str(residual_block_int8.implementations()["vnni"]),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 32 maps that does something, and its export."""
    folder = tmp_path_factory.mktemp("wide")
    run = saved(folder / "run", "equalise", channels=1, amount=0.1, width=32, blocks=3)
    lines: list[str] = []
    exporting.export(run, folder / "exported", quantise=("int8-cpu",), min_psnr=40, log=lines.append)
    assert any("in fastsimgan, int8 " in line for line in lines) == (
        residual_block_int8.implementations()["vnni"] is None
    )
    return run, folder / "exported"


def psnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Of floats in [-1, 1]."""
    return 10 * math.log10(4 / float((found - truth).double().square().mean()))


@needs_int8
def test_our_int8_is_nearer_to_pytorch_than_onnxruntimes(wide: tuple[Path, Path]) -> None:
    run, exported = wide
    eyes = torch.from_numpy(simulate_eyes(40, 5)["images"])[:, None]
    file = onnx_file.read(exported / "refiner.u8.int8-cpu.onnx")
    ours = load_refiner(file.path, "cpu")
    assert ours.backend.name.startswith("int8 ") and ours.sha256 == file.sha256
    with torch.inference_mode():
        truth = load_refiner(run, "cpu").backend(prepare(eyes, "equalise"))
        found = ours.backend.floats(eyes)
    theirs = OnnxRuntimeBackend(file, torch.device("cpu"))(eyes)
    assert psnr(found, truth) > 58 and psnr(found, truth) > psnr(theirs.float() / 127.5 - 1, truth) + 2
    assert torch.equal(ours(eyes), from_float(found, torch.uint8))
    # in parts of any size but one, for which PyTorch rounds otherwise in the first layer; and of a size no cache holds
    assert torch.equal(torch.cat([ours(eyes[:3]), ours(eyes[3:])]), ours(eyes))
    large = torch.nn.functional.interpolate(eyes[:1].float(), (300, 400)).to(torch.uint8)
    assert ours(large).shape == large.shape
    with pytest.raises(InputError, match="takes uint8 images, got torch.float32"):
        ours(eyes.float() / 255)


@needs_int8
def test_without_amx_it_is_vnni_with_the_last_block_in_float32(wide: tuple[Path, Path], monkeypatch) -> None:
    run, exported = wide
    eyes = torch.from_numpy(simulate_eyes(8, 5)["images"])[:, None]
    with torch.inference_mode():
        truth = load_refiner(run, "cpu").backend(prepare(eyes, "equalise"))
    for module in (residual_block, residual_block_int8):
        monkeypatch.setitem(module._MISSING, "amx", "no such unit")
    backend = load_refiner(exported / "refiner.u8.int8-cpu.onnx", "cpu").backend
    assert backend.name == "int8 vnni, last block float32"
    with torch.inference_mode():
        assert psnr(backend.floats(eyes), truth) > 58
    monkeypatch.setitem(residual_block_int8._MISSING, "vnni", "no such unit")
    assert load_refiner(exported / "refiner.u8.int8-cpu.onnx", "cpu").backend.name == "onnxruntime u8s8"


@needs_int8
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.1.conv2.scale", None, r"blocks\.1\.conv2\.scale must be float32 \[32\], got nothing"),
        ("blocks.0.conv1.weight", np.zeros((32, 32, 3, 3), np.float32), "must be int8 .* got float32"),
        ("blocks.0.in.per_unit", np.zeros((32, 1), np.float32), r"must be float32 \[32, 1, 1\], got float32 \[32, 1\]"),
        ("last.weight", np.zeros((1, 32, 3, 3), np.float32), r"must be float32 \[1, 32, 1, 1\], got float32"),
        ("blocks.0.conv1.scale", np.full(32, np.nan, np.float32), "must be finite, got NaN or Inf"),
    ],
)
def test_an_int8_file_that_is_not_what_it_says(wide, tmp_path, name, change, message) -> None:
    """Whoever can write the file can write its checksum: memory is taken on no word of it."""
    model = onnx.load(wide[1] / "refiner.u8.int8-cpu.onnx")
    facts = onnx_file.read(wide[1] / "refiner.u8.int8-cpu.onnx").facts
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.initializer.remove(tensor)
    if change is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(change, name))
    path = tmp_path / "other.onnx"
    path.write_bytes(onnx_file.stamp(model, facts))
    with pytest.raises(InputError, match=f"other.onnx: .*{message}"):
        load_refiner(path, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", "32", "ValueError: width must be a whole number, at least 1, got '32'"),
        ("blocks", None, "KeyError: 'blocks'"),
        ("histogram", "x", "ValueError: histogram must be keep or equalise, got 'x'"),
        ("branches", "int4", "ValueError: branches must be one of float32, .* got 'int4'"),
    ],
)
def test_metadata_that_is_not_whole(exported: Path, tmp_path: Path, key: str, value, message: str) -> None:
    facts = dict(onnx_file.read(exported / "refiner.onnx").facts)
    where = facts if key == "branches" else facts.setdefault("settings", {})
    if value is None:
        del where[key]
    else:
        where[key] = value
    (tmp_path / "other.onnx").write_bytes(onnx_file.stamp(onnx.load(exported / "refiner.onnx"), facts))
    with pytest.raises(InputError, match=f"metadata must be whole: {message}"):
        onnx_file.read(tmp_path / "other.onnx")


@pytest.mark.parametrize("shape", [(2, 3, 9, 11), (4, 2, 128, 256)])
def test_moments_are_those_of_all_neighbourhoods(shape: tuple[int, int, int, int]) -> None:
    """The second has more than are looked at: a step through them would be in step with the width."""
    features = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.functional.unfold(features, 3, padding=1).permute(0, 2, 1).reshape(-1, 9 * shape[1])
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1).double()
    full = (patches.T @ patches / len(patches)).numpy()
    assert np.abs(gptq.moments_of(features) - full).max() < (1e-5 if shape[0] == 2 else 0.02)


def test_channels_of_no_kernel_and_dead_ones(tmp_path: Path) -> None:
    """A bias alone must not overflow the units of sums that are nearly nothing."""
    folder = saved(tmp_path / "run", "keep", channels=1, width=32, blocks=3)
    module = exporting.read_refiner(folder).module
    with torch.no_grad():
        for block in module.blocks:
            block.conv1.weight[:8], block.conv1.bias[:8] = 0, 1
            block.conv1.weight[8:16], block.conv1.bias[8:16] = 0, -1
    save_refiner(folder / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    reports = exporting.export(folder, tmp_path / "out", quantise=tuple(QUANTISED), min_psnr=10, log=lambda line: None)
    # by units too small for the bias: 19 dB
    assert all(parity.psnr > (35 if "fp8" in name else 48) for name, parity in reports.items()), reports


def test_rounded_weights_make_up_for_each_other() -> None:
    """With inputs that go together, the layer's error is less than half that of rounding each weight by itself."""
    random = np.random.default_rng(0)
    common = random.normal(size=(4000, 3)) @ random.normal(size=(3, 20)) + 0.2 * random.normal(size=(4000, 20)) + 1
    inputs = np.concatenate([common, np.ones((4000, 1))], 1)
    weights = random.normal(size=(6, 21)) * 3
    moments = inputs.T @ inputs / len(inputs)
    found = gptq.compensated(weights, moments, np.rint, 8)
    assert np.array_equal(found[:, :-1], np.rint(found[:, :-1])) and np.abs(found[:, :-1]).max() <= 8
    plain = np.concatenate([np.rint(weights[:, :-1]), weights[:, -1:]], 1)

    def error(rounded) -> float:
        return float(np.square(inputs @ (rounded - weights).T).mean())

    assert error(found) < error(plain) / 2
    assert np.array_equal(gptq.compensated(np.rint(weights), moments, np.rint, 8)[:, :-1], np.rint(weights)[:, :-1])


def test_eight_bits_need_a_branch_to_be_in(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", "keep", channels=1, width=4, blocks=1)
    with pytest.raises(InputError, match="quantise must be for refiners of at least 2 blocks, .* got 1"):
        exporting.export(folder, tmp_path / "out", quantise=("int8-cpu",), log=lambda line: None)


def test_equalisation_in_the_graph_is_exactly_ours() -> None:
    module = network.Refiner(1, width=4, blocks=0)
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    model = onnx_graph.build(weights, describe(module, "equalise"), Form(True, "float32"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("equalised", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 1, 35, 55), dtype=np.uint8)
    images[0], images[1], images[2] = 0, 255, 77  # one value: left as it is
    images[3] = np.where(images[3] < 128, 15, 16)  # on both sides of a digit
    images[4, 0, 0, 1:] = 255
    for index in range(5, 40):  # dark, bright, narrow: as real histograms are
        centre, spread = random.integers(0, 256), random.integers(1, 80)
        images[index] = random.normal(centre, spread, images[index].shape).clip(0, 255)
    images[5:20] = (images[5:20] // 8) * 8
    found = session.run(["equalised"], {"images": images})[0]
    assert np.array_equal(found, equalise(torch.from_numpy(images)).numpy())


def test_float_inputs_say_by_name_what_they_need(exported: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    exporting.export(saved(tmp_path / "run", "keep", channels=1, width=4, blocks=1), plain, log=lambda line: None)
    names = {
        (folder.name, name): onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        .get_inputs()[0]
        .name
        for folder in (plain, exported)
        for name in ("refiner.onnx", "refiner.u8.fp16.onnx")
    }
    assert names == {
        ("plain", "refiner.onnx"): "normalised",
        ("plain", "refiner.u8.fp16.onnx"): "images",
        ("exported", "refiner.onnx"): "equalised_and_normalised",
        ("exported", "refiner.u8.fp16.onnx"): "images",
    }
    card = (exported / "README.md").read_text()
    assert "trained on histogram-equalised images" in card and "`equalised_and_normalised`" in card
    assert "trained on histogram-equalised" not in (plain / "README.md").read_text()


def test_metadata_and_report(run: Path, exported: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    for name in ALL:
        facts = onnx_file.read(exported / name).facts
        assert facts["lambda"] == 0.25 and facts["refiner_sha256"] == load_refiner(run, "cpu").sha256
        assert facts["training"]["steps"] == TrainConfig().steps and "uint8" in facts["how_to_call"]
        assert record["parity"][name]["psnr"] > 30
        assert not onnx.load(exported / name, load_external_data=False).graph.initializer[0].external_data
        assert (exported / f"worst.{name.removesuffix('.onnx')}.png").stat().st_size > 100


def test_a_file_needs_no_newer_onnxruntime_than_it_says(exported: Path) -> None:
    """onnxruntime 1.17 reads IR version 9 and opset 20 at most (its table of versions; 1.17.3 ran these files)."""
    assert "Needed are onnxruntime 1.17 or later (opset 19, IR version 9)" in (exported / "README.md").read_text()
    for name in ALL:
        model = onnx.load(exported / name, load_external_data=False)
        assert model.ir_version == 9 and [(each.domain, each.version) for each in model.opset_import] == [("", 19)]


def wrong_bias(weights, *arguments):
    return _build(weights | {"last.bias": weights["last.bias"] + 0.02}, *arguments)


_build = onnx_graph.build


def test_a_file_that_does_not_agree_is_not_written(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_graph, "build", wrong_bias)
    with pytest.raises(InputError, match=r"refiner\.onnx does not agree with PyTorch: must be within .* levels, got"):
        exporting.export(run, tmp_path / "out", log=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_eight_bits_that_lose_too_much_are_not_written(run, tmp_path, capsys) -> None:
    flags = ["--refiner", str(run), "--out", str(tmp_path / "out"), "--quantise", "fp8", "--min-psnr", "90"]
    assert main(flags) == 2
    assert (
        "refiner.u8.fp8.onnx does not agree with PyTorch: PSNR must be at least 90 dB, got" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_the_command(run, tmp_path, capsys) -> None:
    images = tmp_path / "images.npy"
    np.save(images, simulate_eyes(6, 3)["images"])
    flags = ["--refiner", str(run), "--out", str(tmp_path / "out"), "--images", str(images), "--trtexec", "11"]
    assert main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (tmp_path / "out" / "trtexec11.sh").read_text().strip()
    assert main(flags) == 2
    assert "must not exist yet" in capsys.readouterr().err
    np.save(images, np.zeros((4, 8, 8, 3), np.uint8))
    assert main([*flags[:3], str(tmp_path / "other"), *flags[4:]]) == 2
    assert "must have 1 channel(s), as the refiner has, got 3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_refine_takes_a_run_its_file_and_every_exported_one(run, exported, tmp_path, capsys) -> None:
    eyes = simulate_eyes(70, 4)["images"]  # two batches
    np.save(tmp_path / "eyes.npy", eyes)
    flags = ["--input", str(tmp_path / "eyes.npy"), "--device", "cpu"]
    refiners = [run, run / "refiner.safetensors", *(exported / name for name in (*FLOATS, "refiner.u8.fp16.onnx"))]
    refined = []
    for index, refiner in enumerate(refiners):
        out = tmp_path / f"{index}.npy"
        assert refine(["--refiner", str(refiner), "--output", str(out), *flags]) == 0, capsys.readouterr().err
        refined.append(np.load(out).astype(int))
        assert np.abs(refined[-1] - refined[0]).max() <= 1, refiner
    assert np.array_equal(refined[0], refined[1]) and np.abs(refined[0] - eyes).mean() > 1


def test_refine_with_a_file_for_other_images(exported: Path, tmp_path: Path, capsys) -> None:
    flags = ["--refiner", str(exported / "refiner.u8.fp16.onnx"), "--output", str(tmp_path / "out.npy")]
    for images, message in (
        (np.zeros((2, 8, 8, 3), np.uint8), "must have 1 channel(s), as the refiner has, got 3"),
        (np.zeros((2, 8, 8), np.uint16), "takes uint8 images, got torch.uint16"),
    ):
        np.save(tmp_path / "images.npy", images)
        assert refine([*flags, "--input", str(tmp_path / "images.npy"), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))


# What must be refused before any image is touched.


def altered(exported: Path, folder: Path, change) -> Path:
    path = folder / "altered.onnx"
    model = onnx.load(exported / "refiner.onnx")
    change(model, folder)
    path.write_bytes(model.SerializeToString())
    return path


def external(model, folder: Path) -> None:
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, folder / "written.onnx")


def hard_linked(model, folder: Path) -> None:
    external(model, folder)
    os.link(folder / "weights.bin", folder / "other.bin")
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "other.bin"


def in_an_attribute(model, folder: Path) -> None:
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [1.0])
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("value", tensor))


def unknown_operator(model, folder: Path) -> None:
    model.graph.node[0].op_type = "Loop"


def foreign_domain(model, folder: Path) -> None:
    model.graph.node[0].domain = "evil.example"


def functions(model, folder: Path) -> None:
    model.functions.add().name = "f"


def another_weight(model, folder: Path) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes(len(tensor.raw_data))


def not_ours(model, folder: Path) -> None:
    del model.metadata_props[:]


def more_channels(model, folder: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    facts = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "fastsimgan.facts"))
    model.ParseFromString(onnx_file.stamp(model, facts))


def half_the_facts(model, folder: Path) -> None:
    model.ParseFromString(onnx_file.stamp(model, {"uint8": False}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "all data must be inside the file, got tensor first.weight in another one"),
        (hard_linked, "all data must be inside the file"),
        (in_an_attribute, "all data must be inside the file, got tensor t"),
        (unknown_operator, "operators must be those of an exported refiner, got Loop"),
        (foreign_domain, "operators must be those of an exported refiner, got evil.example.Conv"),
        (functions, "got functions of its own"),
        (another_weight, "graph's sha256 must be [0-9a-f]{64}, got [0-9a-f]{64}: the file was altered"),
        (not_ours, "fastsimgan.format must be 'fastsimgan.onnx/1', got None"),
        (more_channels, r"its one input must be .* \['batch', 1, 'height', 'width'\]"),
        (half_the_facts, "metadata must be whole"),
    ],
)
def test_altered_files_are_refused(exported: Path, tmp_path: Path, capsys, change, message: str) -> None:
    path = altered(exported, tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_refiner(path, device="cpu")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    images, out = tmp_path / "images.npy", tmp_path / "out.npy"
    np.save(images, np.zeros((2, 8, 8), np.uint8))
    assert refine(["--refiner", str(path), "--input", str(images), "--output", str(out), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(f"error: {caught.value}\n")
    assert not list(tmp_path.glob("out*"))  # refused before any image was touched


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing.onnx: cannot be read"):
        load_refiner(tmp_path / "missing.onnx", device="cpu")
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not an ONNX file"):
        load_refiner(tmp_path / "junk.onnx", device="cpu")


def test_a_provider_that_is_not_there_is_said(exported: Path, tmp_path: Path, capsys) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnavailableError, match="has no CUDAExecutionProvider"):
        OnnxRuntimeBackend(onnx_file.read(exported / "refiner.onnx"), torch.device("cuda"))
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8), np.uint8))
    flags = ["--refiner", str(exported / "refiner.onnx"), "--input", str(tmp_path / "images.npy")]
    assert refine([*flags, "--output", str(tmp_path / "out.npy"), "--device", "cuda"]) == 3
    assert "CUDA" in capsys.readouterr().err and not list(tmp_path.glob("out*"))


def test_images_that_an_exported_refiner_does_not_take(exported: Path) -> None:
    refiner = load_refiner(exported / "refiner.u8.fp16.onnx", device="cpu")
    with pytest.raises(InputError, match="takes uint8 images, got torch.uint16: refiner.onnx"):
        refiner(np.zeros((2, 8, 8), np.uint16))
    with pytest.raises(InputError, match=r"must have 1 channel\(s\)"):
        refiner(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        refiner(np.zeros((2, 8, 8), np.uint8), 0)


def test_16_bit_images_keep_their_depth(run: Path, exported: Path) -> None:
    images = simulate_eyes(3, 2)["images"].astype(np.uint16) * 257
    refined = load_refiner(exported / "refiner.onnx", device="cpu")(images)
    assert refined.dtype == np.uint16
    assert np.abs(refined.astype(int) - load_refiner(run, "cpu")(images)).max() <= 1
    assert len(np.unique(refined)) > 1000


def test_trtexec_command_lines() -> None:
    profile = Profile((1, 35, 55), (64, 35, 55), (512, 48, 64))
    settings = {"channels": 1, "histogram": "equalise"}
    arguments = Path("a b/refiner.u8.fp16.onnx"), Path("r.engine"), profile
    shapes = "--minShapes=images:1x1x35x55 --optShapes=images:64x1x35x55 --maxShapes=images:512x1x48x64"
    assert command(*arguments, 10, Form(True, "float16"), settings) == (
        "trtexec '--onnx=a b/refiner.u8.fp16.onnx' --saveEngine=r.engine --stronglyTyped --noTF32 "
        f"{shapes} --skipInference"
    )
    assert command(*arguments, 11, Form(True, "float16"), settings) == (
        f"trtexec '--onnx=a b/refiner.u8.fp16.onnx' --saveEngine=r.engine --noTF32 {shapes} --skipInference"
    )
    assert "--minShapes=equalised_and_normalised:1x1x35x55 " in command(
        *arguments, 10, Form(False, "float16"), settings
    )
    with pytest.raises(InputError, match="must be 10 or 11, got 9"):
        command(*arguments, 9, Form(True, "float16"), settings)
    with pytest.raises(InputError, match="1 <= smallest <= usual <= largest"):
        Profile((2, 35, 55), (1, 35, 55), (4, 35, 55))


def test_export_without_its_optional_packages_says_which(run, tmp_path, monkeypatch) -> None:
    import sys

    for name in [
        name for name in sys.modules if name.startswith(("fastsimgan.exporting.", "fastsimgan.inference.onnx_"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnavailableError, match=r"need.* the package onnx: pip install 'fastsimgan\[onnx\]'"):
        load_refiner(tmp_path / "x.onnx", device="cpu")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main(["--refiner", str(run), "--out", str(tmp_path / "out")]) == 3
