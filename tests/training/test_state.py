"""The one owner of what training restores."""

from __future__ import annotations

import numpy as np
import torch

from fastsimgan.config import TrainConfig
from fastsimgan.training.batches import open_batches
from fastsimgan.training.model_selection import ModelSelector
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import StateDict, TrainingState

CPU = torch.device("cpu")
CONFIG = TrainConfig(hidden_channels=20, blocks=1, batch_size=4, history=10, steps=20, k_g_max=3, device="cpu")


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 20), dtype=np.uint8)


def make(precision: str = "float32") -> TrainingState:
    batches = open_batches(images(12, 0), images(9, 1), CONFIG, CPU, lambda _: None)
    return TrainingState(CONFIG, batches.image_shape, CPU, precision=precision, batches=batches)


def go_on(state: TrainingState, count: int) -> None:
    algorithm = SimGAN(state)
    for _ in range(count):
        metrics = algorithm.iteration(state.batches.draw_synthetic, state.batches.draw_real)
        algorithm.adapt(float(metrics["accuracy_real"]))


def assert_equal(one: StateDict, other: StateDict) -> None:
    assert one.facts == other.facts and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_a_state_taken_over_goes_on_as_the_one_it_was_taken_from() -> None:
    """Nothing else decides about what comes next."""
    first, second = make("float16"), make("float16")
    go_on(first, 3)
    ModelSelector(first).evaluate()
    saved = first.state_dict().clone()
    go_on(first, 12)  # the first of them overflow, and their steps are left out
    assert not torch.equal(saved.tensors["refiner.last.weight"], first.state_dict().tensors["refiner.last.weight"])
    go_on(second, 7)
    second.reorder(attempt=2)
    second.load_state_dict(saved)
    assert_equal(second.state_dict(), saved)
    go_on(second, 12)
    assert_equal(second.state_dict(), first.state_dict())


def test_a_copy_is_equal_and_shares_no_memory() -> None:
    state = make()
    go_on(state, 2)
    before = state.state_dict().clone()
    copied = state.copy()
    assert_equal(copied.state_dict(), before)
    own, others = ({t.data_ptr() for t in each.state_dict().tensors.values()} for each in (state, copied))
    assert not own & others
    go_on(copied, 2)
    assert {**vars(state.state_dict().facts), "positions": 0} == {**vars(before.facts), "positions": 0}
    tensors = state.state_dict().tensors
    assert all(torch.equal(value, tensors[name]) for name, value in before.tensors.items())
