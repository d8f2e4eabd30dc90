"""Algorithm 1: what each update changes, and what it must not (paper §2, and the mistakes public ports make)."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastsimgan.config import TrainConfig
from fastsimgan.training.objectives import discriminator_objective, refiner_objective
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import StateDict, TrainingState

SHAPE = (1, 16, 20)


def make(**settings) -> SimGAN:
    defaults = {"hidden_channels": 20, "blocks": 1, "batch_size": 4, "history": 8, "steps": 10}
    return SimGAN(TrainingState(TrainConfig(**(defaults | settings)), SHAPE, torch.device("cpu")))


def draw(count: int) -> Tensor:
    return torch.rand(count, *SHAPE) * 2 - 1


def weights(module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(before, module) -> bool:
    return any(not torch.equal(b, p) for b, p in zip(before, module.parameters(), strict=True))


def test_each_update_trains_its_own_network_and_holds_the_other_fixed():
    trainer = make()
    refiner, discriminator = weights(trainer.state.refiner), weights(trainer.state.discriminator)
    trainer.update_refiner(draw(4))
    assert changed(refiner, trainer.state.refiner) and not changed(discriminator, trainer.state.discriminator)
    refiner = weights(trainer.state.refiner)
    trainer.update_discriminator(draw, draw)
    assert changed(discriminator, trainer.state.discriminator) and not changed(refiner, trainer.state.refiner)


def test_discriminator_goes_on_training_in_every_iteration():
    """Mistake 3: D frozen once for R's step and left frozen."""
    trainer = make()
    for _ in range(3):
        before = weights(trainer.state.discriminator)
        trainer.iteration(draw, draw)
        assert changed(before, trainer.state.discriminator)
        assert all(p.requires_grad for p in trainer.state.discriminator.parameters())


def test_adversarial_gradient_reaches_the_refiner():
    """Mistake 4: with lambda 0 the only gradient is D's, and it must arrive."""
    trainer = make()
    loss, _ = refiner_objective(trainer.state.refiner, trainer.state.discriminator, draw(4), lam=0.0, psi="identity")
    loss.loss.backward()
    assert all(p.grad is not None for p in trainer.state.refiner.parameters())
    assert trainer.state.refiner.last.weight.grad.abs().max() > 0


def test_no_weight_gradient_of_d_in_the_refiners_step():
    trainer = make()
    trainer.update_refiner(draw(4))
    assert all(p.grad is None for p in trainer.state.discriminator.parameters())


def test_discriminators_step_does_not_run_back_through_the_refiner():
    """Mistake 4, second half: D's step must not touch R's gradients, and refuses images that carry one."""
    trainer = make()
    trainer.update_discriminator(draw, draw)
    assert all(p.grad is None for p in trainer.state.refiner.parameters())
    with pytest.raises(AssertionError, match="must not carry a gradient"):
        discriminator_objective(trainer.state.discriminator, trainer.state.refiner(draw(2)), draw(2))


def test_half_of_the_discriminators_refined_images_come_from_the_history(monkeypatch):
    """§2.3, mistake 1: fresh ones are stored, and older ones come back out and are shown to D."""
    trainer = make(history=64)
    seen: list[Tensor] = []
    stored: list[Tensor] = []
    swap = trainer.state.history.swap

    def watched_swap(fresh):
        stored.append(fresh.clone())
        return swap(fresh)

    monkeypatch.setattr(trainer.state.history, "swap", watched_swap)
    forward = trainer.state.discriminator.forward
    monkeypatch.setattr(
        trainer.state.discriminator, "forward", lambda images: (seen.append(images), forward(images))[1]
    )
    for _ in range(12):
        trainer.update_discriminator(draw, draw)
    assert len(trainer.state.history) == 24
    assert all(images.shape[0] == 8 for images in seen)  # 2 fresh + 2 from the history + 4 real
    older = torch.cat(stored[:-1])
    from_history = torch.cat([images[2:4] for images in seen[6:]])
    distance = torch.cdist(from_history.flatten(1), older.flatten(1), p=float("inf")).amin(1)
    assert (distance <= 1 / 127.5).all()  # kept as uint8
    current = torch.cdist(seen[-1][2:4].flatten(1), stored[-1].flatten(1), p=float("inf")).amin(1)
    assert (current > 1 / 127.5).any()  # not all just stored


def test_without_history_all_refined_images_are_current():
    trainer = make(history=0)
    assert trainer.state.history is None
    trainer.iteration(draw, draw)
    assert trainer.state.step == 1


@pytest.mark.parametrize(("k_g", "k_d"), [(1, 1), (3, 1), (1, 2)])
def test_an_iteration_is_k_g_and_k_d_updates_on_fresh_batches(k_g, k_d):
    trainer = make(k_g=k_g, k_d=k_d)
    counts = {"synthetic": [], "real": []}

    def counting(name):
        return lambda count: (counts[name].append(count), draw(count))[1]

    trainer.iteration(counting("synthetic"), counting("real"))
    assert counts["synthetic"] == [4] * k_g + [2] * k_d
    assert counts["real"] == [4] * k_d


def test_lambda_does_not_depend_on_the_batch_size():
    """Mistake 6: a batch that repeats its images has the same loss and the same gradients."""
    trainer = make()
    images = draw(4)
    gradients = []
    for batch in (images, images.repeat(3, 1, 1, 1)):
        trainer.state.refiner.zero_grad()
        loss, _ = refiner_objective(trainer.state.refiner, trainer.state.discriminator, batch, lam=0.3, psi="identity")
        loss.loss.backward()
        gradients.append((loss.loss.detach(), trainer.state.refiner.last.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_refined_accuracy_is_of_the_refined_batch():
    """Mistake 9: a D that calls everything refined is right on all refined patches and on no real one."""
    trainer = make(learning_rate_discriminator=1e-9)
    with torch.no_grad():
        trainer.state.discriminator.layers[-1].weight.zero_()
        trainer.state.discriminator.layers[-1].bias.copy_(torch.tensor([-5.0, 5.0]))
    metrics = trainer.update_discriminator(draw, draw)
    assert metrics["accuracy_refined"] == 1 and metrics["accuracy_real"] == 0


def test_the_moving_average_follows_the_refiner():
    trainer = make(ema=0.5)
    before = weights(trainer.state.ema)
    for _ in range(3):
        trainer.iteration(draw, draw)
    assert changed(before, trainer.state.ema)
    assert not any(p.requires_grad for p in trainer.state.ema.parameters())


def test_state_holds_everything_that_an_iteration_reads():
    """Mistake 8: two trainers with one state go on alike; each part left out makes them differ."""

    def run(trainer, steps):
        for step in range(steps):
            torch.manual_seed(1000 + trainer.state.step + step)
            trainer.iteration(draw, draw)

    first = make()
    run(first, 6)
    saved = first.state.state_dict().clone().tensors
    torch.manual_seed(1)
    batches = [draw(4) for _ in range(24)]

    def go_on(state):
        trainer = make(seed=5)
        own = trainer.state.state_dict()
        facts = dataclasses.replace(own.facts, done=first.state.done)
        trainer.state.load_state_dict(StateDict(own.tensors | state, facts))
        supply = iter(batches)
        for _ in range(4):
            trainer.iteration(lambda n: next(supply)[:n], lambda n: next(supply)[:n])
        return trainer.state.state_dict().tensors

    whole, again = go_on(saved), go_on(saved)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    for part in ("refiner", "discriminator", "average", "refiner_optimiser", "discriminator_optimiser", "history"):
        less = {name: value for name, value in saved.items() if not name.startswith(part + ".")}
        if part.endswith("optimiser"):  # a fresh trainer has no optimiser state to fall back on: give it zeros
            less |= {name: torch.zeros_like(value) for name, value in saved.items() if name.startswith(part + ".")}
        partial = go_on(less)
        assert any(not torch.equal(value, partial[name]) for name, value in whole.items()), part


def images_after(count: int, **settings) -> SimGAN:
    """A trainer after iterations whose draws do not depend on how they are used."""
    trainer = make(pretrain_refiner=1, pretrain_discriminator=1, warm_up=0, **settings)
    generator = torch.Generator().manual_seed(0)

    def same(images: int) -> Tensor:
        return torch.rand(images, *SHAPE, generator=generator) * 2 - 1

    for _ in range(count):
        trainer.advance(same, same)
    return trainer


@pytest.mark.parametrize(("batch", "parts", "history"), [(4, 2, 8), (8, 8, 0), (8, 4, 16)])
def test_a_batch_in_parts_is_the_same_update(batch, parts, history):
    """All three kinds of step; the last parts of a batch count as much as the first."""
    whole = images_after(6, batch_size=batch, history=history)
    split = images_after(6, batch_size=batch, history=history, accumulate=parts)
    for one, other in (
        (whole.state.refiner, split.state.refiner),
        (whole.state.discriminator, split.state.discriminator),
    ):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-5)  # a twelfth of one of D's steps
    metrics = [
        trainer.update_refiner(torch.linspace(-1, 1, batch * 320).view(batch, *SHAPE)) for trainer in (whole, split)
    ]
    assert list(metrics[0]) == list(metrics[1])
    for name, value in metrics[0].items():
        torch.testing.assert_close(value, metrics[1][name], rtol=1e-3, atol=1e-5)


def test_no_more_than_a_part_of_the_batch_is_in_the_networks_at_a_time(monkeypatch):
    trainer = make(batch_size=8, accumulate=4)
    seen: dict[str, list[int]] = {"refiner": [], "discriminator": []}
    for name, sizes in seen.items():
        network = getattr(trainer.state, name)
        forward = network.forward
        monkeypatch.setattr(
            network, "forward", lambda x, sizes=sizes, forward=forward: (sizes.append(len(x)), forward(x))[1]
        )
    trainer.iteration(draw, draw)
    assert seen["refiner"] == [2] * 4 + [1] * 4  # R's step, then the fresh half for D
    assert seen["discriminator"] == [2] * 4 + [4] * 4  # in D's step refined and real together


def test_recomputed_activations_give_the_same_bits_and_are_not_kept():
    plain, frugal = (images_after(5, recompute=recompute, blocks=3) for recompute in (False, True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state.refiner.parameters(), frugal.state.refiner.parameters(), strict=True)
    )

    def kept(trainer: SimGAN) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            trainer.state.refiner(draw(4))
        return sum(sizes)

    assert kept(frugal) < 0.6 * kept(plain)
