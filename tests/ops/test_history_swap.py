"""history_swap: the slots it picks, what comes back, and that every implementation does the same.

The kernels' CUDA source also runs here with no GPU, one thread a block (tests/cuda_on_host).
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops import history_swap as op
from fastsimgan.ops.history_swap import HEADER, history_swap, new_state, permute, philox

HERE = Path(__file__).resolve().parents[1]
IMPLS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in op.implementations().items()
]
SWAP = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def device_of(impl: str) -> str:
    return "cuda" if impl == "cuda" else "cpu"


def chi_square_p(statistic: float, freedom: int) -> float:
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double()))


def buffer(
    capacity: int, image: tuple[int, ...] = (1, 2, 3), dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """An empty history whose unfilled part holds what no image holds, so that drawing from it shows."""
    storage = torch.full((capacity, *image), math.nan if dtype.is_floating_point else 77, dtype=dtype)
    return storage, new_state(capacity, seed)


# --- the choice of slots


def test_philox_gives_the_published_words() -> None:
    """Random123's known answers for philox4x32-10."""
    assert philox(0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    everything = philox(-1, -1, 0xFFFFFFFF, 0xFFFFFFFF)
    assert everything == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("domain", [*range(1, 70), 127, 128, 129, 1000, 51_200, 2**20])
def test_permute_is_a_bijection(domain: int) -> None:
    slots = permute(torch.arange(domain), domain, seed=domain, swap=3, stream=0)
    assert torch.equal(slots.sort().values, torch.arange(domain))


def test_permute_reaches_the_largest_domain() -> None:
    slots = permute(torch.arange(1000), 2**31 - 1, seed=5, swap=0, stream=1)
    assert len(slots.unique()) == 1000
    assert 0 <= int(slots.min()) and 2**30 < int(slots.max()) < 2**31 - 1


@pytest.mark.parametrize("stream", [0, 1])
def test_slot_frequencies_pass_chi_square_over_100_000_draws(stream: int) -> None:
    capacity, n, swaps = 997, 100, 1000
    index, swap = torch.arange(n)[None], torch.arange(swaps)[:, None]
    slots = permute(index, capacity, torch.full_like(swap, 1234), swap, stream)
    assert all(len(row.unique()) == n for row in slots)  # no draw repeats a slot
    counts = np.bincount(slots.flatten().numpy(), minlength=capacity)
    # Drawing without replacement makes counts vary less than a multinomial's, by this factor.
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum() * (capacity - 1) / (capacity - n)
    assert 1e-3 < chi_square_p(statistic, capacity - 1) < 1 - 1e-3


@pytest.mark.parametrize(("capacity", "n"), [(2, 2), (3, 3), (4, 2), (5, 2), (6, 3), (8, 3), (16, 2), (33, 2)])
def test_every_ordered_choice_is_as_likely_in_small_buffers(capacity: int, n: int) -> None:
    swap = torch.arange(100_000)[:, None]
    slots = permute(torch.arange(n)[None], capacity, torch.full_like(swap, 11), swap, 0)
    code = (slots * capacity ** torch.arange(n)).sum(1)
    counts = np.bincount(code.numpy(), minlength=capacity**n)
    choices = math.perm(capacity, n)
    assert (counts > 0).sum() == choices
    expected = len(slots) / choices
    assert chi_square_p(((counts[counts > 0] - expected) ** 2).sum() / expected, choices - 1) > 1e-3


def test_what_is_drawn_and_what_is_replaced_are_independent() -> None:
    capacity, n = 200, 50
    swap = torch.arange(4000)[:, None]
    seed, index = torch.zeros_like(swap), torch.arange(n)[None]
    drawn, replaced = (permute(index, capacity, seed, swap, stream) for stream in (0, 1))
    both = (drawn[:, :, None] == replaced[:, None, :]).sum((1, 2)).double()
    mean = n * n / capacity  # of the hypergeometric distribution
    variance = mean * (1 - n / capacity) * (capacity - n) / (capacity - 1)
    assert abs(both.mean() - mean) < 4 * math.sqrt(variance / len(both))


@pytest.mark.skipif(op.implementations()["cpp"] is not None, reason=str(op.implementations()["cpp"]))
def test_compiled_sampler_picks_the_reference_slots_in_10_000_states() -> None:
    from fastsimgan import _C

    choose = torch.Generator().manual_seed(0)
    for case in range(100):
        capacity = int(torch.randint(1, 2 ** (case % 30 + 1), (), generator=choose))
        n = int(torch.randint(1, min(capacity, 24) + 1, (), generator=choose))
        empty = int(torch.randint(0, n + 1, (), generator=choose)) if case % 2 else 0
        fill = capacity - empty
        appended, filled = min(n, empty), min(capacity, fill + n)
        seeds = torch.randint(-(2**63), 2**63 - 1, (100, 1), generator=choose)
        swaps = torch.randint(0, 2**40, (100, 1), generator=choose)
        index = torch.arange(n)[None]
        drawn = permute(index, filled, seeds, swaps, 0)
        written = torch.arange(fill, filled).expand(100, -1)
        if appended < n:
            written = torch.cat([written, permute(index[:, : n - appended], fill, seeds, swaps, 1)], dim=1)
        for row in range(100):
            tasks = _C.tasks(int(seeds[row]), int(swaps[row]), fill, capacity, n)
            assert {image: slot for slot, image, _ in tasks if image >= 0} == dict(enumerate(written[row].tolist()))
            assert {place: slot for slot, _, place in tasks if place >= 0} == dict(enumerate(drawn[row].tolist()))
            assert len({slot for slot, *_ in tasks}) == len(tasks)  # no two tasks touch one slot


# --- what goes in and comes out


def check_history(swap: SWAP, capacity: int, n: int, swaps: int) -> None:
    """Drive ``swap`` with images that each hold one number, and follow what the storage must hold."""
    storage, state = buffer(capacity)
    held: set[int] = set()  # the numbers stored
    choices = []
    for call in range(swaps):
        numbers = range(call * n, call * n + n)
        fresh = torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(n, 1, 2, 3) / 2**20
        storage_before, held_before = storage.clone(), set(held)
        drawn = swap(storage, state, fresh.contiguous(), n)
        assert drawn.shape == fresh.shape and drawn.dtype == fresh.dtype
        assert torch.equal(drawn, drawn[:, :1, :1, :1].expand_as(drawn)), "drawn images are mixed from several"
        values = (drawn[:, 0, 0, 0] * 2**20).tolist()
        assert len(set(values)) == n, "an image was drawn twice"

        appended = min(n, capacity - len(held))
        assert set(values) <= held | set(numbers[:appended]), "drawn: never stored, or stored too late"
        filled = storage[: len(held) + appended]
        assert torch.equal(filled, filled[:, :1, :1, :1].expand_as(filled)), "a write changed single pixels"
        assert torch.equal(storage[len(filled) :].isnan(), storage_before[len(filled) :].isnan())
        now = set((filled[:, 0, 0, 0] * 2**20).tolist())
        assert set(numbers) <= now, "a fresh image was not stored"
        assert now <= held_before | set(numbers)
        assert len(now) == min(capacity, len(held_before) + n), "an image was stored twice"
        assert int(state[op.FILL]) == len(now) and int(state[op.SWAPS]) == call + 1
        held = {int(value) for value in now}
        if len(held_before) == capacity:
            choices.append((storage_before != storage)[:, 0, 0, 0].nonzero().flatten().tolist())
    if n < capacity and len(choices) > 8:
        assert len(set(map(tuple, choices))) > 1, "the same slots are replaced every time"


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_capacity_from_n_to_10n_plus_3(n: int, impl: str) -> None:
    after_full = 3 if impl == "reference" else 20  # the walk through tiny domains is slow in Python
    for capacity in range(n, 10 * n + 4):
        check_history(lambda *a: history_swap(*a, impl=impl), capacity, n, swaps=capacity // n + after_full)


def forgets(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    """Public ports' mistake 1: the result of the append is dropped, so nothing is ever stored."""
    return history_swap(storage.clone(), state, fresh, n)


def stuck(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    """Mistake 5: always the same slots, since the counter does not move on."""
    swap = int(state[op.SWAPS])
    state[op.SWAPS] = 0
    drawn = history_swap(storage, state, fresh, n)
    state[op.SWAPS] = swap + 1
    return drawn


def pixels(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    """Mistake 5: a write changes single pixels, not images."""
    before = storage.clone()
    drawn = history_swap(storage, state, fresh, n)
    if int(state[op.FILL]) == len(storage):
        storage[..., 1:] = before[..., 1:]
    return drawn


def needs_a_multiple(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
    """Mistake 5: crashes when the capacity is not a multiple of what is pushed."""
    fill = int(state[op.FILL])
    if fill < len(storage):
        storage[fill : fill + n] = fresh
    return history_swap(storage, state, fresh, n)


@pytest.mark.parametrize("mistake", [forgets, stuck, pixels, needs_a_multiple])
def test_public_mistakes_are_caught(mistake: SWAP) -> None:
    """Mistakes 1 and 5 of CONTRIBUTING.md's list, put back, fails the check that the op passes."""
    check_history(history_swap, capacity=23, n=4, swaps=40)
    with pytest.raises((AssertionError, RuntimeError)):
        check_history(mistake, capacity=23, n=4, swaps=40)


@pytest.mark.parametrize("dtype", op.STORAGE_DTYPES)
def test_what_was_pushed_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    storage, state = buffer(40, (3, 4, 5), dtype)
    noise = torch.randint(0, 256, (200, 3, 4, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = op.decode(noise, torch.float32).to(torch.float32 if dtype == torch.uint8 else dtype).float()
    known = {image.numpy().tobytes() for image in images}
    for start in range(0, 200, 10):
        drawn = history_swap(storage, state, images[start : start + 10], 10)
        assert {image.numpy().tobytes() for image in drawn} <= known


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_white_stays_white_and_values_round_to_nearest(impl: str) -> None:
    values = [-7.0, -1.0001, -1.0, -0.9999, 0.0, 0.5, 0.999, 1.0, 1.0001, 300.0, math.inf, -math.inf, math.nan]
    expected = [0, 0, 0, 0, 128, 191, 255, 255, 255, 255, 255, 0, 0]
    storage, state = buffer(1, (1, 1, len(values)), torch.uint8)
    drawn = history_swap(storage, state, torch.tensor(values)[None, None, None], 1, impl)
    assert storage.flatten().tolist() == expected
    assert torch.equal(drawn.flatten(), torch.tensor(expected) / 127.5 - 1)


def test_every_uint8_survives_the_way_out_and_in_again() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(op.encode(op.decode(every, dtype), torch.uint8), every)


def test_ages_count_swaps_since_the_image_was_stored() -> None:
    storage, state = buffer(6)
    for age_sum in (0, None, None):  # first call: every image drawn was stored by it
        history_swap(storage, state, torch.zeros(2, 1, 2, 3), 2)
        assert int(state[op.DRAWN]) == 2
        assert age_sum is None or int(state[op.AGE_SUM]) == age_sum
    assert state[HEADER:].tolist() == [0, 0, 1, 1, 2, 2]
    before = state.clone()
    history_swap(storage, state, torch.zeros(6, 1, 2, 3), 6)  # draws all, replaces all
    assert int(state[op.AGE_SUM]) == int((3 - before[HEADER:]).sum())
    assert state[HEADER:].tolist() == [3] * 6


def test_no_gradient_passes_and_none_is_kept() -> None:
    storage, state = buffer(4)
    fresh = torch.zeros(2, 1, 2, 3, requires_grad=True) * 2
    drawn = history_swap(storage, state, fresh, 2)
    assert not drawn.requires_grad and not storage.requires_grad


def test_any_layout_of_fresh_is_taken() -> None:
    fresh = torch.rand(4, 3, 5, 7)
    results = []
    for given in (
        fresh,
        fresh.to(memory_format=torch.channels_last),
        fresh.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        storage, state = buffer(6, (3, 5, 7))
        results.append((history_swap(storage, state, given, 4), storage[:4].clone()))
        assert results[-1][0].is_contiguous()
    for drawn, stored in results[1:]:
        assert torch.equal(drawn, results[0][0]) and torch.equal(stored, fresh)


# --- implementations agree


def assert_same_as_reference(
    swap: SWAP, dtype: torch.dtype, image_dtype: torch.dtype, image: tuple[int, ...], device: str = "cpu"
) -> None:
    for capacity, n in [(10, 10), (23, 7)]:
        mine, expected = buffer(capacity, image, dtype, seed=-3), buffer(capacity, image, dtype, seed=-3)
        mine = mine[0].to(device), mine[1].to(device)
        for call in range(5):
            torch.manual_seed(call)
            fresh = (torch.randn(n, *image) * 0.8).to(image_dtype)
            drawn = swap(*mine, fresh.to(device), n)
            assert torch.equal(drawn.cpu(), history_swap(*expected, fresh, n, impl="reference"))
            filled = int(expected[1][op.FILL])
            assert torch.equal(mine[0][:filled].cpu(), expected[0][:filled])
            assert torch.equal(mine[1].cpu(), expected[1])


EVERY_TYPE = [(stored, image) for stored in op.STORAGE_DTYPES for image in op.IMAGE_DTYPES]
SHAPES = [(1, 35, 55), (3, 4, 4), (1, 1, 1), (2, 150, 150)]  # odd; multiple of 4; one pixel; more than one CUDA chunk


@pytest.mark.skipif(op.implementations()["cpp"] is not None, reason=str(op.implementations()["cpp"]))
@pytest.mark.parametrize(("stored", "image_dtype"), EVERY_TYPE)
def test_cpp_is_the_reference_bit_for_bit(stored: torch.dtype, image_dtype: torch.dtype) -> None:
    for image in SHAPES:
        assert_same_as_reference(lambda *a: history_swap(*a, impl="cpp"), stored, image_dtype, image)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA source, compiled for the CPU by tests/cuda_on_host."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_host") / "history_swap.so"
    torch_include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{HERE / 'cuda_on_host'}"]
    command += [f"-I{HERE.parent / 'csrc'}", f"-isystem{torch_include}", "-o", str(library)]
    subprocess.run([*command, str(HERE / "cuda_on_host" / "history_swap.cpp")], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.history_swap.argtypes = [
        pointer, ctypes.c_int, pointer, pointer, pointer, ctypes.c_int, count, count, count, ctypes.c_bool,
    ]  # fmt: skip
    loaded.history_swap.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("reverse", [False, True], ids=["blocks in order", "blocks in reverse"])
@pytest.mark.parametrize(("stored", "image_dtype"), EVERY_TYPE)
def test_cuda_source_on_the_host_is_the_reference_bit_for_bit(
    cuda_on_host: ctypes.CDLL, stored: torch.dtype, image_dtype: torch.dtype, reverse: bool
) -> None:
    kinds = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}  # csrc's Dtype

    def swap(storage: Tensor, state: Tensor, fresh: Tensor, n: int) -> Tensor:
        drawn = torch.full_like(fresh, math.nan)
        error = cuda_on_host.history_swap(
            storage.data_ptr(), kinds[storage.dtype], state.data_ptr(), fresh.data_ptr(), drawn.data_ptr(),
            kinds[fresh.dtype], len(storage), fresh[0].numel(), n, reverse,
        )  # fmt: skip
        assert error is None
        return drawn

    for image in SHAPES:
        assert_same_as_reference(swap, stored, image_dtype, image)


# --- the op's contract


@pytest.mark.parametrize("overload", [op._op, op._reference_op], ids=["history_swap", "history_swap_reference"])
@pytest.mark.parametrize("dtype", op.STORAGE_DTYPES)
def test_opcheck(overload: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    for fill_first in (False, True):
        storage, state = buffer(5, (1, 3, 7), dtype)
        if fill_first:
            history_swap(storage, state, torch.zeros(5, 1, 3, 7), 5)
        torch.library.opcheck(overload, (storage, state, torch.rand(3, 1, 3, 7), 3))


@pytest.mark.parametrize("impl", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(impl: str) -> None:
    def step(storage: Tensor, state: Tensor, fresh: Tensor) -> Tensor:
        return history_swap(storage, state, fresh * 0.5, 3, impl) * 2

    compiled = torch.compile(step, fullgraph=True)
    mine, expected = buffer(7, (1, 3, 5)), buffer(7, (1, 3, 5))
    for _ in range(4):
        fresh = torch.rand(3, 1, 3, 5)
        assert torch.equal(compiled(*mine, fresh), step(*expected, fresh))
    assert torch.equal(mine[0], expected[0]) and torch.equal(mine[1], expected[1])


def test_wrong_arguments_are_named() -> None:
    fresh = torch.zeros(3, 1, 2, 3)
    storage, state = buffer(7)
    for arguments, message in [
        ((*buffer(2), fresh, 3), r"capacity must be at least n=3 and n at least 1, got capacity 2"),
        ((storage, state, fresh, 2), r"fresh must hold n images .* \(2, 1, 2, 3\), got \(3, 1, 2, 3\)"),
        ((storage, state, fresh[..., 1:], 3), r"fresh must hold n images"),
        ((storage, state, fresh.double(), 3), r"fresh must be float16, bfloat16 or float32, got torch.float64"),
        ((storage.double(), state, fresh, 3), r"storage must be contiguous uint8, .* got torch.float64"),
        ((storage, state[1:], fresh, 3), r"state must be contiguous int64 of length 14"),
        ((storage, state, fresh.to("meta"), 3), r"on the storage's device cpu, got meta"),
        ((storage, state, fresh, 3, "fast"), r"impl must be one of auto, cuda, cpp, reference, got 'fast'"),
    ]:
        with pytest.raises(InputError, match=message):
            history_swap(*arguments)
    assert int(state[op.SWAPS]) == 0 and storage.isnan().all()


def test_a_request_that_cannot_be_met_says_why() -> None:
    with pytest.raises(UnavailableError, match=r"history_swap impl='cuda': "):
        history_swap(*buffer(7), torch.zeros(3, 1, 2, 3), 3, "cuda")  # CPU tensors, wherever this runs


def test_compiled_op_refuses_what_would_leave_its_memory() -> None:
    """Called past the Python checks."""
    if op.implementations()["cpp"] is not None:
        pytest.skip(str(op.implementations()["cpp"]))
    storage, state = buffer(7)
    for fresh, n in [(torch.zeros(3, 1, 2, 3), 4), (torch.zeros(8, 1, 2, 3), 8), (torch.zeros(3, 1, 2, 2), 3)]:
        with pytest.raises(RuntimeError):
            op._op(storage, state, fresh, n)
    with pytest.raises(RuntimeError):
        op._op(storage, state[1:], torch.zeros(3, 1, 2, 3), 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_source_compiles_for_every_architecture_and_spills_nothing() -> None:
    from bench.aot_cuda import rows

    table = rows((80, 90, 100))
    assert {row.arch for row in table} == {"sm_80", "sm_90", "sm_100"}
    # 4 storage types, 3 image types, aligned or not.
    assert len(table) == 3 * 24
    assert all(row.spills == 0 for row in table)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("stored", "image_dtype"), EVERY_TYPE)
def test_gpu_equals_cpu_bit_for_bit(stored: torch.dtype, image_dtype: torch.dtype) -> None:
    for image in [*SHAPES, (1, 224, 224)]:
        assert_same_as_reference(lambda *a: history_swap(*a, impl="cuda"), stored, image_dtype, image, "cuda")


@pytest.mark.gpu
def test_gpu_captured_graph_draws_anew_on_every_replay() -> None:
    storage, state = (tensor.cuda() for tensor in buffer(50, dtype=torch.uint8))
    expected = buffer(50, dtype=torch.uint8)
    fresh = torch.zeros(8, 1, 2, 3, device="cuda")
    history_swap(storage, state, fresh, 8)  # loads the kernel before capture
    history_swap(*expected, fresh.cpu(), 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = history_swap(storage, state, fresh, 8)
    for call in range(20):
        fresh.fill_(call / 20)
        graph.replay()
        assert torch.equal(drawn.cpu(), history_swap(*expected, fresh.cpu(), 8))
        assert torch.equal(state.cpu(), expected[1])


@pytest.mark.gpu
def test_gpu_never_waits_for_the_host() -> None:
    storage, state = (tensor.cuda() for tensor in buffer(50))
    fresh = torch.zeros(8, 1, 2, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            history_swap(storage, state, fresh, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_is_one_launch() -> None:
    storage, state = (tensor.cuda() for tensor in buffer(50))
    fresh = torch.zeros(8, 1, 2, 3, device="cuda")
    history_swap(storage, state, fresh, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        history_swap(storage, state, fresh, 8)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "history_swap_kernel" in kernels[0]


@pytest.mark.gpu
def test_gpu_addresses_more_than_2_to_the_31_elements() -> None:
    image = (1, 1024, 1024)
    storage, state = torch.zeros(2100, *image, dtype=torch.uint8, device="cuda"), new_state(2100, 0, "cuda")
    state[op.FILL] = 2100
    fresh = torch.ones(1, *image, device="cuda")
    for _ in range(300):
        history_swap(storage, state, fresh, 1)
    white = (storage == 255).flatten(1)
    whole = white.all(1)
    assert torch.equal(whole, white.any(1))
    assert int(whole.nonzero().max()) * 1024 * 1024 > 2**31


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_compute_sanitizer_is_clean(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch; from fastsimgan.training.history_buffer import HistoryBuffer\n"
        "for shape in [(1, 35, 55), (1, 64, 64)]:\n"
        "    b = HistoryBuffer(23, shape, torch.uint8, 'cuda', impl='cuda')\n"
        "    for _ in range(6): b.swap(torch.zeros(5, *shape, device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-2000:]
