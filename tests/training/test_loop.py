"""The run: what it writes, exact resume, guard rails, and refusals that write nothing."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastsimgan
from fastsimgan.config import PRESETS, TrainConfig, preset
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.storage.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from fastsimgan.train import main
from fastsimgan.training.loop import fit
from fastsimgan.training.monitor import WINDOW, TrainingMonitor

SMALL = {
    "hidden_channels": 20,
    "blocks": 1,
    "batch_size": 4,
    "history": 6,
    "pretrain_discriminator": 2,
    "device": "cpu",
}


def images(count: int, seed: int, size=(16, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


@pytest.fixture
def pair():
    return images(12, 0), images(9, 1)


def quiet(_: str) -> None:
    pass


def test_a_run_writes_what_it_says(pair, tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(**SMALL, out=out, steps=4, eval_every=2, checkpoint_every=2, keep=1)
    said: list[str] = []
    refiner = fit(*pair, config, log=said.append)
    assert said[-1].startswith("label drift: ") and said[-1].endswith(f"; of {len(pair[0])} images")
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "refiner.safetensors", "best.safetensors", "contact_sheet.png", "pictures",
        "checkpoints",
    }  # fmt: skip
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000004"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["pretrain_discriminator"] * 2 + ["train"] * 4
    refined = refiner(pair[0])
    assert refined.shape == pair[0].shape and refined.dtype == np.uint8
    loaded = fastsimgan.load_refiner(out)
    assert np.array_equal(loaded(pair[0]), refined) and len(loaded.sha256) == 64
    assert TrainConfig.from_json((out / "config.json").read_text()) == config


@pytest.mark.parametrize("interrupted_at", [2, 3])
def test_resume_ends_exactly_where_an_uninterrupted_run_does(pair, tmp_path, monkeypatch, interrupted_at):
    whole = TrainConfig(**SMALL, out=tmp_path / "whole", steps=6, eval_every=3, checkpoint_every=2)
    fit(*pair, whole, log=quiet)

    class Stop(Exception):
        pass

    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    watch = TrainingMonitor.watch

    def stop(self, step, metrics):
        watch(self, step, metrics)
        if step > interrupted_at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(TrainingMonitor, "watch", stop)
        with pytest.raises(Stop):
            fit(*pair, broken, log=quiet)
    fit(*pair, dataclasses.replace(broken, resume=True), log=quiet)
    first, facts = load_checkpoint(tmp_path / "whole/checkpoints/step-00000006")
    second, facts2 = load_checkpoint(tmp_path / "broken/checkpoints/step-00000006")
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    assert facts == facts2  # the sha256 of the tensors included

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(pair, tmp_path):
    config = TrainConfig(**SMALL, out=tmp_path / "run", steps=4, eval_every=4, checkpoint_every=2)
    fit(*pair, config, log=quiet)
    newest = tmp_path / "run/checkpoints/step-00000004/state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    said: list[str] = []
    fit(*pair, dataclasses.replace(config, resume=True), log=said.append)
    assert any("passed over" in line and "sha256" in line for line in said)
    assert any("after iteration 2" in line for line in said)
    newest.write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint"):
        (tmp_path / "run/checkpoints/step-00000002/state.safetensors").unlink()
        newest_checkpoint(tmp_path / "run/checkpoints")


def test_resume_refuses_other_data_and_other_settings(pair, tmp_path, capsys):
    for name, array in zip(("a", "b"), pair, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    flags = ["--synthetic", str(tmp_path / "a.npy"), "--real", str(tmp_path / "b.npy"), "--out", str(tmp_path / "run")]
    small = [
        "--hidden-channels",
        "20",
        "--blocks",
        "1",
        "--batch-size",
        "4",
        "--pretrain-discriminator",
        "1",
        "--steps",
        "2",
    ]
    assert main([*flags, *small, "--history", "6", "--device", "cpu"]) == 0
    assert main(["--out", str(tmp_path / "run"), "--resume", "--lambda", "9"]) == 2
    assert "--lambda must stay" in capsys.readouterr().err
    np.save(tmp_path / "b.npy", images(9, 7))
    assert main(["--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "--real must be the images that" in capsys.readouterr().err


def test_checkpoint_is_complete_or_absent(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "step-1", {"a": torch.zeros(2)}, {}, keep=5)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, "step-2", {"a": torch.ones(2)}, {}, keep=5)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1"]
    save_checkpoint(tmp_path, "step-2", {"a": torch.ones(2)}, {}, keep=5)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_checkpoint_of_a_stop_goes_with_the_next_and_takes_no_other_place(tmp_path):
    def there(name: str) -> list[str]:
        save_checkpoint(tmp_path, name, {}, {}, keep=2)
        return [path.name for path in list_checkpoints(tmp_path)]

    assert there("step-1") == ["step-1"]
    assert there("step-1-stopped") == ["step-1", "step-1-stopped"]
    assert there("step-2") == ["step-1", "step-2"]
    assert there("step-3-stopped") == ["step-1", "step-2", "step-3-stopped"]
    assert there("step-4-stopped") == ["step-1", "step-2", "step-4-stopped"]
    assert there("step-5") == ["step-2", "step-5"]


def test_not_finite_stops_and_names_the_number(pair, tmp_path):
    config = TrainConfig(**SMALL, out=tmp_path / "run", steps=4, lam=1e38, learning_rate_refiner=0.9)
    with pytest.raises(TrainingError, match="must be finite.*step"):
        fit(*pair, dataclasses.replace(config, lam=3e38), log=quiet)


def test_guard_rails_speak_once_a_stay():
    said: list[str] = []
    guard = TrainingMonitor(said.append)
    good = {"accuracy_refined": 0.7, "accuracy_real": 0.7, "change": 10.0}
    for step in range(WINDOW * 2):
        guard.watch(step, good)
    assert said == []
    for step in range(WINDOW * 2):
        guard.watch(step, good | {"change": 0.2})
    assert len(said) == 1 and "does almost nothing" in said[0] and "--lambda" in said[0]
    for step in range(WINDOW * 2):
        guard.watch(step, {"accuracy_refined": 1.0, "accuracy_real": 1.0, "change": 90.0})
    assert len(said) == 3
    for step in range(WINDOW * 2):
        guard.watch(step, good | {"accuracy_refined": 0.5, "accuracy_real": 0.5})
    assert len(said) == 4 and "cannot tell" in said[3]


def test_equalised_real_images_make_the_synthetic_ones_equalised(tmp_path):
    from fastsimgan.data.equalisation import equalise

    plain = (images(12, 0) // 4 + 60).astype(np.uint8)
    equal = equalise(torch.from_numpy(images(9, 1) // 3)[:, None])[:, 0].numpy()
    said: list[str] = []
    refiner = fit(plain, equal, TrainConfig(**SMALL, out=tmp_path / "r", dry_run=True), log=said.append)
    assert refiner.settings["histogram"] == "equalise" and "equalised" in said[0]
    refiner = fit(equal, equal, TrainConfig(**SMALL, out=tmp_path / "r", dry_run=True), log=quiet)
    assert refiner.settings["histogram"] == "keep"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "7"], "--batch-size must be even .*got 7"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--history", "3"], r"--history must be 0 or at least half the batch size \(8\), got 3"),
        (["--lambda", "-1"], "--lambda must be at least 0, got -1"),
        (["--ema", "1"], "--ema must be .*got 1"),
        (["--learning-rate-refiner", "2"], "--learning-rate-refiner must be between 0 and 1, got 2"),
        (["--synthetic", "x.npy"], "--synthetic needs --real"),
        (["--real", "x.npy"], "--real needs --synthetic"),
        (["--synthetic", "nowhere", "--real", "nowhere"], "nowhere: must exist"),
        (["--resume"], "--resume needs the folder of an earlier run"),
        (["--device", "tpu"], 'device must be "auto", "cpu" or "cuda", got'),
    ],
)
def test_bad_settings_are_one_line_exit_2_and_nothing_written(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--batch-size", "16"] if "--batch-size" not in flags else flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_starts_at_the_identity_at_any_width(channels, tmp_path):
    synthetic, real = images(8, 0, (16, 20, channels)), images(6, 1, (16, 20, channels))
    said: list[str] = []
    config = TrainConfig(
        **{**SMALL, "hidden_channels": 8}, out=tmp_path / "r", dry_run=True, learning_rate_refiner=1e-30
    )
    assert np.array_equal(fit(synthetic, real, config, log=said.append)(synthetic), synthetic)
    assert not any("warning" in line for line in said)


def test_a_misspelt_flag_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--stpes", "5"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_channels_of_both_sides_must_agree(pair, tmp_path):
    with pytest.raises(InputError, match="one number of channels, got 1 and 3"):
        fit(pair[0], images(4, 0, (16, 20, 3)), TrainConfig(**SMALL, out=tmp_path / "r"), log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(pair, tmp_path):
    with pytest.raises(InputError, match="--out must not exist yet"):
        fit(*pair, TrainConfig(**SMALL, out=tmp_path, steps=1), log=quiet)


def test_every_preset_is_valid():
    for name in PRESETS:
        preset(name).validate()
    assert preset("paper").batch_size == 512 and preset("paper").pretrain_refiner == 1000


def test_the_papers_presets_have_the_papers_network_and_its_steps_of_r_alone():
    for name, steps in (("paper", 1000), ("hand", 500)):
        assert (preset(name).computes, preset(name).pretrain_refiner) == ("image", steps)
    assert preset("gaze").computes == preset("quick").computes == TrainConfig().computes == "change"


def test_config_of_a_run_begun_before_computes():
    """The paper's presets go on; a run whose R carries the image in its features does not."""
    older = json.loads(preset("paper").to_json())
    del older["computes"]
    assert TrainConfig.from_json(json.dumps(older | {"identity_init": False})) == preset("paper")
    with pytest.raises(
        InputError, match="config must be of a run begun by this version, .* finish it with the version"
    ):
        TrainConfig.from_json(json.dumps(older | {"identity_init": True}))


def test_config_refuses_unknown_names():
    with pytest.raises(InputError, match="unknown settings: colours"):
        TrainConfig.from_json('{"colours": 1}')


def test_sampler_is_a_function_of_seed_and_position():
    sampler = Sampler(10, seed=3)
    drawn = torch.cat([sampler.draw(4) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    late = Sampler(10, seed=3)
    late.position = 8
    assert torch.equal(late.draw(12), drawn[8:])
    assert not torch.equal(Sampler(10, seed=4).draw(10), drawn[:10])


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fastsimgan, fastsimgan.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
