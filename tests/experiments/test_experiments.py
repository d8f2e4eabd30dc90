"""The gaze experiment whole, in a few steps, and its report."""

import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest

from fastsimgan.config import PRESETS
from fastsimgan.data.simulators.eyes import simulate_eyes
from fastsimgan.data.simulators.hands import simulate_hands
from fastsimgan.experiments import ablation, ablation_measures, ablation_tasks, gaze, hand
from fastsimgan.experiments.__main__ import main
from fastsimgan.metrics import two_sample
from fastsimgan.reporting.html_report import Report
from fastsimgan.storage.checkpoint import list_checkpoints


class Links(HTMLParser):
    """What a page would load or run, and the tags it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaze")
    names = {"synthetic": (80, "synthetic"), "real": (40, "stand_in_real"), "validation": (30, "stand_in_real")}
    given = ["gaze", "--out", str(folder / "out"), "--seeds", "2", "--steps", "2", "--judge-steps", "2"]
    for seed, (name, (count, population)) in enumerate(names.items()):
        eyes = simulate_eyes(count, seed, population=population)
        np.savez(folder / f"{name}.npz", images=eyes["images"][:, 5:29, 14:40], pitch_yaw=eyes["pitch_yaw"])
        given += [f"--{name}", str(folder / f"{name}.npz")]
    return folder, [*given, "--device", "cpu"]


@pytest.mark.slow
def test_a_whole_experiment_resumes_and_refuses_other_data(flags, capsys, monkeypatch):
    small = {"pretrain_discriminator": 1, "batch_size": 4, "hidden_channels": 20}
    # a rate at which few steps show
    monkeypatch.setitem(PRESETS, "gaze", small | {"learning_rate_refiner": 0.02, "warm_up": 0})
    monkeypatch.setattr(gaze, "REFINERS", 2)
    folder, given = flags
    out = folder / "out"
    assert main(given) == 0
    numbers = json.loads((out / "report.json").read_text())
    assert set(numbers["comparison"]["rows"]) == {
        "constant", "synthetic", "equalised", "refined", "refined ×2", "refined ×2 equalised",
        "supervised"
    }  # fmt: skip
    assert numbers["counts"] == {"synthetic": 80, "real": 40, "validation": 30} and numbers["drift"]["images"] == 80
    page = (out / "report.html").read_text()
    links = Links(page)
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    assert "svg" in links.tags and "script" not in links.tags and str(out) in page

    refined = [np.load(out / f"refined-{seed}.npy") for seed in range(2)]
    assert (refined[0] != refined[1]).any()  # two refiners, not one twice

    # a kill after training: pieces that are there stay, what is missing is made again and is the same
    before = (out / "refined-1.npy").stat().st_mtime_ns
    old = (out / "refined-0.npy").read_bytes()
    kept = (out / "predicted-refined-x2-1.npy").stat().st_mtime_ns
    for name in ("refined-0.npy", "predicted-refined-0.npy", "comparison.json", "report.json", "report.html"):
        (out / name).unlink()
    assert main(given) == 0
    assert json.loads((out / "report.json").read_text()) == numbers
    assert (out / "refined-0.npy").read_bytes() == old and (out / "refined-1.npy").stat().st_mtime_ns == before
    assert (out / "predicted-refined-x2-1.npy").stat().st_mtime_ns == kept

    # a kill in training: the run's folder has a refiner already, which is not what training ends with
    shutil.rmtree(list_checkpoints(out / "refiner-0/checkpoints")[-1])
    shutil.copy(out / "refiner-1/refiner.safetensors", out / "refiner-0/refiner.safetensors")
    (out / "refined-0.npy").unlink()
    assert main(given) == 0
    assert (out / "refined-0.npy").read_bytes() == old

    capsys.readouterr()
    assert main([*given[:6], "3", *given[7:]]) == 2
    assert "holds an experiment with another training" in capsys.readouterr().err
    assert (out / "report.html").read_text() == page


def test_bad_arguments_are_one_line_and_exit_2(flags, tmp_path, capsys):
    folder, given = flags
    real = str(folder / "real.npz")
    for wrong, message in (
        (["pose"], "must be one of gaze, hand, ablation-local, ablation-history, got 'pose'"),
        (["gaze", "--out", str(tmp_path / "a"), "--real", real], "give --synthetic, --real and --validation"),
        (["gaze", "--out", str(tmp_path / "a"), "--seeds", "0"], "--seeds must be at least 1, got 0"),
        ([*given, "--out", str(tmp_path / "a"), "--validation", real], "must not be the file given as --real"),
        ([*given, "--out", str(folder)], "must be new, empty, or a folder that this experiment began"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "a").exists()


def test_the_report_escapes_every_text_and_its_curve_is_in_place():
    bad = "<img src=x onerror=alert(1)>\"'&"
    report = Report(bad)
    report.heading(bad)
    report.paragraph(bad)
    report.table([bad, bad], [[bad, bad]])
    report.picture(b"\x89PNG", bad)
    report.curves({bad: (np.array([0.0, 10.0]), np.array([0.0, 100.0]))}, bad, bad, bad)
    links = Links(report.html())
    assert links.sources == ["data:image/png;base64,iVBORw=="]  # its own picture, and none of the text's
    page = report.html()
    axes = re.search(r'id="patch_2">\s*<path d="M (\S+) (\S+) \s*L (\S+) (\S+) \s*L (\S+) (\S+)', page)
    curve = re.search(
        r'<path d="M (\S+) (\S+) \s*L (\S+) (\S+) \s*"[^>]*style="fill: none; stroke: #888888; stroke-width', page
    )
    assert axes and curve and curve.groups() == (*axes.groups()[:2], *axes.groups()[4:])  # from corner to corner
    again = Report(bad)
    again.curves({bad: (np.array([0.0, 10.0]), np.array([0.0, 100.0]))}, bad, bad, bad)
    assert again.html().split("<svg")[1] == page.split("<svg")[1]  # the same curves, the same bytes
    with pytest.raises(ValueError, match="finite"):
        report.curves({"a": (np.array([np.nan]), np.array([0.0]))}, "", "", "")


def test_a_whole_hand_experiment_resumes_network_by_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hand, "QUICK_SIZE", 32)
    monkeypatch.setattr(hand, "QUICK_BUILTIN", {"synthetic": 24, "real": 16, "validation": 10})
    monkeypatch.setattr(
        hand,
        "QUICK_TRAINING",
        {"pretrain_discriminator": 1, "batch_size": 4, "hidden_channels": 8, "computes": "image"},
    )
    monkeypatch.setattr(hand, "QUICK_JUDGE", {"batch_size": 4, "features": 8, "depth": 2, "stride": 2})
    out = tmp_path / "out"
    given = ["hand", "--out", str(out), "--quick", "--seeds", "2", "--steps", "2", "--judge-steps", "2"]
    given += ["--device", "cpu"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((out / "report.json").read_text())
    rows = numbers["comparison"]["rows"]
    assert set(rows) == {"constant", "synthetic", "refined", "real"} and "refined above synthetic by" in printed
    assert "refiner: noise" in printed and "stand-in sensor: noise" in printed
    assert numbers["comparison"]["pixel"] == 32 / 224
    assert all(0 <= row["within_5px"]["mean"] <= 100 and row["mean_px"]["mean"] > 0 for row in rows.values())
    page = (out / "report.html").read_text()
    assert "Fig. 12" in page and all(source.startswith("data:image/png") for source in Links(page).sources)

    kept = {name: (out / name).stat().st_mtime_ns for name in ("joints-real-1.npy", "refined-0.npy")}
    again = (out / "joints-synthetic-0.npy").read_bytes()
    (out / "joints-synthetic-0.npy").unlink()
    assert main(given) == 0
    assert json.loads((out / "report.json").read_text()) == numbers
    assert (out / "joints-synthetic-0.npy").read_bytes() == again
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}


def test_three_times_the_data_is_all_cameras_or_all_of_the_set():
    images, joints = np.arange(7)[:, None, None], np.zeros((7, 14, 2))
    given = {"synthetic": {"images": images}, "real": {"images": images}}
    sets = hand._sets(given, {"synthetic": joints}, images + 10, quick=False)
    assert {name: part[0][:, 0, 0].tolist() for name, part in sets.items()} == {
        "synthetic": [0, 1, 2], "refined": [10, 11, 12],
        "synthetic ×3": [0, 1, 2, 3, 4, 5, 6], "refined ×3": [10, 11, 12, 13, 14, 15, 16],
    }  # fmt: skip
    given["synthetic"]["camera"] = np.array([2, 1, 3, 2, 1, 3, 1])
    sets = hand._sets(given, {"synthetic": joints, "real": joints}, images + 10, quick=False)
    assert sets["refined"][0][:, 0, 0].tolist() == [11, 14, 16] and len(sets["refined"][1]) == 3
    assert "real" in sets and len(sets["refined ×3"][0]) == 7


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        (None, "synthetic: must hold joints, got images"),
        (np.zeros((4, 36), np.float32), "synthetic: joints must be finite pixels"),
        (np.full((4, 36, 2), np.nan, np.float32), "synthetic: joints must be finite pixels"),
        (np.zeros((4, 9, 2), np.float32), "real: must have as many joints as the synthetic set (9), got 14"),
    ],
)
def test_hands_without_proper_joints_are_refused(tmp_path, capsys, joints, message):
    given = ["hand", "--out", str(tmp_path / "out")]
    for seed, name in enumerate(("synthetic", "real", "validation")):
        part = simulate_hands(4, seed, height=16, width=16)
        part = {"images": part["images"], "joints": joints if name == "synthetic" else part["joints"]}
        np.savez(tmp_path / f"{name}.npz", **{key: value for key, value in part.items() if value is not None})
        given += [f"--{name}", str(tmp_path / f"{name}.npz")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["eyes", "hands"])
def test_a_whole_ablation_resumes_piece_by_piece(data, flags, tmp_path, monkeypatch, capsys):
    small = {"pretrain_discriminator": 1, "batch_size": 4, "hidden_channels": 20, "learning_rate_refiner": 0.02}
    monkeypatch.setitem(PRESETS, "gaze", small)
    monkeypatch.setattr(hand, "QUICK_SIZE", 32)
    monkeypatch.setattr(hand, "QUICK_BUILTIN", {"synthetic": 42, "real": 40, "validation": 6})
    monkeypatch.setattr(hand, "QUICK_TRAINING", small)
    monkeypatch.setattr(hand, "QUICK_JUDGE", {"batch_size": 4, "features": 8, "depth": 2, "stride": 2})
    monkeypatch.setattr(ablation, "HELD_OUT", 2)
    monkeypatch.setattr(two_sample, "patch_test", partial(two_sample.patch_test, steps=3))
    name, out = ("ablation-local", tmp_path / "out") if data == "eyes" else ("ablation-history", tmp_path / "out")
    given = [name, "--out", str(out), "--data", data, "--seeds", "2", "--steps", "4", "--judge-steps", "2"]
    given += ["--device", "cpu", *(flags[1][9:15] if data == "eyes" else ["--quick"])]
    assert main(given) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((out / "report.json").read_text())
    whole, without = ("local", "global") if data == "eyes" else ("history", "no history")
    assert list(numbers["rows"]) == ["synthetic", whole, without]
    assert all(len(row["kid"]["each"]) == 2 and 0 <= row["patches"]["mean"] <= 100 for row in numbers["rows"].values())
    assert numbers["rows"]["synthetic"]["drift_px"] is None and numbers["rows"][whole]["loss_spread"]["mean"] >= 0
    trained = numbers["training"]
    if data == "eyes":  # 24x26 pixels: 6x7 patches of D
        assert trained["local"]["local"] and not trained["global"]["local"]
        assert trained["global"]["lam"] == pytest.approx(trained["local"]["lam"] / 42)
    else:
        assert trained["history"]["history"] > 0 and trained["no history"]["history"] == 0
    images = {each: np.load(out / f"refined-{each}-0.npy") for each in (whole, without.replace(" ", "-"))}
    assert (images[whole] != images[without.replace(" ", "-")]).any()
    assert "better" in printed and len(numbers["findings"]) >= 5
    page = (out / "report.html").read_text()
    assert all(source.startswith("data:image/png") for source in Links(page).sources) and "svg" in Links(page).tags

    if data == "hands":
        return
    kept = (out / f"measured-{whole}-1.json").stat().st_mtime_ns
    (out / f"measured-{whole}-0.json").unlink()
    (out / "report.json").unlink()
    assert main(given) == 0
    assert json.loads((out / "report.json").read_text()) == numbers
    assert (out / f"measured-{whole}-1.json").stat().st_mtime_ns == kept


def test_findings_say_which_way_round():
    def row(*each):
        return {"mean": float(np.mean(each)), "each": each}

    measures = {key: ablation_measures.MEASURES[key] for key in ("kid", "detail", "drift_px", "patches", "loss_spread")}
    whole = {"kid": row(0.1, 0.11), "detail": row(1.0, 1.0), "drift_px": row(2.0, 2.01), "patches": row(60, 80)}
    without = {"kid": row(0.2, 0.21), "detail": row(3.0, 3.0), "drift_px": row(1.0, 1.01), "patches": row(65, 78)}
    rows = {"local": whole | {"loss_spread": None}, "global": without | {"loss_spread": None}}
    kid, drift, patches = ablation_measures.findings(rows, measures, ablation_tasks.ABLATIONS["ablation-local"])
    assert kid.endswith("Local is better, as in the paper's Fig. 8.") and "-0.1000" in kid
    assert drift.endswith("Global is better: the other way round than the paper's Fig. 8.")
    assert patches.endswith("No difference shown.")
