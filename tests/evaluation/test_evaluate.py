"""The judge: gaze errors, training on either set, the table and the json."""

import json
import re

import numpy as np
import pytest
import torch

import fastsimgan
from fastsimgan.data.gaze_angles import gaze_vectors, pitch_yaw
from fastsimgan.evaluate import main
from fastsimgan.evaluation.tables import table
from fastsimgan.evaluation.task_network import Judge, Labelled, _reframe, train_and_predict
from fastsimgan.metrics.gaze_error import angular_errors, gaze_summary


def gaze_arrays(count: int, seed: int) -> dict[str, np.ndarray]:
    """A dark disc on white that moves with the gaze."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(-0.3, 0.3, (count, 2)).astype(np.float32)
    rows, columns = np.mgrid[:24, :26]
    distance = np.hypot(rows - 12 + 25 * labels[:, :1, None], columns - 13 - 25 * labels[:, 1:, None])
    return {"images": np.where(distance < 5, 0, 255).astype(np.uint8), "pitch_yaw": labels}


def class_arrays(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 60, (count, 16, 16)) + 60 * labels[:, None, None]
    return {"images": images.astype(np.uint8), "label": labels}


def save(path, arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_angular_error_against_arccos_and_its_inverse():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-0.6, 0.6, (2, 200, 2))
    dot = (gaze_vectors(a) * gaze_vectors(b)).sum(1)
    np.testing.assert_allclose(angular_errors(a, b), np.degrees(np.arccos(dot)), atol=1e-5)
    np.testing.assert_allclose(pitch_yaw(3 * gaze_vectors(a)), a, atol=1e-12)
    assert angular_errors(a, a).max() < 1e-6


def test_summary_tells_a_constant_offset_from_scatter():
    true = np.random.default_rng(0).uniform(-0.3, 0.3, (500, 2))
    summary = gaze_summary(true + np.radians([3.0, -8.0]), true)
    assert summary["bias_pitch_deg"] == pytest.approx(3) and summary["bias_yaw_deg"] == pytest.approx(-8)
    assert summary["bias_free_mean_deg"] < 1e-6 and summary["bias_free_within_7deg"] == 100
    assert summary["within_7deg"] == 0 and 7 < summary["mean_deg"] < 9


def test_the_json_has_its_form_and_nothing_is_overwritten(tmp_path, capsys):
    train, test = gaze_arrays(80, 0), gaze_arrays(20, 1)
    out = tmp_path / "out.json"
    flags = ["--synthetic", save(tmp_path / "a.npz", train), "--refined", save(tmp_path / "c.npz", train)]
    flags += ["--real", save(tmp_path / "v.npz", test), "--seeds", "2", "--steps", "4", "--json", str(out)]
    assert main([*flags, "--plot", str(tmp_path / "p.png"), "--device", "cpu"]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert result["task"] == "gaze" and set(rows) == {"constant", "synthetic", "refined"}
    for name in ("mean_deg", "median_deg", "within_7deg"):
        assert set(rows["refined"][name]) >= {"mean", "std"}
    assert len(rows["refined"]["mean_deg"]["each"]) == 2 and "ensemble" in rows["refined"]
    assert rows["constant"]["mean_deg"]["std"] == 0
    assert "within 7° %" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(flags) == 2  # the json is there: never overwritten
    assert "must not exist yet" in capsys.readouterr().err


def test_realism_and_drift_are_printed_and_in_the_json(tmp_path, capsys):
    train, test = gaze_arrays(40, 0), gaze_arrays(40, 1)
    out, worst = tmp_path / "out.json", tmp_path / "worst.png"
    flags = ["--synthetic", save(tmp_path / "a.npz", train), "--refined", save(tmp_path / "c.npz", train)]
    flags += ["--real", save(tmp_path / "v.npz", test), "--seeds", "1", "--steps", "2", "--device", "cpu"]
    assert main([*flags, "--realism", "--worst", str(worst), "--json", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert set(result["realism"]) == {"features", "synthetic", "refined"} and "told apart" in printed
    assert result["differences"] == {}  # one seed has no spread
    assert result["drift"]["edges_px"]["max"] == 0 and "label drift: " in printed
    assert worst.read_bytes().startswith(b"\x89PNG")


def test_an_answer_is_the_mean_over_nine_shifted_copies():
    train, test = Labelled.from_arrays(class_arrays(60, 0), "a"), class_arrays(5, 1)["images"]
    settings = {"classes": 3, "seed": 0, "device": torch.device("cpu")}
    single = Judge(steps=3, test_shift=0)
    padded = np.pad(test, ((0, 0), (2, 2), (2, 2)), mode="edge")
    height, width = test.shape[1:]
    copies = [padded[:, down : down + height, right : right + width] for down in (0, 2, 4) for right in (0, 2, 4)]
    expected = np.mean([train_and_predict(train, each, judge=single, **settings) for each in copies], 0)
    found = train_and_predict(train, test, judge=Judge(steps=3), **settings)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(train_and_predict(train, test, judge=single, **settings), abs=1e-6)


@pytest.mark.slow
def test_realism_takes_features_of_the_task_network(tmp_path, capsys):
    train, test = class_arrays(60, 0), class_arrays(60, 1)
    flags = ["--synthetic", save(tmp_path / "a.npz", train), "--refined", save(tmp_path / "c.npz", train)]
    flags += ["--real", save(tmp_path / "v.npz", test), "--seeds", "1", "--steps", "2", "--device", "cpu", "--realism"]
    found = {}
    for name in ("random", "task"):
        out = tmp_path / f"{name}.json"
        assert main([*flags, "--features", name, "--json", str(out)]) == 0
        found[name] = json.loads(out.read_text())["realism"]
        assert found[name]["features"] == name
    assert "the hidden layer of a network trained on the synthetic set" in capsys.readouterr().out
    assert found["random"]["refined"]["kid"] != found["task"]["refined"]["kid"]
    assert found["random"]["refined"]["c2st"] == found["task"]["refined"]["c2st"]  # which uses no features
    assert main([*flags, "--features", str(tmp_path / "none.onnx")]) == 2
    assert "none.onnx" in (told := capsys.readouterr()).err and "task networks" not in told.err  # said before training


def test_the_set_with_true_labels_wins_and_the_api_is_the_command_module():
    train, test = class_arrays(200, 0), class_arrays(60, 1)
    wrong = train | {"label": np.roll(train["label"], 1)}
    result = fastsimgan.evaluate(wrong, train, test, seeds=2, steps=40, device="cpu")
    assert result["task"] == "class"
    assert result["rows"]["refined"]["accuracy"]["mean"] > 90 > result["rows"]["synthetic"]["accuracy"]["mean"]
    assert result["rows"]["constant"]["accuracy"]["mean"] < 60
    found = result["differences"]["synthetic"]
    assert found["low"] <= found["difference"] <= found["high"] and found["difference"] > 50
    assert "accuracy %" in table(result) and "refined above synthetic by +" in table(result)
    # the module that is also the command answers again after it was imported
    assert callable(fastsimgan.evaluate)


def test_one_seed_repeats_itself():
    train, test = class_arrays(60, 0), class_arrays(30, 1)
    first, second = (fastsimgan.evaluate(train, train, test, seeds=1, steps=5, device="cpu") for _ in range(2))
    assert first == second
    assert first["rows"]["synthetic"] == first["rows"]["refined"]  # the same set judged alike


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refined": {"pitch_yaw": np.zeros((4, 3), np.float32)}}, "pitch_yaw must be finite radians"),
        ({"refined": {"pitch_yaw": np.full((4, 2), 20, np.float32)}}, "radians within ±π, got 20"),
        ({"refined": {"pitch_yaw": None, "label": np.zeros(4, int)}}, "must carry the same label"),
        ({"refined": {"pitch_yaw": None}}, "must hold pitch_yaw or label"),
        ({"real": {"images": np.zeros((4, 25, 26), np.uint8)}}, r"must have the real images' size \[25, 26\]"),
        ({"synthetic": {"pitch_yaw": np.zeros((3, 2), np.float32)}}, "pitch_yaw must have length 4"),
    ],
)
def test_bad_arrays_are_one_line_and_exit_2(change, message, tmp_path, capsys):
    flags = []
    for name in ("synthetic", "refined", "real"):
        arrays = gaze_arrays(4, 0) | change.get(name, {})
        arrays = {key: value for key, value in arrays.items() if value is not None}
        flags += [f"--{name}", save(tmp_path / f"{name}.npz", arrays)]
    assert main([*flags, "--seeds", "1", "--steps", "1", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_missing_arguments_say_what_to_give(capsys):
    assert main([]) == 2
    assert "give --refiner RUN for the built-in eyes" in capsys.readouterr().err
    assert main(["--synthetic", "a.npz"]) == 2
    assert "give --synthetic, --real and one of" in capsys.readouterr().err


def test_each_image_of_the_judges_batch_has_its_own_frame():
    images = torch.rand(6, 1, 21, 31, generator=torch.Generator().manual_seed(0))
    still = _reframe(images, 0.0, 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)

    spot = torch.zeros(64, 1, 41, 61)
    spot[:, :, 15:26, 25:36] = 1  # its middle is the frame's
    moved = _reframe(spot, 3.0, 1.0, torch.Generator().manual_seed(1))
    rows, columns = torch.arange(41.0)[:, None], torch.arange(61.0)
    weight = moved.sum((1, 2, 3))
    down, right = (moved[:, 0] * rows).sum((1, 2)) / weight - 20, (moved[:, 0] * columns).sum((1, 2)) / weight - 30
    for offset in (down, right):  # up to 3 pixels each way, all of that range, and each image its own
        assert offset.abs().max() <= 3.01 and offset.min() < -2 and offset.max() > 2
        assert len(offset.round(decimals=2).unique()) > 32

    sizes = _reframe(spot, 0.0, 1.1, torch.Generator().manual_seed(1)).sum((1, 2, 3)) / 11**2
    assert 1 / 1.1**2 - 0.03 < sizes.min() < 0.9 and 1.12 < sizes.max() < 1.1**2 + 0.03
