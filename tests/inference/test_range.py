"""Float images in a range of their own, such as depth in metres: kept in the refiner, undone on the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refiners import trained

import fastsimgan
from fastsimgan import export, refine, train
from fastsimgan.config import TrainConfig
from fastsimgan.data.pixel_values import check_range
from fastsimgan.data.resizing import resize
from fastsimgan.errors import InputError
from fastsimgan.inference import load_refiner, save_refiner

RANGE = (-2.0, 10.0)
METRES = (np.random.default_rng(0).random((6, 36, 40)) * 11 - 1.5).astype(np.float32)
QUICK = (
    "--steps 2 --batch-size 4 --hidden-channels 20 --blocks 1 --pretrain-discriminator 1 --history 4 --warm-up 0 "
    "--device cpu"
)


def saved(path: Path, span: tuple[float, float] | None) -> Path:
    save_refiner(path, trained(1, width=4, blocks=1), histogram="keep", training=TrainConfig(range=span))
    return path


def test_a_range_is_the_same_network_on_other_numbers(tmp_path: Path) -> None:
    plain, ranged = load_refiner(saved(tmp_path / "a", None)), load_refiner(saved(tmp_path / "b", RANGE))
    assert (plain.span, ranged.span) == ((0, 1), RANGE)
    low, high = np.float32(RANGE[0]), np.float32(RANGE[1])
    expected = plain((METRES - low) / (high - low)) * (high - low) + low
    found = ranged(METRES)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    assert found.min() >= low and found.max() <= high
    assert np.abs(found - METRES).max() > 0.1
    with pytest.raises(InputError, match=r"must be in the refiner's range -2 to 10 \(train --range\), got .* to 21.5"):
        ranged(METRES + 12)
    with pytest.raises(InputError, match="must be floats from -2 to 10"):
        ranged(np.zeros((1, 8, 8), np.uint8))
    ranged.warm_up(2, 8, 8)
    with pytest.raises(InputError, match=r"in \[0, 1\], got .*; train --range LO HI takes another range"):
        plain(METRES)


@pytest.mark.parametrize("kind", ["npz", "npy", "h5", "tif", "folder of npy", "shards"])
def test_refine_gives_back_the_same_units(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "refiner.safetensors", RANGE)
    expected = load_refiner(model)(METRES)
    source, output = tmp_path / "in", tmp_path / "out"
    label = np.arange(6)
    if kind == "npz":
        source, output = source.with_suffix(".npz"), output.with_suffix(".npz")
        np.savez(source, images=METRES.astype(np.float64), label=label)
    elif kind == "npy":
        source, output = source.with_suffix(".npy"), output.with_suffix(".npy")
        np.save(source, METRES)
    elif kind == "h5":
        h5py = pytest.importorskip("h5py")
        source, output = source.with_suffix(".h5"), output.with_suffix(".h5")
        with h5py.File(source, "w") as file:
            file["images"], file["label"] = METRES, label
    else:
        source.mkdir()
        for i, image in enumerate(METRES):
            if kind == "folder of npy":
                np.save(source / f"{i}.npy", image)
            else:
                Image.fromarray(image).save(source / f"{i}.tif")
            (source / f"{i}.json").write_text(json.dumps({"label": i}))
        if kind == "shards":
            assert refine.main(["--refiner", str(model), "--input", str(source), "--output", str(tmp_path / "s"),
                                "--to", "shards", "--device", "cpu"]) == 0  # fmt: skip
            source, expected = tmp_path / "s", load_refiner(model)(expected)
    assert (
        refine.main(["--refiner", str(model), "--input", str(source), "--output", str(output), "--device", "cpu"]) == 0
    )
    if kind in ("npz", "npy"):
        held = np.load(output)
        found = held if kind == "npy" else held["images"]
        assert kind == "npy" or (found.dtype == np.float64 and np.array_equal(held["label"], label))
    elif kind == "h5":
        with h5py.File(output) as file:
            found = file["images"][:]
            assert np.array_equal(file["label"][:], label)
    elif kind == "folder of npy":
        found = np.stack([np.load(output / f"{i}.npy") for i in range(6)])
    elif kind == "tif":
        found = np.stack([np.asarray(Image.open(output / f"{i}.tif")) for i in range(6)])
    else:
        from fastsimgan.data.formats.open_images import open_images
        from fastsimgan.data.reading import Reading

        found = open_images(output, Reading(span=RANGE)).load()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["npz", "folder of npy", "tif of two sizes"])
def test_train_keeps_the_range(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "run"
    if kind == "npz":
        source = source.with_suffix(".npz")
        np.savez(source, images=METRES)
    else:
        source.mkdir()
        for i, image in enumerate(METRES):
            if kind == "folder of npy":
                np.save(source / f"{i}.npy", image)
            else:
                Image.fromarray(image[: 36 - i % 2]).save(source / f"{i}.tif")
    sides = ["--synthetic", str(source), "--real", str(source)]
    assert train.main([*sides, "--out", str(out), *QUICK.split()]) == 2
    assert "; train --range LO HI takes another range" in capsys.readouterr().err
    assert train.main([*sides, "--out", str(out), "--range", "-1.5", "9.9", *QUICK.split()]) == 0
    assert ", where these are --range's -1.5 and 9.9" in capsys.readouterr().out
    refiner = load_refiner(out)
    assert refiner.span == (-1.5, 9.9)
    assert np.abs(refiner(METRES) - METRES).mean() < 1  # begins at the identity
    assert TrainConfig.from_json((out / "config.json").read_text()).range == (-1.5, 9.9)
    assert export.main(["--refiner", str(out), "--out", str(tmp_path / "onnx")]) == 2
    assert "from -1.5 to 9.9 (--range), which no exported form holds" in capsys.readouterr().err


def test_fit_takes_the_range_of_its_settings(tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "run", range=RANGE, steps=1, batch_size=2, hidden_channels=20, blocks=1, history=2,
        pretrain_discriminator=0, device="cpu",
    )  # fmt: skip
    refiner = fastsimgan.fit(METRES, METRES, config)
    assert refiner.span == RANGE and np.abs(refiner(METRES) - METRES).mean() < 0.5
    with pytest.raises(InputError, match="--range must be given for float images, got real images of uint8"):
        fastsimgan.fit(METRES, np.zeros((4, 36, 40), np.uint8), config)
    with pytest.raises(InputError, match="synthetic images: image 0: float images must be in the refiner's range"):
        fastsimgan.fit(METRES + 9, METRES, config)
    with pytest.raises(InputError, match="--range must be two numbers, the second larger, got 3 3"):
        TrainConfig(range=(3.0, 3.0)).validate()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0, 128, 255], "got 0 to 255: divide by 255"),
        ([0.3, 2, 8.25], "got 0.3 to 8.25; train --range LO HI"),
        ([-1, 0, 1], "got -1 to 1; train --range"),
        ([0, np.nan, 1], "got NaN or infinity: give such pixels a value"),
        ([0, np.inf, 1], "got NaN or infinity"),
    ],
)
def test_reasons_are_true(values: list[float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_range(np.array(values, np.float32).reshape(1, 1, 3), Path("a.npy"), 0)


def test_resizing_keeps_units() -> None:
    image = np.full((40, 40), -1.5, np.float32)
    image[:, 20:] = 9.25
    found = resize(image, (10, 10))
    assert (found.min(), found.max()) == (-1.5, 9.25) and np.abs(found[:, 0] + 1.5).max() < 0.5
