"""Where an iteration's time goes, and how much arithmetic it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from fastsimgan.algorithm import SimGAN
from fastsimgan.pools import Pools

#: Dense bfloat16 matrix rates of the makers' data sheets, FLOP/s, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}

_WARM_UP = 10
_PARTS = (
    "data", "R forward", "D forward", "history", "backward, R's step", "backward, D's step", "optimiser"
)  # fmt: skip


def profile_iterations(trainer: SimGAN, pools: Pools, count: int, folder: Path) -> str:
    """Profile ``count`` iterations after ten others, on a copy of the trainer: the run itself is as if it had not been.

    The copy's networks are not compiled and its iterations no CUDA graph: those have no parts to tell apart. The first
    rank writes ``profile.txt`` and ``trace.json.gz`` into ``folder``.

    Returns:
        The table: milliseconds an iteration on the host, and on the device where that is another one. "losses and the
        rest" is what no other part covers: the losses' forward, the average, and Python.
    """
    positions, attempt = pools.positions(), pools.synthetic.sampler.attempt
    trainer = copy.deepcopy(trainer)
    draws = [_labelled(draw, "data") for draw in (pools.draw_synthetic, pools.draw_real)]
    _label_parts(trainer)
    for _ in range(_WARM_UP):
        trainer.iteration(draws[0], draws[1])
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for _ in range(count):
            with record_function("iteration"):
                trainer.iteration(draws[0], draws[1])
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
    table = _table(found, count, trainer.device.type == "cuda")
    pools.restart(positions, attempt)
    if trainer.ranks.first:
        found.export_chrome_trace(str(folder / "trace.json.gz"))
        (folder / "profile.txt").write_text(table + "\n")
    return table


def _label_parts(trainer: SimGAN) -> None:
    """Put labels around the parts of ``trainer``'s iterations, for good."""
    _label_calls(trainer.refiner, "R forward")
    _label_calls(trainer.discriminator, "D forward")
    backward = trainer._backward

    def labelled_backward(name: str, loss: Tensor) -> None:
        with record_function(f"backward, {name[0].upper()}'s step"):
            backward(name, loss)

    trainer._backward = labelled_backward  # type: ignore[method-assign]
    if trainer.history is not None:
        trainer.history.swap = _labelled(trainer.history.swap, "history")  # type: ignore[method-assign]
    for optimiser in (trainer.refiner_optimiser, trainer.discriminator_optimiser):
        optimiser.step = _labelled(optimiser.step, "optimiser")  # type: ignore[method-assign]


def _label_calls(network: nn.Module, label: str) -> None:
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(label).__enter__())

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave)


def _labelled(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return call


def _table(found: profile, count: int, device: bool) -> str:
    events = {event.key: event for event in found.key_averages()}
    kinds = {"host ms": "cpu_time_total"} | ({"device ms": "device_time_total"} if device else {})
    columns: dict[str, dict[str, float]] = {}
    for title, field in kinds.items():
        spent = {name: getattr(events[name], field, 0.0) / count / 1e3 if name in events else 0.0 for name in _PARTS}
        whole = getattr(events["iteration"], field) / count / 1e3
        # the optimisers' steps lie inside both updates
        backward = [name for name in _PARTS if name.startswith("backward")]
        inside = sum(spent[name] for name in backward) or 1.0
        shares = {name: spent[name] / inside for name in backward}
        for name in backward:
            spent[name] -= spent["optimiser"] * shares[name]
        spent["losses and the rest"] = whole - sum(spent.values())
        columns[title] = spent | {"an iteration": whole}
    lines = [f"{'':24}" + "".join(f"{title:>12}{'':7}" for title in columns)]
    for name in next(iter(columns.values())):
        cells = (
            f"{values[name]:12.2f} {values[name] / (values['an iteration'] or 1):5.0%} " for values in columns.values()
        )
        lines.append(f"{name:24}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def iteration_flops(trainer: SimGAN) -> int:
    """Floating-point operations of one iteration of all ranks: the convolutions', which are nearly all of it.

    R's step: forward, and backward to the weights and to the layers below; D's forward and its backward to R only.
    D's step: R forward on half a batch (all of it without a history), D forward and backward on two batches.
    """
    config = trainer.config
    shape = (1, trainer.refiner.last.out_channels, *trainer.image_size)
    of_refiner, of_discriminator = (_forward_flops(n, shape) for n in (trainer.average, trainer.discriminator))
    b = config.batch_size
    fresh = b // 2 if config.history else b
    return trainer.k_g * b * (3 * of_refiner + 2 * of_discriminator) + config.k_d * (
        fresh * of_refiner + 2 * b * 3 * of_discriminator
    )


def _forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    network = copy.deepcopy(network).to("meta")
    network._compiled_call_impl = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """The data sheet's bfloat16 matrix rate of a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
