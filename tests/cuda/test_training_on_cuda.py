"""Training on CUDA, graphed or not, is training on the CPU: same losses, checkpoints, and ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastsimgan.config import TrainConfig
from fastsimgan.data.equalisation import equalise
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import UnavailableError
from fastsimgan.hardware.device import current
from fastsimgan.ops import _extension
from fastsimgan.ops.residual_block_race import RaceResult
from fastsimgan.training import compilation, graphed_iterations, simgan
from fastsimgan.training.batches import TrainingBatches, open_batches
from fastsimgan.training.compilation import compile_networks
from fastsimgan.training.data_parallel import DataParallelGroup
from fastsimgan.training.graphed_iterations import GraphedIterations, why_no_graph
from fastsimgan.training.loop import fit
from fastsimgan.training.progress import MetricsTransfer
from fastsimgan.training.run_directory import RunDirectory
from fastsimgan.training.simgan import PackedMetrics, SimGAN
from fastsimgan.training.state import TrainingState
from tests.cuda.training_runs import CLOSE, CPU, CUDA, PRETEND, SMALL, equal_runs, losses, rows


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No step is taken for slow: before those the ones before are reported, and the pretend device takes its time."""
    monkeypatch.setattr("fastsimgan.training.loop._SLOW", float("inf"))


@pytest.fixture(autouse=True)
def served(monkeypatch) -> None:
    """On the pretend device the CPU's kernel serves `history_swap`'s calls on CUDA, without that build of the
    extension."""
    if PRETEND:
        monkeypatch.setattr(_extension, "BUILD_INFO", {"cuda": True, "torch": torch.__version__})
        monkeypatch.setattr(_extension, "NOT_LOADED", None)


def images(count: int, seed: int, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 65536, (count, 16, 20), dtype=np.uint16)
    return {np.uint8: values >> 8, np.uint16: values, np.float32: values / 65535}[dtype].astype(dtype)


def make(
    config: TrainConfig, device: torch.device, dtype: type = np.uint8, count: int = 12
) -> tuple[SimGAN, TrainingBatches]:
    batches = open_batches(images(count, 0, dtype), images(count - 3, 1, dtype), config, device, lambda _: None)
    state = TrainingState(config, batches.image_shape, device, precision=config.precision, batches=batches)
    return SimGAN(state), batches


def eager_losses(config: TrainConfig, count: int, dtype: type = np.uint8) -> list[list[float]]:
    trainer, batches = make(config, CPU, dtype)
    return [losses(trainer.iteration(batches.draw_synthetic, batches.draw_real)) for _ in range(count)]


@pytest.mark.parametrize("k_g", [1, 2])
def test_a_replayed_iteration_is_the_cpus(k_g):
    config = dataclasses.replace(SMALL, k_g=k_g)
    trainer, batches = make(config, CUDA)
    graphs = GraphedIterations(trainer, pytest.fail)
    found = [losses(graphs()) for _ in range(10)]
    np.testing.assert_allclose(found, eager_losses(config, 10), **CLOSE)
    assert len(graphs._graphs) == 1 and trainer.state.step == 10


@pytest.mark.parametrize(
    ("dtype", "where", "histogram"),
    [
        (np.uint8, "device", "equalise"),
        (np.uint8, "host", "keep"),
        (np.uint16, "device", "keep"),
        (np.uint16, "host", "equalise"),
        (np.float32, "device", "equalise"),
        (np.float32, "host", "keep"),
    ],
)
def test_every_stored_type_trains(dtype, where, histogram, tmp_path):
    config = dataclasses.replace(SMALL, data=where, histogram=histogram, steps=5, eval_every=3, k_g=1)
    pair = images(12, 0, dtype), images(9, 1, dtype)
    for device in ("cpu", "cuda"):
        fit(*pair, dataclasses.replace(config, device=device, out=tmp_path / device), log=lambda _: None)
    equal_runs(tmp_path / "cpu", tmp_path / "cuda")


def test_optimisers_have_their_state_before_their_first_step_and_checkpoints_show_none(tmp_path):
    """Made inside a capture, it would be made anew by every replay."""
    config = dataclasses.replace(SMALL, pretrain_discriminator=2)
    trainer, batches = make(config, CUDA)
    start = trainer.state.state_dict().clone()
    assert not any("optimiser" in name for name in start.tensors)
    graphs = GraphedIterations(trainer, pytest.fail)
    where = trainer.state.addresses()
    for _ in range(5):
        graphs()
    # back to before R's first step, as after a number that is not finite
    trainer.state.load_state_dict(start)
    assert trainer.state.addresses() == where
    found = [losses(graphs()) for _ in range(6)]
    np.testing.assert_allclose(found, eager_losses(config, 6), **CLOSE)
    steps = {float(state["step"]) for state in trainer.state.refiner_optimiser.state.values()}
    assert steps == {6 * config.k_g}


def test_a_number_that_is_not_finite_takes_the_run_back_though_the_next_step_is_under_way(tmp_path, monkeypatch):
    """Iteration 5's loss is NaN, once; iteration 6 has been launched when that is read."""
    read, rollback = MetricsTransfer.read, RunDirectory.rollback
    ends, under_way = {}, {}

    def watched(self, *arguments):
        under_way[self._state.device.type] = self._state.step
        rollback(self, *arguments)

    monkeypatch.setattr(RunDirectory, "rollback", watched)
    for device in ("cpu", "cuda"):
        seen = 0

        def poisoned(self):
            nonlocal seen
            numbers, counters = read(self)
            seen += "loss_refiner" in numbers
            return (numbers | {"loss_refiner": float("nan")} if seen == 5 else numbers), counters

        said: list[str] = []
        out = tmp_path / device
        with monkeypatch.context() as patch:
            patch.setattr(MetricsTransfer, "read", poisoned)
            fit(images(12, 0), images(9, 1), dataclasses.replace(SMALL, device=device, out=out), log=said.append)
        ends[device] = [line for line in said if "must be finite" in line]
        assert len(ends[device]) == 1 and "in train step 5" in ends[device][0], said
        assert "step-00000003, after iteration 3" in ends[device][0]
    assert under_way == {"cpu": 5, "cuda": 6}
    equal_runs(tmp_path / "cpu", tmp_path / "cuda")
    assert [row["step"] for row in rows(tmp_path / "cuda") if row["phase"] == "train"] == list(range(1, 9))


class Two(DataParallelGroup):
    """The first of two that train together, and the other does the very same."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def mean_(self, tensors):
        pass

    def gather(self, tensor):
        return [tensor, tensor]

    def largest(self, value):
        return value


def test_how_far_several_are_when_they_go_back_does_not_depend_on_their_clocks(tmp_path, monkeypatch):
    """One that went back a step before the others would average its gradients with those of another step."""
    read, rollback = MetricsTransfer.read, RunDirectory.rollback
    for name, slow in (("quick", float("inf")), ("slow", 0.0)):
        seen, under_way = 0, []

        def poisoned(self):
            nonlocal seen
            numbers, counters = read(self)
            seen += "loss_refiner" in numbers
            return (numbers | {"loss_refiner": float("nan")} if seen == 5 else numbers), counters

        def watched(self, *arguments, under_way=under_way):
            under_way.append(self._state.step)
            rollback(self, *arguments)

        monkeypatch.setattr("fastsimgan.training.loop._SLOW", slow)
        monkeypatch.setattr("fastsimgan.training.loop.join_group", lambda device: (Two(), device))
        monkeypatch.setattr(RunDirectory, "rollback", watched)
        with monkeypatch.context() as patch:
            patch.setattr(MetricsTransfer, "read", poisoned)
            fit(images(12, 0), images(9, 1), dataclasses.replace(SMALL, out=tmp_path / name), log=lambda _: None)
        assert under_way == [6], name


@pytest.mark.pretend
def test_a_device_short_of_memory_is_one_line_with_ways_out(tmp_path, monkeypatch):
    torch.cuda.empty_cache()
    monkeypatch.setenv("FASTSIMGAN_PRETEND_CUDA_GB", "0.004")
    # a kernel of 36 MiB: smaller ones fit beside what earlier tests have left
    config = dataclasses.replace(SMALL, hidden_channels=1024, out=tmp_path / "run")
    with pytest.raises(UnavailableError, match=r"^cuda:0 must have memory for .* free of 4 MiB: a lower --batch-size"):
        fit(images(12, 0), images(9, 1), config, log=lambda _: None)


def test_equalising_is_deterministic():
    """torch 2.11 refuses sums of floats along an axis of a CUDA tensor where it is to be deterministic."""
    given = torch.from_numpy(images(3, 0))[:, None]
    torch.use_deterministic_algorithms(True)
    try:
        found = equalise(given.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.cpu(), equalise(given))


def test_k_g_grows_on_a_small_set_without_moving_what_graphs_read(tmp_path, monkeypatch):
    """Its decision needs the newest accuracy: that one is waited for."""
    monkeypatch.setattr(simgan, "_WINDOW", 3)
    monkeypatch.setattr(simgan, "_BAND", (-1.0, -0.5))
    config = dataclasses.replace(SMALL, k_g=1, k_g_max=4, steps=14, checkpoint_every=20)
    for device in ("cpu", "cuda"):
        fit(images(12, 0), images(9, 1), dataclasses.replace(config, device=device, out=tmp_path / device))
    equal_runs(tmp_path / "cpu", tmp_path / "cuda")
    assert [row["k_g"] for row in rows(tmp_path / "cuda") if row["phase"] == "train"] == [1] * 3 + [2] * 3 + [3] * 3 + [
        4
    ] * 5
    trainer, batches = make(config, CUDA)
    GraphedIterations(trainer, pytest.fail)
    where = batches.addresses()
    trainer.state.k_g = 4
    batches.reserve(trainer.images_drawn())
    assert batches.addresses() == where


def test_a_tensor_that_has_moved_is_captured_anew():
    trainer, batches = make(SMALL, CUDA)
    graphs = GraphedIterations(trainer, pytest.fail)
    found = [losses(graphs()) for _ in range(5)]
    first = graphs._graphs[2]
    batches.synthetic.sampler.reserve(200)  # the ring grows
    weight = trainer.state.refiner.last.weight
    weight.data = weight.data.clone()
    found += [losses(graphs()) for _ in range(5)]
    assert graphs._graphs[2] is not first
    np.testing.assert_allclose(found, eager_losses(SMALL, 10), **CLOSE)


@pytest.mark.parametrize("why", ["synchronises", "compiler", "nothing"])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_that_fails_is_said_and_training_goes_on_as_if_it_had_not_been_tried(why, monkeypatch):
    trainer, batches = make(SMALL, CUDA)
    said: list[str] = []
    graphs = GraphedIterations(trainer, said.append)
    updates, calls = trainer.update_discriminator, 0

    def failing(*draws):
        nonlocal calls
        calls += 1
        metrics = updates(*draws)
        if calls == graphed_iterations._ORDINARY + 1:  # in the capture
            if why == "compiler":
                raise ValueError("no such instruction\nmore about it")
            float(metrics["loss_discriminator"])
        return metrics

    if why == "nothing":
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    else:
        trainer.update_discriminator = failing
    found = [losses(graphs()) for _ in range(9)]
    np.testing.assert_allclose(found, eager_losses(SMALL, 9), **CLOSE)
    assert len(said) == 1 and said[0].startswith("warning: no CUDA graph, so each iteration's kernels are launched one")
    reason = {"synchronises": "Error: CUDA error: operation ", "compiler": "ValueError: no such instruction)"}
    assert reason.get(why, "what was captured does nothing") in said[0], said
    assert batches.positions() == {"synthetic": 9 * 10, "real": 9 * 4}
    assert trainer.state.step == 9 and all(p.requires_grad for p in trainer.state.discriminator.parameters())


def test_the_reference_is_not_captured_and_that_is_said(tmp_path, monkeypatch):
    trainer, batches = make(dataclasses.replace(SMALL, impl="reference"), CUDA)
    assert why_no_graph(trainer.state) == "the history's reference reads its state on the host"
    monkeypatch.setattr(_extension, "BUILD_INFO", {"cuda": False, "torch": "2.11.0"})
    trainer, batches = make(SMALL, CUDA)
    assert "built without CUDA, against torch 2.11.0" in why_no_graph(trainer.state)
    trainer, batches = make(dataclasses.replace(SMALL, impl="reference", history=0), CUDA)
    assert why_no_graph(trainer.state) == ""  # the losses' reference reads nothing
    graphs = GraphedIterations(trainer, pytest.fail)
    assert np.isfinite([losses(graphs()) for _ in range(5)]).all()
    config = dataclasses.replace(SMALL, impl="reference", steps=5)
    said: list[str] = []
    for device in ("cpu", "cuda"):
        fit(
            images(12, 0), images(9, 1), dataclasses.replace(config, device=device, out=tmp_path / device),
            log=said.append,
        )  # fmt: skip
    assert [line for line in said if "no CUDA graph" in line] == [
        "no CUDA graph: the history's reference reads its state on the host"
    ]
    equal_runs(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_the_second_device_trains(tmp_path):
    GraphedIterations(make(SMALL, CUDA)[0], pytest.fail)  # torch remembers a stream of the first device
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    said: dict[str, int] = {}

    def say(line: str) -> None:
        said[line] = torch.cuda.current_device()

    for device in ("cpu", "cuda:1"):
        out = tmp_path / device.replace(":", "")
        fit(images(12, 0), images(9, 1), dataclasses.replace(SMALL, device=device, out=out), log=say)
    assert not [line for line in said if "graph" in line]
    assert 1 in said.values()
    assert torch.cuda.current_device() == 0
    equal_runs(tmp_path / "cpu", tmp_path / "cuda1")
    # and where the caller did not make it the current one, its graphs hold what they should
    trainer, batches = make(SMALL, torch.device("cuda:1"))
    graphs = GraphedIterations(trainer, pytest.fail)
    with current(trainer.state.device):
        np.testing.assert_allclose([losses(graphs()) for _ in range(6)], eager_losses(SMALL, 6), **CLOSE)


@pytest.mark.parametrize(("method", "slow"), [("snapshot", 0.0), ("save", float("inf"))])
def test_a_state_that_is_kept_is_that_of_reported_steps(method, slow, tmp_path, monkeypatch):
    """A checkpoint, and what SIGTERM would write in a slow step: metrics.jsonl holds all steps up to it."""
    monkeypatch.setattr("fastsimgan.training.loop._SLOW", slow)
    call, seen = getattr(RunDirectory, method), []

    def called(self, *arguments):
        lines = rows(self.path) if (self.path / "metrics.jsonl").exists() else []
        seen.append((self._state.step, sum(row["phase"] == "train" for row in lines)))
        return call(self, *arguments)

    monkeypatch.setattr(RunDirectory, method, called)
    config = dataclasses.replace(SMALL, steps=5, checkpoint_every=2, pretrain_discriminator=0, out=tmp_path / "r")
    fit(images(12, 0), images(9, 1), config, log=lambda _: None)
    assert seen == [(step, step) for step in (range(5) if method == "snapshot" else (0, 2, 4, 5))]


@pytest.mark.parametrize("graph", [True, False])
def test_resume_goes_on_from_the_same_state(graph, tmp_path):
    config = dataclasses.replace(SMALL, steps=9, cuda_graph=graph, deterministic=True, eval_every=5)
    pair = images(12, 0, np.uint16), images(9, 1, np.uint16)
    fit(*pair, dataclasses.replace(config, out=tmp_path / "whole"), log=lambda _: None)
    fit(*pair, dataclasses.replace(config, out=tmp_path / "part"), log=lambda _: None)
    for number in (9, 6):
        folder = tmp_path / f"part/checkpoints/step-{number:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    said: list[str] = []
    fit(*pair, dataclasses.replace(config, out=tmp_path / "part", resume=True), log=said.append)
    assert not any("to the bit" in line for line in said)
    equal_runs(tmp_path / "whole", tmp_path / "part")
    if not (graph and PRETEND):  # which rounds otherwise in a capture than outside, where a resumed run begins
        name = "checkpoints/step-00000009/SHA256SUMS"
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "part" / name).read_text()
        assert rows(tmp_path / "whole") == rows(tmp_path / "part")


def test_resume_without_the_flag_says_what_it_does_not_promise(tmp_path):
    config = dataclasses.replace(SMALL, steps=2, out=tmp_path / "r")
    fit(images(12, 0), images(9, 1), config, log=lambda _: None)
    said: list[str] = []
    fit(images(12, 0), images(9, 1), dataclasses.replace(config, resume=True), log=said.append)
    assert any("on CUDA that needs --deterministic" in line for line in said)


def test_deterministic_is_for_the_run_alone(tmp_path):
    from torch._inductor import config as inductor

    def switches() -> tuple[bool, bool, bool]:
        """PyTorch's operators by rule, cuDNN's algorithms by timing, Inductor's kernels by rule."""
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, inductor.deterministic

    seen = []
    config = dataclasses.replace(SMALL, steps=1, deterministic=True, out=tmp_path / "r")
    fit(images(12, 0), images(9, 1), config, log=lambda _: seen.append(switches()))
    assert set(seen) == {(True, False, True)}
    seen.clear()
    config = dataclasses.replace(config, deterministic=False, out=tmp_path / "s")
    fit(images(12, 0), images(9, 1), config, log=lambda _: seen.append(switches()))
    assert (False, True, False) in seen and not any(rule for rule, *_ in seen)
    assert switches() == (False, False, False)


def test_the_blocks_take_what_wins_a_race_unless_runs_must_be_equal(monkeypatch):
    asked = []

    def race(shape, dtype, backward, device, *, features, compiled):
        assert features == dtype  # 16 bits between the blocks too
        asked.append((shape, dtype, backward, compiled))
        return RaceResult("blocks", "triton", {"triton": 1.0, "reference": 2.0})

    monkeypatch.setattr(compilation, "race", race)
    monkeypatch.setattr(compilation, "INTERPRETED", False)
    monkeypatch.setattr(compilation.residual_block, "implementations", lambda: {"triton": None})
    said: list[str] = []
    for settings in ({"deterministic": True}, {"impl": "reference"}, {"blocks": 0}, {"precision": "float32"}):
        trainer, _ = make(dataclasses.replace(SMALL, **{"precision": "bfloat16", **settings}), CUDA)
        compilation.choose_residual_blocks(trainer.state, said.append)
        assert trainer.state.refiner.impl != "triton"
    assert asked == said == []
    trainer, _ = make(dataclasses.replace(SMALL, precision="bfloat16"), CUDA)
    compilation.choose_residual_blocks(trainer.state, said.append)
    assert trainer.state.refiner.impl == "triton" and said == ["blocks: triton won (triton 1 ms; reference 2 ms)"]
    assert asked == [((4, 20, 16, 20), torch.bfloat16, True, False)]


def test_many_batch_sizes_in_one_process_are_all_compiled():
    """Dynamo stops at 8 variants of a network's code, which the third batch size passes."""
    counters = torch._dynamo.utils.counters
    said: list[str] = []
    for batch in (2, 4, 6, 8):
        trainer, batches = make(dataclasses.replace(SMALL, batch_size=batch, history=12), CUDA)
        compile_networks(trainer.state, "on", said.append)
        trainer.iteration(batches.draw_synthetic, batches.draw_real)
    before = dict(counters["frames"])
    assert before["ok"] == before["total"]
    assert len(said) == 4 and not [line for line in said if "warning" in line]


def test_what_dynamo_leaves_uncompiled_is_said(monkeypatch):
    monkeypatch.setattr(compilation, "VARIANTS", 1)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    torch._dynamo.reset()
    said: list[str] = []
    trainer, batches = make(SMALL, CUDA)
    compile_networks(trainer.state, "on", said.append)
    for _ in range(2):
        trainer.iteration(batches.draw_synthetic, batches.draw_real)
    assert any("torch.compile goes on uncompiled" in line and "recompile_limit (1)" in line for line in said), said
    torch._dynamo.reset()


def test_shares_of_a_profile_add_up(tmp_path):
    config = dataclasses.replace(SMALL, steps=1, profile=3, out=tmp_path / "r")
    fit(images(12, 0), images(9, 1), config, log=lambda _: None)
    lines = (tmp_path / "r/profile.txt").read_text().splitlines()
    assert "host ms" in lines[0] and "device ms" in lines[0]
    shares = np.array([[float(cell) for cell in line[24:].replace("%", " ").split()] for line in lines[1:]])
    assert (shares >= 0).all(), lines
    assert abs(shares[:-1].sum(0) - shares[-1])[[1, 3]].max() <= len(lines) / 2  # rounded to whole per cents
    np.testing.assert_allclose(shares[:-1, [0, 2]].sum(0), shares[-1, [0, 2]], atol=0.05)
    assert (shares[:, 0] > 0).all(), lines  # of each part, those within others too


@pytest.fixture
def asked() -> Iterator[object]:
    return pytest.importorskip("pretend_device")


@pytest.mark.pretend
def test_the_host_waits_only_for_the_iteration_before_and_launches_one_graph(asked):
    """Counted: one wait an iteration, for the one before; two copies, of the schedule and of the numbers."""
    trainer, batches = make(dataclasses.replace(SMALL, k_g=1), CUDA, count=200)
    graphs = GraphedIterations(trainer, pytest.fail)
    for _ in range(6):
        MetricsTransfer(graphs(), trainer.state.group).read()
    with asked.counted() as counts:
        kept = MetricsTransfer(graphs(), trainer.state.group)
        for _ in range(9):
            following = MetricsTransfer(graphs(), trainer.state.group)
            kept.read()
            kept = following
    assert counts["graphs"] == 10 and counts["syncs"] == 9 and counts["operators"] == 0, counts
    assert counts["memcpys"] == 2 * 10 and counts["pageable"] == 0, counts


@pytest.mark.pretend
def test_a_new_epoch_is_sent_without_waiting(asked):
    sampler = Sampler(100, 0, CUDA)
    sampler.reserve(150)
    sampler.position = 90
    with asked.counted() as counts:
        sampler.reserve(150)
    assert counts["syncs"] == 0 and counts["pageable"] == 0 and counts["memcpys"] >= 1, counts
    assert sampler.draw(150).tolist() == sampler.indices(90, 240)


def test_numbers_of_a_step_are_those_before_the_next():
    trainer, batches = make(SMALL, CUDA)
    graphs = GraphedIterations(trainer, pytest.fail)
    metrics = [graphs() for _ in range(4)][-1]
    assert isinstance(metrics, PackedMetrics)
    history = trainer.state.history
    expected, counters = dict(zip(metrics, metrics.tensor.tolist(), strict=True)), history.counters().tolist()
    numbers = MetricsTransfer(metrics, trainer.state.group, history.counters())
    graphs()
    found, kept = numbers.read()
    assert found == expected and kept.tolist() == counters
    assert kept.tolist() != history.counters().tolist()
