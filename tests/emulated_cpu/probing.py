"""probes.cpp from Python: what is probed, what the probes are given, and what they give.

``python -m tests.emulated_cpu.probing LIBRARY FOLDER``: calls each vector probe of the library with FOLDER/NAME.npy and
writes FOLDER/NAME.out.npy.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import numpy as np

from tests.emulated_cpu import HERE

_SOURCE = (HERE / "probes.cpp").read_text()
VECTORS = sorted(set(re.findall(r"(?:PROBE|GIVES|FLOATS_\d|WHOLES_\d)\((_mm\w+)", _SOURCE)))
"""Intrinsics for vectors."""
TILES = sorted(set(re.findall(r"TILES\((_tile\w+)", _SOURCE)))
"""Those of the matrix unit."""

_POINTER = ctypes.POINTER(ctypes.c_uint8)


def numbers(library: ctypes.CDLL, name: str, calls: int) -> np.ndarray:
    """Bytes for ``calls`` calls: ordinary floats, any bits and what is special, in all lanes, each with each other."""
    random = np.random.default_rng(sum(name.encode()))
    words = random.integers(0, 2**32, (calls, getattr(library, f"takes_{name}")(), 16), np.uint32)
    ordinary = (random.standard_normal(words.shape) * 200).astype(np.float32).view(np.uint32)
    special = [0, 0x3F800000, 0x3F000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001]  # ... inf and two NaNs
    special += [0x00000001, 0x007FFFFF, 0x00800000, 0x00000080, 0x7FFF8000]  # denormals; a NaN in its last bits
    special += [0x3FC00000, 0x40200000, 0x437F0000, 0x437F8000, 0x4EFFFFFF, 0x4F000000]  # 1.5, 2.5, 255, 255.5, 2^31
    special += [0x3F808000, 0x3F818000, 0x7F7F8000]  # halfway between two bfloat16
    special += [word | 0x80000000 for word in special]
    specials = random.choice(np.array(special, np.uint32), words.shape)
    kind = random.integers(0, 3, words.shape)
    return np.where(kind == 0, words, np.where(kind == 1, ordinary, specials)).view(np.uint8)


def called(library: ctypes.CDLL, name: str, given: np.ndarray) -> np.ndarray:
    """64 bytes for each call of a vector's probe.

    NaNs that sums and products make are all one: which of two operands they keep decides about no block's result.
    """
    given = np.ascontiguousarray(given)
    out = np.full((len(given), 64), 0xA5, np.uint8)
    function = getattr(library, f"probe_{name}")
    function(given.ctypes.data_as(_POINTER), out.ctypes.data_as(_POINTER), ctypes.c_int64(len(given)))
    return one_nan(out.view(np.float32)) if name in ("_mm512_add_ps", "_mm512_mul_ps") else out


def tiles(library: ctypes.CDLL, name: str, config: np.ndarray, *three: np.ndarray) -> np.ndarray:
    """What is left in the first of three tiles, 16 rows of 64 bytes; then 64 bytes that the probe itself wrote."""
    given = np.concatenate([config, *(np.ascontiguousarray(tile).view(np.uint8).ravel() for tile in three)])
    out = np.full(16 * 64 + 64, 0xA5, np.uint8)
    getattr(library, f"tiles{name}")(given.ctypes.data_as(_POINTER), out.ctypes.data_as(_POINTER))
    return out


def one_nan(x: np.ndarray) -> np.ndarray:
    """The bits of float32, the same for all NaNs."""
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


if __name__ == "__main__":
    library, folder = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
    for name in VECTORS:
        np.save(folder / f"{name}.out.npy", called(library, name, np.load(folder / f"{name}.npy")))
