"""A trained refiner as a function: types in and out, its file, and files that are not one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refiners import before_computes, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fastsimgan.config import TrainConfig
from fastsimgan.data.equalisation import equalise, non_uniformity
from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.preprocess import prepare
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.hardware.precision import cpu_has_bfloat16
from fastsimgan.inference import load_refiner, save_refiner, torch_backend
from fastsimgan.models import refiner as network


@pytest.fixture
def identity(tmp_path):
    module = network.RefinerNetwork(1, hidden_channels=20, blocks=1)
    save_refiner(tmp_path / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    return load_refiner(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_comes_back_is_of_the_same_kind(identity, dtype):
    rng = np.random.default_rng(0)
    images = rng.random((5, 12, 17)).astype(np.float32)
    if dtype != np.float32:
        images = (images * np.iinfo(dtype).max).astype(dtype)
    refined = identity(images, batch_size=2)
    assert refined.shape == images.shape and refined.dtype == images.dtype
    top = 1.0 if dtype == np.float32 else float(np.iinfo(dtype).max)
    assert np.abs(refined.astype(np.float64) - images).max() / top < 1e-6  # of whole numbers it is the identity
    assert dtype == np.float32 or np.array_equal(refined, images)
    tensor = identity(torch.from_numpy(images)[:, None], batch_size=2)
    assert np.array_equal(tensor[:, 0].numpy(), refined)
    with_channel = identity(images[..., None], batch_size=2)
    assert np.array_equal(with_channel[..., 0], refined)


def test_float32_means_float32_and_the_users_flags_stay(identity, monkeypatch):
    """TF32 is off while R runs, and nothing else of PyTorch's global state changes, then or after."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", True)
    monkeypatch.setattr(cudnn, "benchmark", True)

    def flags():
        return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision()

    before, during = flags(), []
    identity.backend._module.first.register_forward_pre_hook(lambda *_: during.append(flags()))
    identity(np.zeros((2, 8, 8), np.uint8))
    assert before[0] and during == [(False, *before[1:])] and flags() == before


def test_images_without_a_pixel_are_refused(identity):
    with pytest.raises(InputError, match=r"images must have at least one pixel, got \[2, 0, 60\]"):
        identity(np.zeros((2, 0, 60), np.uint8))


def test_a_large_batch_is_taken_in_parts_that_caches_hold(monkeypatch):
    monkeypatch.setattr(torch_backend, "_IN_CACHE", 4 * 20 * 8 * 9 * 3)  # three images for each thread
    seen = []

    def call(images):
        seen.append(len(images))
        return images * 2

    at_once = 3 * torch.get_num_threads()
    images = torch.rand(2 * at_once + 1, 1, 8, 9)
    assert torch.equal(torch_backend.in_cache(call, images, 20), images * 2)
    assert len(seen) == 3 and max(seen) <= at_once and max(seen) - min(seen) <= 1  # none is left with one alone
    seen.clear()
    large = torch.rand(2, 1, 80, 90)
    assert torch.equal(torch_backend.in_cache(call, large, 20), large * 2) and seen == [2]


@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_images_are_channels_last_by_their_strides(channels):
    """Where they are not, the first convolution gives its maps in the other order, and the next layer turns them."""
    images = torch.randint(0, 256, (2, channels, 5, 7), dtype=torch.uint8)
    prepared = prepare(images, "keep")
    assert prepared.stride() == (35 * channels, 1, 7 * channels, channels)
    torch.testing.assert_close(prepared, images / 127.5 - 1)
    first = torch.nn.Conv2d(channels, 8, 3, padding=1)
    assert first(prepared).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("width", [20, 32])
def test_bfloat16_on_a_cpu_is_within_two_grey_levels(tmp_path, width):
    module = trained(1, amount=0.1, hidden_channels=width, blocks=3)
    save_refiner(tmp_path / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    exact, rounded = (load_refiner(tmp_path, device="cpu", precision=name) for name in ("float32", "bfloat16"))
    assert rounded.backend.name == "torch bfloat16"
    images = np.random.default_rng(0).integers(0, 256, (5, 35, 55), dtype=np.uint8)
    off = np.abs(exact(images).astype(int) - rounded(images))
    assert 0 < off.mean() < 0.5 and off.max() <= 2
    assert np.abs(exact(images).astype(int) - images).mean() > 2  # R does something


def test_files_from_before_computes_give_what_they_gave(tmp_path, monkeypatch):
    """Their header has no such setting; the network computes the image, as the paper's does."""
    folder = before_computes(tmp_path / "run", identity_init=True, width=24, blocks=2)
    weights = load_file(folder / "refiner.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 11), dtype=np.uint8)

    def layer(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding="same")

    x = F.relu(layer(prepare(torch.from_numpy(images)[:, None], "keep"), "first"))
    for block in ("blocks.0", "blocks.1"):
        x = F.relu(x + layer(F.relu(layer(x, f"{block}.conv1")), f"{block}.conv2"))
    expected = from_float(torch.tanh(layer(x, "last")), torch.uint8)[:, 0].numpy()
    found = load_refiner(folder, device="cpu", block="reference")
    assert np.array_equal(found(images), expected) and found.settings["computes"] == "image"
    monkeypatch.setattr(torch_backend, "cpu_has_bfloat16", lambda: True)
    with pytest.raises(InputError, match=r"precision must be float32, got bfloat16: .* train it again for 16"):
        load_refiner(folder, device="cpu", precision="bfloat16")
    random = before_computes(tmp_path / "random", identity_init=False, width=24)  # the paper's presets
    assert load_refiner(random, device="cpu", precision="bfloat16").backend.name == "torch bfloat16"


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precisions_that_a_processor_lacks_are_refused(identity, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(torch_backend, "cpu_has_bfloat16", lambda: False)
    needs = {"float16": "needs a CUDA device, got cpu", "bfloat16": "needs a CPU that computes in it"}[precision]
    with pytest.raises(InputError, match=f"precision {precision} {needs}"):
        load_refiner(tmp_path, device="cpu", precision=precision)
    with pytest.raises(InputError, match=f"precision must be left alone for exported files.*got {precision}"):
        load_refiner(tmp_path / "refiner.onnx", device="cpu", precision=precision)


def test_the_batch_size_changes_no_more_than_rounding(identity):
    images = np.random.default_rng(0).random((7, 9, 11)).astype(np.float32)
    np.testing.assert_allclose(identity(images, batch_size=1), identity(images, batch_size=7), atol=1e-5)


def test_equalisation_happens_inside(tmp_path):
    module = network.RefinerNetwork(1, hidden_channels=20, blocks=1)
    save_refiner(tmp_path / "refiner.safetensors", module, histogram="equalise", training=TrainConfig())
    dark = np.random.default_rng(0).integers(10, 60, (3, 30, 40), dtype=np.uint8)
    expected = equalise(torch.from_numpy(dark)[:, None])[:, 0].numpy()
    assert np.array_equal(load_refiner(tmp_path, "cpu")(dark), expected)
    floats = load_refiner(tmp_path, "cpu")((dark / 255).astype(np.float32))
    assert np.abs(floats * 255 - expected).max() <= 1  # equalised with 16 bits


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"must have 1 channel\(s\), as the refiner has, got 3"),
        (np.zeros(8, np.uint8), r"must be \[N, H, W\] or \[N, H, W, C\], .*, got uint8 \[8\]"),
        (torch.zeros(2, 8, 8), r"must have 1 channel\(s\), as the refiner has, got 2"),
        (torch.zeros(1, 2, 1, 8, 8), r"must be a tensor \[N, C, H, W\]"),
        (np.zeros((2, 8, 8), np.int64), r"must be .* uint8, uint16 or float32 in \[0, 1\], got int64"),
        (np.full((2, 8, 8), -1, np.float32), r"must be in \[0, 1\], got -1 to -1"),
        (np.full((2, 8, 8), np.nan, np.float32), r"must be in \[0, 1\], got NaN"),
    ],
)
def test_images_that_break_a_rule(identity, images, message):
    with pytest.raises(InputError, match=message):
        identity(images)


def broken(tmp_path, **changes):
    module = network.RefinerNetwork(1, hidden_channels=20, blocks=1)
    file = tmp_path / "refiner.safetensors"
    save_refiner(file, module, histogram="keep", training=TrainConfig())
    settings = {"channels": 1, "width": 20, "blocks": 1, "first_kernel": 3, "histogram": "keep"} | changes
    header = {"format": "fastsimgan.refiner/1", "settings": json.dumps(settings), "training": "{}"}
    save_file(module.state_dict(), file, header)
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10**9}, "not those of the weights"),
        ({"blocks": 2}, "number of blocks is not that of the weights"),
        ({"first_kernel": 4}, "first_kernel must be odd"),
        ({"histogram": "rm -rf"}, "histogram must be keep or equalise"),
        ({"channels": None}, "not a whole refiner"),
        ({"computes": []}, "computes must be change or image"),
        ({"computes": "both"}, "computes must be change or image, got 'both'"),
    ],
)
def test_files_whose_header_lies(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_refiner(broken(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_refiner(tmp_path):
    with pytest.raises(InputError, match="no such refiner"):
        load_refiner(tmp_path)
    (tmp_path / "refiner.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_refiner(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(InputError, match="format must be"):
        load_refiner(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    module = network.RefinerNetwork(1, hidden_channels=20, blocks=1)
    with torch.no_grad():
        module.last.bias.fill_(float("nan"))
    save_refiner(tmp_path / "refiner.safetensors", module, histogram="keep", training=TrainConfig())
    with pytest.raises(InputError, match="weights must be finite.*last.bias"):
        load_refiner(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UnavailableError, match="sees no CUDA device"):
        load_refiner(broken(tmp_path), device="cuda")


def test_equalise_is_the_usual_rule():
    rng = np.random.default_rng(0)
    images = rng.integers(30, 90, (4, 20, 30), dtype=np.uint8)
    expected = np.empty_like(images)
    for i, image in enumerate(images):
        cdf = np.bincount(image.ravel(), minlength=256).cumsum()
        first = cdf[image.min()]
        table = np.clip((cdf - first) / (image.size - first) * 255, 0, 255)
        expected[i] = np.rint(table[image]).astype(np.uint8)
    got = equalise(torch.from_numpy(images)[:, None])[:, 0].numpy()
    assert np.abs(got.astype(int) - expected).max() <= 1 and (got != expected).mean() < 0.01
    assert got.min() == 0 and got.max() == 255
    flat = torch.full((1, 1, 5, 5), 77, dtype=torch.uint8)
    assert torch.equal(equalise(flat), flat)


def test_non_uniformity_tells_equalised_from_ordinary():
    rng = np.random.default_rng(0)
    plain = torch.from_numpy(rng.normal(110, 30, (20, 1, 36, 60)).clip(0, 255).astype(np.uint8))
    assert non_uniformity(plain) > 0.15
    assert non_uniformity(equalise(plain)) < 0.05
    wide = (plain.int() * 257).to(torch.uint16)
    assert non_uniformity(wide) > 0.15 and non_uniformity(equalise(wide)) < 0.05
    with pytest.raises(InputError, match="must be uint8 or uint16 of shape"):
        equalise(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """One flipped bit of a weight was 28 grey levels."""
    path = tmp_path / "refiner.safetensors"
    save_refiner(path, trained(1, hidden_channels=4, blocks=1), histogram="keep", training=TrainConfig())
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.integers(0, 8 * len(whole), 300).tolist()
    places += (8 * rng.integers(len(whole) - 900, len(whole), 50)).tolist()  # weights
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(InputError):
            load_refiner(path, device="cpu")
    path.write_bytes(whole.replace(b'"keep', b'"kexp'))
    with pytest.raises(InputError, match="sha256 must be .* it was damaged or altered"):
        load_refiner(path, device="cpu")
    path.write_bytes(whole)
    load_refiner(path, device="cpu")


def test_a_header_is_not_believed_about_the_number_of_blocks(tmp_path: Path) -> None:
    """A million of them were built, for 20 seconds, before they were found missing."""
    folder = before_computes(tmp_path / "run", identity_init=False)
    file = folder / "refiner.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    header["settings"] = header["settings"].replace('"blocks": 1', '"blocks": 1000000')
    save_file(tensors, file, header)
    with pytest.raises(InputError, match="number of blocks is not that of the weights"):
        load_refiner(folder, device="cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_one_picture_is_refined_as_a_batch_of_one(channels: int, tmp_path: Path) -> None:
    save_refiner(
        tmp_path / "refiner.safetensors", trained(channels, hidden_channels=4, blocks=1), histogram="keep",
        training=TrainConfig(),
    )  # fmt: skip
    refiner = load_refiner(tmp_path, device="cpu")
    shape = (6, 9) if channels == 1 else (6, 9, channels)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (whole,) = refiner(picture[None])
    assert not np.array_equal(whole, picture)
    assert np.array_equal(refiner(picture), whole)
    assert np.array_equal(np.asarray(refiner(Image.fromarray(picture))), whole)
    planes = torch.from_numpy(np.atleast_3d(picture)).permute(2, 0, 1)
    assert np.array_equal(refiner(planes).permute(1, 2, 0).numpy().reshape(shape), whole)
    with pytest.raises(InputError, match="the picture's mode must be .*, got P"):
        refiner(Image.fromarray(picture).convert("P"))


def test_it_is_a_transform_of_a_data_set(tmp_path: Path) -> None:
    """Also in the processes of a DataLoader."""
    save_refiner(
        tmp_path / "refiner.safetensors",
        trained(1, hidden_channels=4, blocks=1),
        histogram="keep",
        training=TrainConfig(),
    )
    refiner = load_refiner(tmp_path, device="cpu")
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 1, 5, 7), dtype=np.uint8))

    class Set(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> torch.Tensor:
            return refiner(pictures[index])

    whole = refiner(pictures)
    for workers in (0, 2):
        assert torch.equal(torch.cat([*torch.utils.data.DataLoader(Set(), 2, num_workers=workers)]), whole), workers


def test_it_says_what_it_is(identity) -> None:
    assert repr(identity) == "Refiner(grey, 1 blocks of 20 feature maps, histogram 'keep', torch float32 on cpu)"
