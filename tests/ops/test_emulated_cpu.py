"""The blocks' sources for every instruction set, on a processor that is emulated where this one lacks it.

And the emulation itself: each intrinsic against the instruction where this processor has it, the matrix unit against
what Intel's manual says of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import emulated_cpu
from tests.emulated_cpu import EVERYTHING, HERE, ROOT, environment, ops, probes
from tests.emulated_cpu.probing import TILES, VECTORS, called, numbers, one_nan, tiles

pytestmark = pytest.mark.skipif(emulated_cpu.missing() is not None, reason=str(emulated_cpu.missing()))


def flags() -> set[str]:
    """What Linux says of this processor's instructions; nothing on others."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return set(found[1].split()) if found else set()


LACKING = sorted({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"} - flags())


def test_every_intrinsic_of_the_sources_is_emulated_and_compared() -> None:
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")]
    used = set(re.findall(r"\b_(?:mm\d*|tile)_\w+(?=\()", "".join(path.read_text() for path in sources)))
    emulated = set(re.findall(r"\b_(?:mm\d*|tile)_\w+(?=\()", (HERE / "immintrin.h").read_text()))
    assert len(used) > 40 and used == set(VECTORS) | set(TILES)
    assert emulated == used


# -- vectors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return ctypes.CDLL(str(probes("emulated")))


@pytest.fixture(scope="module")
def native() -> ctypes.CDLL:
    return ctypes.CDLL(str(probes("native")))


@pytest.mark.skipif(bool(LACKING), reason=f"no instructions to compare with: the processor lacks {', '.join(LACKING)}")
@pytest.mark.parametrize("name", VECTORS)
def test_an_intrinsic_gives_the_processors_bits(name: str, emulated: ctypes.CDLL, native: ctypes.CDLL) -> None:
    given = numbers(emulated, name, 20_000)
    ours, theirs = (called(library, name, given) for library in (emulated, native))
    assert np.array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 20 or "setzero" in name  # it was not for nothing


@pytest.mark.skipif(bool(LACKING), reason=f"no instructions to compare with: the processor lacks {', '.join(LACKING)}")
def test_every_upper_half_of_a_float_is_rounded_to_bfloat16_as_the_processor_does(
    emulated: ctypes.CDLL, native: ctypes.CDLL
) -> None:
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    words = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | low).ravel()
    given = words.reshape(-1, 2, 16).view(np.uint8)
    name = "_mm512_cvtne2ps_pbh"
    assert np.array_equal(called(emulated, name, given), called(native, name, given))


# -- the matrix unit ---------------------------------------------------------------------------------------------------


def configuration(rows: int = 16, depth: int = 64, columns: int = 64) -> np.ndarray:
    """64 bytes for `rows` x `depth` bytes times `depth / 4` rows of `columns` bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    sizes = [(rows, columns), (rows, depth), (depth // 4, columns)]
    config[16:22].view(np.uint16)[:] = [width for _, width in sizes]
    config[48:51] = [height for height, _ in sizes]
    return config


LEAST = np.longdouble(2.0**-126)  # of float32's normal numbers


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x).astype(np.float32)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return flushed((bits.astype(np.uint32) << 16).view(np.float32))


def as_the_manual_says(before: np.ndarray, left: np.ndarray, right: np.ndarray, rows: int, depth: int) -> np.ndarray:
    """TDPBF16PS, place by place: float32 [16, 16], bfloat16 bits [16, 32] and [16, 32]."""

    def multiply_add(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        exact = a.astype(np.longdouble) * b.astype(np.longdouble) + total.astype(np.longdouble)
        # 24 bits of any exponent would round what is less than this to a number below the normal ones
        small = np.abs(exact) < LEAST - np.longdouble(2.0**-151)
        return np.where(small, np.copysign(np.float32(0), exact), exact).astype(np.float32)

    result = np.zeros((16, 16), np.float32)
    with np.errstate(all="ignore"):
        for m in range(rows):
            sums = np.zeros((2, 16), np.float32)
            for k in range(depth):
                for i in range(2):
                    factor = bfloat16(left[m, 2 * k + i : 2 * k + i + 1])
                    sums[i] = multiply_add(sums[i], factor, bfloat16(right[k, i::2]))
            result[m] = flushed(flushed(before[m]) + flushed(sums[0] + sums[1]))
    return result


@pytest.mark.parametrize("kind", ["ordinary", "small", "any bits"])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (5, 7, 11), (1, 1, 1)])
def test_products_of_bfloat16_are_added_up_in_the_manuals_order(
    emulated: ctypes.CDLL, kind: str, rows: int, depth: int, columns: int
) -> None:
    random = np.random.default_rng(3)
    config = configuration(rows, 4 * depth, 4 * columns)
    for _ in range(20):
        sizes = [(16, 16), (16, 32), (16, 32)]
        if kind == "any bits":
            before = random.integers(0, 2**32, sizes[0], np.uint32).view(np.float32)
            left, right = (random.integers(0, 2**16, size, np.uint16) for size in sizes[1:])
        else:
            spread = 1 if kind == "ordinary" else np.exp2(random.integers(-75, -60, 32).astype(np.float32))
            left, right = (
                ((random.standard_normal(size) * spread).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                for size in sizes[1:]
            )
            before = (random.standard_normal((16, 16)) * (1 if kind == "ordinary" else 2.0**-126)).astype(np.float32)
        out = tiles(emulated, "_tile_dpbf16ps", config, before, left, right)[:1024].view(np.float32).reshape(16, 16)
        expected = as_the_manual_says(before, left, right, rows, depth)
        # what is beyond a tile's rows and columns is not stored
        assert np.array_equal(one_nan(out[:rows, :columns]), one_nan(expected[:rows, :columns]))
        assert bool((out.view(np.uint32)[rows:] == 0xA5A5A5A5).all())
        if kind == "small" and depth == 16:
            assert bool(((expected == 0) & (before != 0)).any()) and bool((expected != 0).any())


@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (5, 7, 11)])
def test_products_of_bytes_are_added_up_without_saturation(
    emulated: ctypes.CDLL, rows: int, depth: int, columns: int
) -> None:
    random = np.random.default_rng(4)
    before = random.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
    left, right = random.integers(0, 256, (2, 16, 64), np.uint8)
    left[0], right[:, :4] = 255, 128  # the largest sums
    out = tiles(emulated, "_tile_dpbusd", configuration(rows, 4 * depth, 4 * columns), before, left, right)
    out = out[:1024].view(np.int32).reshape(16, 16)
    fours = right[:depth, : 4 * columns].view(np.int8).reshape(depth, columns, 4).transpose(0, 2, 1)
    products = left[:rows, : 4 * depth].astype(np.int64) @ fours.reshape(4 * depth, columns).astype(np.int64)
    assert np.array_equal(out[:rows, :columns], (before[:rows, :columns] + products).astype(np.int32))


def test_tiles_are_loaded_stored_zeroed_configured_and_released(emulated: ctypes.CDLL) -> None:
    random = np.random.default_rng(5)
    three = [random.integers(0, 256, (16, 64), np.uint8) for _ in range(3)]
    config = configuration(5, 28, 44)
    config[1] = 0
    kept = three[0][:5, :44]
    for name, expected in [
        ("_tile_loadd", kept),
        ("_tile_stored", kept),
        ("_tile_zero", np.zeros_like(kept)),
        ("_tile_loadconfig", three[1][:5, :44]),  # it empties the tiles; then another is loaded
        ("_tile_release", np.zeros_like(kept)),
        ("_tile_storeconfig", kept),
    ]:
        out = tiles(emulated, name, config, *three)
        assert np.array_equal(out[:1024].reshape(16, 64)[:5, :44], expected), name
        if name == "_tile_storeconfig":
            assert np.array_equal(out[1024:], config)
        if name == "_tile_release":
            assert not out[1024:].any()


@pytest.mark.skipif("amx_tile" not in flags(), reason="no instructions to compare with: the processor lacks AMX")
@pytest.mark.parametrize("name", TILES)
def test_the_matrix_unit_gives_the_processors_bits(name: str, emulated: ctypes.CDLL) -> None:
    from fastsimgan.ops import residual_block

    if residual_block.implementations()["amx"] is not None:  # asking for it is what gets Linux's leave
        pytest.skip(str(residual_block.implementations()["amx"]))
    native = ctypes.CDLL(str(probes("amx")))
    random = np.random.default_rng(6)
    for config in (configuration(), configuration(5, 28, 44)):
        for _ in range(200):
            three = [random.integers(0, 2**32, (16, 16), np.uint32) for _ in range(3)]
            if name == "_tile_dpbf16ps":  # of ordinary size: any bits are NaN before long
                three = [random.standard_normal((16, 16)).astype(np.float32).view(np.uint32) for _ in range(3)]
            assert np.array_equal(tiles(emulated, name, config, *three), tiles(native, name, config, *three))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({0: 0}, "tileloadd: tiles must be configured first"),
        ({0: 2}, "ldtilecfg: the palette must be 0 or 1"),
        ({5: 1}, "ldtilecfg: reserved bytes must be 0"),
        ({48: 17}, "ldtilecfg: tiles have at most 16 rows of 64 bytes"),
        ({32: 4, 56: 4}, "ldtilecfg: there are 8 tiles"),
        ({50: 0}, "ldtilecfg: a tile with rows must have columns"),
        ({50: 3}, "tdpbf16ps: the tiles' sizes do not fit"),
    ],
)
def test_what_the_processor_traps_on_ends_the_process(change: dict[int, int], why: str) -> None:
    config = configuration()
    for at, value in change.items():
        config[at] = value
    code = (
        "import ctypes, sys\n"
        f"given = bytes.fromhex('{config.tobytes().hex()}') + bytes(3072)\n"
        f"ctypes.CDLL({str(probes('emulated'))!r}).tiles_tile_dpbf16ps(given, bytes(2048))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and f"emulated processor: {why}" in done.stderr


# -- the blocks --------------------------------------------------------------------------------------------------------


def files_about_the_blocks(folder: str = "") -> list[str]:
    """Every file under tests/``folder`` with tests that ask for VNNI or AMX."""
    pattern = re.compile(r"""implementations\(\)\[["'](amx|vnni)["']\]""")
    files = [path for path in (ROOT / "tests" / folder).rglob("test_*.py") if path != Path(__file__).resolve()]
    return [str(path) for path in files if pattern.search(path.read_text())]


def run_tests(has: str, form: str, files: list[str], keywords: str) -> str:
    """pytest's last lines from a process on an emulated processor; fails with its output where a test there failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "tests.emulated_cpu.plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", keywords, *files]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"OMP_NUM_THREADS": "1"} | environment(has, form)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


def counted(output: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}", output.strip().splitlines()[-1])
    return int(found[1]) if found else 0


def test_every_test_of_the_blocks_passes_on_a_processor_with_everything() -> None:
    """AVX2 where the maps ask for 8 lanes, AVX-512, VNNI, AMX in bfloat16 and in 8 bits: no test of them is skipped."""
    output = run_tests(EVERYTHING, "emulated", files_about_the_blocks("ops"), "not triton")
    assert "SKIPPED" not in output, output[-6000:]
    assert counted(output, "passed") > 80


@pytest.mark.slow
def test_every_test_of_what_uses_the_blocks_passes_on_a_processor_with_everything() -> None:
    files = sorted({*files_about_the_blocks()} - {*files_about_the_blocks("ops")})
    output = run_tests(EVERYTHING, "emulated", files, "int8 or amx or vnni")
    assert "SKIPPED" not in output, output[-6000:]
    assert counted(output, "passed") > 6


def test_every_test_of_the_block_in_float32_passes_on_a_processor_with_avx2_alone() -> None:
    """With AVX-512 only maps that are no multiple of 16 go through the kernels for AVX2."""
    files = [path for path in files_about_the_blocks("ops") if path.endswith("test_residual_block.py")]
    output = run_tests("avx2", "emulated", files, "not triton and not amx and not reference")
    assert "SKIPPED" not in output, output[-6000:]
    assert counted(output, "passed") > 30


def inside(what: str, *arguments: str, has: str = EVERYTHING, form: str = "emulated") -> str:
    command = [sys.executable, "-m", "tests.emulated_cpu.inside", what, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(has, form), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"nothing to compare with: the processor lacks {', '.join(LACKING)}")
def test_the_blocks_give_the_bits_that_the_processor_gives(tmp_path: Path) -> None:
    """Results and gradients, of the sources compiled for the processor but for fusing products with additions."""
    for form in ("emulated", "native"):
        inside("results", str(tmp_path / form), has="avx2 avx512 vnni", form=form)
    ours, theirs = ((tmp_path / form).read_bytes() for form in ("emulated", "native"))
    assert len(ours) > 500_000 and ours == theirs


def test_the_matrix_unit_is_used_by_amx_alone_and_left_as_it_was() -> None:
    """PyTorch configures it once in a thread; the emulated one, of which PyTorch knows nothing, is asked itself."""
    inside("tiles")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ("avx2", "cpp reference / reference"),
        ("avx2 avx512 vnni", "cpp reference / vnni reference"),
        (EVERYTHING, "amx cpp reference / amx vnni reference"),
    ],
)
def test_an_emulated_processor_has_what_it_is_said_to_have(has: str, expected: str) -> None:
    assert " / ".join(inside("has", has=has).replace("triton ", "").splitlines()) == expected


@pytest.mark.slow
def test_the_blocks_touch_nothing_but_their_own_memory_and_do_nothing_undefined() -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over every source; memory that is handed out is full of NaN."""
    done = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(done.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    output = run_tests(
        EVERYTHING, "sanitized", files_about_the_blocks("ops"), "not triton and not opcheck and not threads"
    )
    assert "SKIPPED" not in output and counted(output, "passed") > 70, output[-6000:]
    # and that they would be seen
    native = ops("sanitized")
    assert b"__asan_report" in native.read_bytes() and b"__ubsan_handle" in native.read_bytes()


@pytest.mark.slow
def test_the_emulation_is_the_same_under_sanitizers(emulated: ctypes.CDLL, tmp_path: Path) -> None:
    """GCC 12 has compiled parts of it to other results there."""
    for name in VECTORS:
        np.save(tmp_path / f"{name}.npy", numbers(emulated, name, 500))
    command = [sys.executable, "-m", "tests.emulated_cpu.probing", str(probes("sanitized")), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment(form="sanitized"))
    for name in VECTORS:
        ours = called(emulated, name, np.load(tmp_path / f"{name}.npy"))
        assert np.array_equal(ours, np.load(tmp_path / f"{name}.out.npy")), name
