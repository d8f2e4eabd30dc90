"""The best refiner of a run: which look is kept, and what --max-drift does."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError, TrainingError
from fastsimgan.metrics.features import random_features
from fastsimgan.metrics.realism import kernel_distance
from fastsimgan.storage.checkpoint import flatten, load_checkpoint
from fastsimgan.training import model_selection
from fastsimgan.training.batches import open_batches
from fastsimgan.training.loop import fit
from fastsimgan.training.model_selection import ModelSelector
from fastsimgan.training.state import Facts, StateDict, TrainingState
from tests.killed_runs import CONFIG, files

CPU = torch.device("cpu")


def quiet(_: str) -> None:
    pass


def bars(count: int, seed: int, top: int = 200) -> np.ndarray:
    """Images with an edge each, somewhere, so that a drift can be measured."""
    rng = np.random.default_rng(seed)
    at = rng.integers(8, 16, count)
    clean = np.where(np.arange(24)[None, None] < at[:, None, None], 40, top) * np.ones((1, 20, 1))
    return (clean + rng.normal(0, 4, clean.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def watched():
    """A state and its batches whose R is the identity: its images are as real as can be."""
    config = TrainConfig(batch_size=4, hidden_channels=20, blocks=1, history=8, device="cpu")
    batches = open_batches(bars(40, 0), bars(30, 1), config, CPU, quiet)
    return TrainingState(config, batches.image_shape, CPU, batches=batches), batches


def spoil(state, amount: float) -> None:
    with torch.no_grad():
        state.ema.last.bias += amount
    state.done["train"] += 1


def test_the_evaluation_with_the_lowest_distance_from_real_images_is_kept(watched):
    state, batches = watched
    spoil(state, 0.5)
    selector = ModelSelector(state)
    found = [selector.evaluate()]
    spoil(state, -0.5)  # the planted best
    expected = flatten("best", {name: value.clone() for name, value in state.ema.state_dict().items()})
    found.append(selector.evaluate())
    spoil(state, -0.4)
    found.append(selector.evaluate())
    assert found[1]["kid"] < min(found[0]["kid"], found[2]["kid"])
    assert state.best == {"step": 2, **found[1]} and not state.drifted
    saved = state.state_dict()
    tensors = {name: value for name, value in saved.tensors.items() if name.startswith("best.")}
    assert set(tensors) == set(expected) and all(torch.equal(tensors[name], expected[name]) for name in expected)

    facts = Facts(**json.loads(json.dumps(vars(saved.facts))))
    again = TrainingState(state.config, batches.image_shape, CPU, batches=batches)
    again.load_state_dict(StateDict(saved.tensors, facts))
    assert again.best == state.best and torch.equal(again.best_refiner.last.bias, state.best_refiner.last.bias)

    refined = load_like(state, tensors, batches)
    assert found[1]["kid"] == pytest.approx(kernel_distance(random_features(refined), random_features(bars(30, 1))))


def load_like(state, tensors, batches):
    state.ema.load_state_dict({name.removeprefix("best."): value for name, value in tensors.items()})
    refined = model_selection.Refiner.from_module(state.ema, batches.histogram, CPU)
    return refined(model_selection.some_synthetic(batches.arrays["synthetic"]))


def test_an_evaluation_takes_no_random_number(watched):
    state, batches = watched
    before = torch.get_rng_state(), batches.positions()
    ModelSelector(state).evaluate()
    assert torch.equal(torch.get_rng_state(), before[0]) and batches.positions() == before[1]


def scripted(monkeypatch, *drifts: float) -> None:
    """Have the looks find these drifts, one after the other."""
    coming = iter(drifts)
    real = model_selection.label_drift

    def drift(synthetic, refined):
        found = real(synthetic, refined)
        return found | {"pupil_found": 0.0, "edges_px": found["edges_px"] | {"median": next(coming, 0.0)}}

    monkeypatch.setattr(model_selection, "label_drift", drift)


def test_training_stops_beyond_the_limit_and_the_refiner_is_the_best_look_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripted(monkeypatch, 0.5, 1.0, 1.01)
    said: list[str] = []
    config = dataclasses.replace(CONFIG, steps=20, eval_every=2, max_drift=1.0)
    fit(bars(12, 0), bars(9, 1), config, log=said.append)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["drift_px"] == 1.01
    tensors, facts = load_checkpoint(tmp_path / "run/checkpoints/step-00000006")
    looks = {row["step"]: row["kid"] for row in rows if "kid" in row}
    best = min((2, 4), key=looks.__getitem__)
    assert facts["drifted"] and facts["best"]["step"] == best
    weights = load_file(tmp_path / "run/refiner.safetensors")
    assert weights and all(torch.equal(value, tensors[f"best.{name}"]) for name, value in weights.items())
    assert any("labels drift by more than --max-drift 1 px" in line for line in said)

    expected = files(tmp_path)
    fit(bars(12, 0), bars(9, 1), dataclasses.replace(config, resume=True), log=quiet)  # it is over: nothing is trained
    assert files(tmp_path) == expected


def test_the_last_iteration_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(bars(12, 0), bars(9, 1), CONFIG, log=quiet)  # 8 iterations, a picture every 3
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "kid" in row] == [3, 6, 8]


def test_a_first_look_beyond_the_limit_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripted(monkeypatch, 2.0)
    with pytest.raises(TrainingError, match=r"at most --max-drift 1\.5 px, got 2\.00 at the first look, iteration 3"):
        fit(bars(12, 0), bars(9, 1), dataclasses.replace(CONFIG, max_drift=1.5), log=quiet)
    with pytest.raises(InputError, match="--max-drift must be at least 0, got -1"):
        dataclasses.replace(CONFIG, max_drift=-1).validate()


def test_a_limit_needs_something_to_measure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat = np.full((12, 20, 24), 90, np.uint8)
    with pytest.raises(TrainingError, match="needs edges to measure by"):
        fit(flat, bars(9, 1), dataclasses.replace(CONFIG, max_drift=1.0), log=quiet)
