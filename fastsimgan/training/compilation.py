"""R's residual blocks by a race, and `torch.compile` of both networks."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from fastsimgan.errors import UnavailableError
from fastsimgan.hardware.cuda_graphs import first_line
from fastsimgan.hardware.precision import DTYPES, autocast
from fastsimgan.ops import residual_block
from fastsimgan.ops._dispatch import INTERPRETED
from fastsimgan.ops.residual_block_race import race
from fastsimgan.training.state import TrainingState

MODE = "default"
"""`torch.compile`'s. Not "reduce-overhead": the whole iteration is one CUDA graph of ours."""

VARIANTS = 64
"""Of one network that `torch.compile` may keep: each batch size, with and without gradients. Its own limit, 8, is
passed by the third batch size in one process, and what is beyond it runs uncompiled."""

IMPLS = ("reference", "triton")
"""Of `residual_block`, that a race can name."""


def choose_residual_blocks(state: TrainingState, log: Callable[[str], None]) -> None:
    """On CUDA, have R's residual blocks take the implementation that is fastest there, by a race at training's sizes.

    Not with --deterministic, since a race is decided by timing, nor with --impl reference, nor in float32, for which
    there is one implementation. Of several ranks the first one's answer holds for all.

    Args:
        state: its refiner's ``impl`` is changed.
        log: told the times and the winner.
    """
    config, device = state.config, state.device
    if device.type != "cuda" or config.impl != "auto" or config.deterministic or not config.blocks or INTERPRETED:
        return
    if state.precision == "float32" or residual_block.implementations()["triton"] is not None:
        return
    shape = state.batch // config.accumulate, config.hidden_channels, *state.image_shape[1:]
    dtype = DTYPES[state.precision]
    result = race(shape, dtype, True, device, features=dtype, compiled=config.compile != "off")
    state.refiner.impl = IMPLS[state.group.largest(IMPLS.index(result.impl) if state.group.first else 0)]
    log(str(result))


def compile_networks(state: TrainingState, choice: str, log: Callable[[str], None]) -> None:
    """Have R and D compiled, forward and backward, at the sizes that training uses.

    Args:
        state: its networks are changed in place; their weights and names stay.
        choice: "on"; "off"; or "auto": on CUDA where triton is installed. Not on a CPU: there the convolutions of both
            networks take nearly all the time, they are ours or oneDNN's either way, and compiling costs 10 to 20
            CPU-seconds.
        log: told why "auto" goes on without it, if compiling fails; and if, later on, there are more than `VARIANTS`.

    Raises:
        UnavailableError: "on" was asked for and compiling fails.
    """
    auto = state.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if choice == "off" or (choice == "auto" and not auto):
        return
    _have_variants(log)
    networks = (state.refiner, state.discriminator)
    for network in networks:
        network.compile(mode=MODE, dynamic=False)  # a handful of batch sizes, each compiled for itself
    try:
        _try(state)
    except Exception as error:  # Dynamo's, Inductor's, the C++ compiler's, Triton's: there is no common class
        for network in networks:
            network._compiled_call_impl = None  # what `Module.compile` sets
        reason = first_line(error)
        if choice == "on":
            raise UnavailableError(f"--compile on: torch.compile failed: {reason}") from error
        log(f"warning: torch.compile failed, so the networks run uncompiled ({reason})")
        return
    log(f'networks compiled (torch.compile, mode "{MODE}")')


def _try(state: TrainingState) -> None:
    """Forward and backward once through both networks; changes nothing."""
    blank = torch.zeros(state.batch // state.config.accumulate, *state.image_shape, device=state.device)
    blank = blank.contiguous(memory_format=torch.channels_last)
    with autocast(state.precision, state.device):
        state.discriminator(state.refiner(blank)).float().sum().backward()
    state.refiner.zero_grad(set_to_none=True)
    state.discriminator.zero_grad(set_to_none=True)


def _have_variants(log: Callable[[str], None]) -> None:
    """Have Dynamo keep `VARIANTS` of a network, and say so where even that is not enough."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    dynamo = logging.getLogger("torch._dynamo.convert_frame")
    for handler in dynamo.handlers:
        if isinstance(handler, _LimitHit):
            dynamo.removeHandler(handler)
    dynamo.addHandler(_LimitHit(log))


class _LimitHit(logging.Handler):
    """Says what Dynamo only logs: that it compiles no more variants."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "recompile_limit" in text:
            self._log(f"warning: torch.compile goes on uncompiled: {' '.join(text.split())}")
