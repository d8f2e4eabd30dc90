"""``python -m bench.bench_kernels``: where a training iteration and a batch of refining spend a GPU's time, by kernel.

torch.profiler names the kernels (those inside CUDA graphs as well); the time of a whole call is taken between events,
without the profiler. What lies between the sum of the kernels and that is a device that waits. Our own kernels are then
run alone, each op at the size that training gives it and on buffers that the cache does not hold, with the bytes that
they cannot do without as a share of a copy. Gaze networks of the paper, batch 512, K_g = 2, TF32 off.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import limits
from fastsimgan.config import TrainConfig
from fastsimgan.hardware.precision import choose_precision
from fastsimgan.inference import load_refiner, save_refiner
from fastsimgan.models.refiner import Refiner
from fastsimgan.ops.discriminator_loss import discriminator_loss
from fastsimgan.ops.history_swap import FILL, encode, history_swap, new_state
from fastsimgan.ops.refiner_loss import refiner_loss
from fastsimgan.training.batches import open_batches
from fastsimgan.training.compilation import compile_networks
from fastsimgan.training.flops import iteration_flops
from fastsimgan.training.graphed_iterations import GraphedIterations
from fastsimgan.training.simgan import SimGAN
from fastsimgan.training.state import TrainingState

SIZE, BATCH, WIDTH, PATCHES = ((16, 20), 8, 20, (4, 5)) if limits.SMALL else ((35, 55), 512, 64, (9, 14))
CALLS = 2 if limits.SMALL else 5  # profiled
SHOWN = 25
Row = tuple[str, float, float]  # kernel, launches and microseconds a call


def kernels_of(call: Callable[[], object], calls: int = CALLS) -> list[Row]:
    """What ``call`` runs on the device, the longest first; empty where the profiler sees no device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, of a first step
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
    rows = [
        (event.key, event.count / calls, event.self_device_time_total / calls)
        for event in found.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def show(title: str, call: Callable[[], object], device: torch.device, **facts: Any) -> limits.Spread:
    """Print and keep the breakdown of ``call``; gives its seconds."""
    memory = limits.peak_memory(call, device)
    taken = limits.seconds(call, device)
    rows = kernels_of(call)
    busy = sum(row[2] for row in rows)
    lines = [f"{title}: {taken.median * 1e3:.3f} ms (IQR {taken.iqr * 1e3:.3f}), {(memory or 0) / 1e9:.2f} GB at most"]
    if rows:
        lines[0] += f"; {sum(row[1] for row in rows):.0f} launches, {busy / 1e6 / taken.median:.0%} of it in kernels"
    else:
        lines[0] += "; the profiler saw no kernel"
    for name, launches, microseconds in rows[:SHOWN]:
        lines.append(f"  {microseconds:9.1f} us {microseconds / busy:6.1%} {launches:6.1f} launches  {name[:90]}")
    if len(rows) > SHOWN:
        rest = sum(row[2] for row in rows[SHOWN:])
        lines.append(f"  {rest:9.1f} us {rest / busy:6.1%} {len(rows) - SHOWN:6} other kernels")
    print("\n".join(lines), flush=True)
    table = [{"kernel": name, "launches": launches, "us": us} for name, launches, us in rows]
    limits.keep(
        title, lines, seconds=taken.median, iqr=taken.iqr, peak_bytes=memory, busy_us=busy, kernels=table, **facts
    )
    return taken


def training(device: torch.device) -> None:
    """One iteration as `fit` runs it, and the same without a graph, where launches cost what they cost."""
    random = np.random.default_rng(0)
    sides = [random.integers(0, 256, (max(64, 2 * BATCH), *SIZE), dtype=np.uint8) for _ in range(2)]
    config = TrainConfig(batch_size=BATCH, k_g=2, hidden_channels=WIDTH, history=max(64, 4 * BATCH))
    precision, _ = choose_precision("auto", device)
    for title, graphed in (("training iteration, graph", True), ("training iteration, no graph", False)):
        batches = open_batches(sides[0], sides[1], config, device, lambda _: None)
        trainer = SimGAN(TrainingState(config, batches.image_shape, device, precision=precision, batches=batches))
        flop = iteration_flops(trainer.state)
        compile_networks(trainer.state, "auto", print)
        graphs = GraphedIterations(trainer, print) if graphed else None

        def call(trainer=trainer, batches=batches, graphs=graphs) -> object:
            return graphs() if graphs else trainer.iteration(batches.draw_synthetic, batches.draw_real)

        for _ in range(6):
            call()
        taken = show(f"{title}, {precision}, batch {BATCH}", call, device, flop=flop)
        print(f"  {flop / taken.median / 1e12:.1f} TFLOP/s", flush=True)
        del trainer, graphs, call
        torch.cuda.empty_cache()


def refining(device: torch.device) -> None:
    """A batch of uint8 images on the device through the public call of `load_refiner`."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_refiner(
            Path(folder) / "refiner.safetensors", Refiner(1, width=WIDTH), histogram="keep", training=TrainConfig()
        )
        sets = [
            torch.randint(0, 256, (BATCH, 1, *SIZE), dtype=torch.uint8, device=device)
            for _ in range(limits.copies(2 * BATCH * SIZE[0] * SIZE[1], device))
        ]
        for precision, compiled in itertools.product(("float32", "float16"), (False, True)):
            refiner = load_refiner(folder, device="cuda", precision=precision, compiled=compiled)  # type: ignore[arg-type]
            turns = limits.Turns([partial(refiner, images, BATCH) for images in sets])
            for _ in range(4):
                turns()
            show(f"refine batch, {refiner.backend.name}, batch {BATCH}", turns, device)


def alone(device: torch.device) -> None:
    """Our ops by themselves: each one's kernels, and the bytes it cannot do without as a share of a copy's rate."""
    bandwidth = limits.copy_bandwidth(device)
    pixels, patches = BATCH * SIZE[0] * SIZE[1], BATCH * 2 * PATCHES[0] * PATCHES[1]
    dtype = torch.bfloat16 if choose_precision("auto", device)[0] == "bfloat16" else torch.float32

    def floats(*shape: int) -> Tensor:
        return (torch.rand(shape, device=device) * 2 - 1).to(dtype)

    def gradients(loss: Callable[..., Any], tensors: tuple[Tensor, ...], count: int) -> object:
        return torch.autograd.grad(loss(*tensors)[0], tensors[:count])

    def make_refiner_loss() -> Callable[[], object]:
        tensors = floats(BATCH, 2, *PATCHES).requires_grad_(), floats(BATCH, 1, *SIZE).requires_grad_()
        synthetic = floats(BATCH, 1, *SIZE)
        return lambda: gradients(lambda *t: refiner_loss(*t, lam=0.2), (*tensors, synthetic), 2)

    def make_discriminator_loss() -> Callable[[], object]:
        tensors = tuple(floats(BATCH, 2, *PATCHES).requires_grad_() for _ in range(2))
        return lambda: gradients(discriminator_loss, tensors, 2)

    half = BATCH // 2
    storage = encode(torch.zeros(64 * half, 1, *SIZE, device=device), torch.uint8)
    state = new_state(len(storage), 0, device)
    state[FILL] = len(storage)

    def make_history_swap() -> Callable[[], object]:
        fresh = floats(half, 1, *SIZE)
        return lambda: history_swap(storage, state, fresh, half)

    bytes_of = dtype.itemsize
    for name, make, moved in (
        ("refiner_loss", make_refiner_loss, bytes_of * (3 * pixels + 2 * patches)),
        ("discriminator_loss", make_discriminator_loss, bytes_of * 4 * patches),
        ("history_swap", make_history_swap, (2 * bytes_of + 2) * pixels // 2),
    ):
        calls = [make() for _ in range(limits.copies(moved, device))]
        turns = limits.Turns(calls)
        for _ in range(3):
            turns()
        rows = kernels_of(turns, 2 * len(calls))
        graph = limits.seconds(calls, device, graph=True)
        share = moved / graph.median / bandwidth
        lines = [
            f"{name}, {str(dtype)[6:]}, batch {BATCH}: {graph.median * 1e6:.1f} us in a graph (IQR "
            f"{graph.iqr * 1e6:.1f}), {moved / 1e6:.2f} MB, {share:.1%} of a copy's rate"
        ]
        lines += [f"  {us:9.1f} us {launches:6.1f} launches  {kernel[:90]}" for kernel, launches, us in rows]
        print("\n".join(lines), flush=True)
        table = [{"kernel": kernel, "launches": launches, "us": us} for kernel, launches, us in rows]
        limits.keep(name, lines, seconds=graph.median, iqr=graph.iqr, bytes=moved, share_of_copy=share, kernels=table)


def main(argv: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        print("no GPU")
        return 3
    device = torch.device("cuda", torch.cuda.current_device())
    with limits.same_switches(tf32=False):
        alone(device)
        training(device)
        refining(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
