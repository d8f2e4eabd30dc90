"""The history of refined images (§2.3): draw n old ones, put n new ones in their place, in one pass.

The paper keeps a buffer of images refined by earlier generators. In each iteration half of the discriminator's
refined batch is drawn from it, and as many of its entries, chosen at random, are replaced by newly refined images.

The whole state of the buffer lives in two tensors on the training device:

``storage``  ``[capacity, *image]``, uint8, float16, bfloat16 or float32: the images, and nothing else.
``state``    ``[HEADER + capacity]`` int64: seed, number of swaps so far, fill, statistics of the last swap, and for
             each slot the swap that wrote it. Made by :func:`new_state`.

Slots are chosen by a keyed bijection: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) turns (seed, swap) into round keys, a Feistel network with these keys permutes the smallest power of two, 64
or more, that holds the slots, and cycle walking (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002) brings
the result back into range. Distinct indices therefore give distinct slots with no sort and no table, every
implementation picks the same ones, and because the counter advances on the device a replayed CUDA graph draws anew.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsimgan.errors import InputError
from fastsimgan.ops import _extension
from fastsimgan.ops._dispatch import Dispatch

STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Entries of `state`. The last two are scratch of the CUDA kernel and zero between calls.
SEED, SWAPS, FILL, DRAWN, AGE_SUM, _TICKET, _AGE_PARTIAL = range(7)
HEADER = 7

# A Feistel network of fewer bits favours some pairs of slots: seen by chi-square at 4 bits, not at 6.
_MIN_BITS = 6
_DRAW, _REPLACE = 0, 1  # Philox streams: what is drawn and what is replaced are independent of each other
_UINT32 = 0xFFFFFFFF


def new_state(capacity: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """State of an empty history: ``[HEADER + capacity]`` int64 on ``device``. ``seed`` is any 64-bit integer."""
    state = torch.zeros(HEADER + capacity, dtype=torch.int64)
    state[SEED] = seed
    return state.to(device)


def history_swap(storage: Tensor, state: Tensor, fresh: Tensor, n: int, impl: str = "auto") -> Tensor:
    """Put ``fresh`` into the history and return ``n`` images drawn from it, in one step (§2.3).

    1. As many of the fresh images as there are empty slots are appended, in order.
    2. ``n`` images are drawn from distinct slots among all that are now filled.
    3. The rest of the fresh images overwrite distinct random slots among those that were filled before this call.

    So a full buffer gives n old images and then has n of its entries replaced (the two choices are independent, as
    in the paper); an empty one first stores all that is fresh and returns the same images in another order; and any
    capacity of at least ``n`` works. A drawn image is always what the storage holds: rounded, where it is uint8.

    Args:
        storage: ``[capacity, *image]`` contiguous, uint8, float16, bfloat16 or float32. Changed in place.
            uint8 holds ``round((x + 1) * 127.5)`` clamped to 0..255 (NaN becomes 0) and is read as ``u / 127.5 - 1``.
        state: from :func:`new_state`, on the same device. Changed in place.
        fresh: ``[n, *image]`` float16, bfloat16 or float32 in [-1, 1]; no gradient flows through the history.
        n: number of images to exchange, 1 to capacity.
        impl: ``"reference"`` (plain PyTorch; reads the state on the host), ``"cpp"`` (C++, CPU tensors), ``"cuda"``
            (one kernel launch, no host synchronisation, capturable in a CUDA graph), or ``"auto"``: the fastest
            that can run here, see :func:`implementations`.

    Returns:
        ``[n, *image]`` contiguous, in the dtype of ``fresh``.

    Raises:
        InputError: a shape, dtype, device or ``n`` breaks a rule above.
        UnavailableError: an explicit ``impl`` cannot run here.
    """
    _check(storage, state, fresh, n)
    chosen = _choose(impl, storage.device)
    fresh = fresh.detach().contiguous()
    if chosen == "reference":
        return _reference_op(storage, state, fresh, n)
    return _op(storage, state, fresh, n)


def _missing() -> dict[str, str | None]:
    info = _extension.BUILD_INFO
    no_cuda = _extension.NOT_LOADED
    if info is not None and not info["cuda"]:
        why = info.get("no_cuda", "it is of an older version of fastsimgan")
        no_cuda = f"fastsimgan._C was built without CUDA, against torch {info['torch']}: {why}"
    elif no_cuda is None and not torch.cuda.is_available():
        no_cuda = "no CUDA device"
    return {"cuda": no_cuda, "cpp": _extension.NOT_LOADED}


DISPATCH = Dispatch("history_swap", _missing, {"cpu": ("cpp",), "cuda": ("cuda",)})
implementations = DISPATCH.implementations


def _choose(impl: str, device: torch.device) -> str:
    """ "auto" is torch's dispatcher to answer: it knows _C's kernel for the device, or takes the reference."""
    if impl != "auto":
        return DISPATCH.choose(impl, (), lambda name: _unmet(name, device))
    if device.type == "cuda" and (reason := _missing()["cuda"]):
        _say_once(reason)
    return impl


def _unmet(impl: str, device: torch.device) -> str | None:
    needs = {"cpp": "cpu", "cuda": "cuda"}[impl]
    return _missing()[impl] or (f"it needs tensors on {needs}, got {device}" if needs != device.type else None)


def reference(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    """The op in plain PyTorch: documentation, fallback and the tests' oracle. Arguments as in :func:`history_swap`."""
    capacity = storage.shape[0]
    seed, swap, fill = state[: FILL + 1].tolist()
    appended = min(n, capacity - fill)
    filled = fill + appended
    index = torch.arange(n, device=storage.device)
    written_by = state[HEADER:]
    incoming = encode(fresh, storage.dtype)

    storage[fill:filled] = incoming[:appended]
    written_by[fill:filled] = swap

    drawn_slots = permute(index, filled, seed, swap, _DRAW)
    drawn = decode(storage[drawn_slots], fresh.dtype)
    age_sum = (swap - written_by[drawn_slots]).sum()

    if appended < n:
        replaced_slots = permute(index[: n - appended], fill, seed, swap, _REPLACE)
        storage[replaced_slots] = incoming[appended:]
        written_by[replaced_slots] = swap

    state[SWAPS] = swap + 1
    state[FILL] = filled
    state[DRAWN] = n
    state[AGE_SUM] = age_sum
    return drawn


def encode(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in [-1, 1] as the storage keeps them. Saturates: a value past white stays white."""
    if dtype != torch.uint8:
        return images.to(dtype)
    return ((images.float() + 1) * 127.5).nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What the storage keeps, as images in [-1, 1]."""
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    return (stored.float() / 127.5 - 1).to(dtype)


def permute(index: Tensor, domain: int, seed: Any, swap: Any, stream: int) -> Tensor:
    """The keyed bijection of ``0 .. domain - 1``: distinct indices to distinct slots.

    ``seed`` and ``swap`` are ints, or int64 tensors that broadcast against ``index`` (many states at once).
    """
    keys = [*philox(seed, swap, stream, 0), *philox(seed, swap, stream, 1)]
    bits = max((domain - 1).bit_length(), _MIN_BITS)
    low_bits = bits - bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits // 2) - 1

    def feistel(x: Tensor) -> Tensor:
        high, low = x >> low_bits, x & low_mask
        for number, key in enumerate(keys):
            if number % 2 == 0:
                low = low ^ (_mix(high ^ key) & low_mask)
            else:
                high = high ^ (_mix(low ^ key) & high_mask)
        return high << low_bits | low

    slots = feistel(index)
    while bool((outside := slots >= domain).any()):
        slots = torch.where(outside, feistel(slots), slots)
    return slots


def philox(seed: Any, swap: Any, stream: int, block: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of the counter (swap, stream, block) under the key ``seed``: four 32-bit words."""
    c0, c1, c2, c3 = swap & _UINT32, swap >> 32 & _UINT32, stream, block
    k0, k1 = seed & _UINT32, seed >> 32 & _UINT32
    for _ in range(10):
        # Python ints are exact; int64 tensors wrap, which leaves the low 64 bits of the product right.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 & _UINT32 ^ c1 ^ k0, p1 & _UINT32, p0 >> 32 & _UINT32 ^ c3 ^ k1, p0 & _UINT32
        k0, k1 = k0 + 0x9E3779B9 & _UINT32, k1 + 0xBB67AE85 & _UINT32
    return c0, c1, c2, c3


def _mix(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser: each bit of the input reaches each bit of the output."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _UINT32
    x = (x ^ x >> 13) * 0xC2B2AE35 & _UINT32
    return x ^ x >> 16


def _check(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> None:
    capacity, image = storage.shape[0], tuple(storage.shape[1:])
    if storage.dtype not in STORAGE_DTYPES or not storage.is_contiguous():
        raise InputError(f"storage must be contiguous uint8, float16, bfloat16 or float32, got {storage.dtype}")
    if fresh.dtype not in IMAGE_DTYPES:
        raise InputError(f"fresh must be float16, bfloat16 or float32, got {fresh.dtype}")
    if n < 1 or capacity < n:
        raise InputError(f"capacity must be at least n={n} and n at least 1, got capacity {capacity}")
    if tuple(fresh.shape) != (n, *image):
        raise InputError(f"fresh must hold n images of the storage's shape {(n, *image)}, got {tuple(fresh.shape)}")
    if state.dtype != torch.int64 or tuple(state.shape) != (HEADER + capacity,) or not state.is_contiguous():
        raise InputError(
            f"state must be contiguous int64 of length {HEADER + capacity}, got {state.dtype} {tuple(state.shape)}"
        )
    if storage.device != state.device or storage.device != fresh.device:
        raise InputError(f"fresh and state must be on the storage's device {storage.device}, got {fresh.device}")


@cache
def _say_once(reason: str) -> None:
    """pip shows nothing of a build that succeeds: that it left the CUDA kernel out is told here."""
    warnings.warn(f"history_swap takes its reference, which waits for the device: {reason}", stacklevel=4)


def _fake(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    return torch.empty_like(fresh, memory_format=torch.contiguous_format)


# Defined here rather than through torch.library.custom_op: no gradient passes, so its Python layers for autograd and
# views would do nothing but add some 30 us a call, several times the kernel's own time at the paper's eye size.
# _C registers the CPU and CUDA kernels of `history_swap`; every other device, and all where it is missing, gets the
# reference. `history_swap_reference` is the reference by name, for an explicit request.
_library = torch.library.Library("fastsimgan", "FRAGMENT")
for _name in ("history_swap", "history_swap_reference"):
    _library.define(
        f"{_name}(Tensor(a!) storage, Tensor(b!) state, Tensor fresh, int n) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    _library.impl(_name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsimgan::{_name}", _fake, lib=_library)
_op = torch.ops.fastsimgan.history_swap.default
_reference_op = torch.ops.fastsimgan.history_swap_reference.default
