"""How OpenMP's threads wait for each other. Must be settled before torch is imported, so it imports nothing.

At the end of a parallel loop they spin, by default for milliseconds, and an operation of torch is one loop or more. On
a machine of its own that is the fastest way to wait. As soon as anything else wants the cores, a thread that spins
keeps from its core the very thread that it waits for. Spinning briefly and then sleeping costs next to nothing where it
is quiet: `python -m bench.bench_waiting` measures both.
"""

from __future__ import annotations

import os
import sys

# libgomp (torch's wheels on Linux): turns of its loop. LLVM's and Intel's OpenMP (conda, macOS): milliseconds.
SETTINGS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


def wait_briefly() -> None:
    """Set `SETTINGS` in this process's environment, where its children find them too, unless they are the user's.

    Nothing changes where torch is loaded already, since its OpenMP has read them, nor where OMP_WAIT_POLICY is set,
    which says the same in other words. A setting that is there stays.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
