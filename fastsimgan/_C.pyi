"""The compiled part (csrc/python_module.cpp). Importing it registers the C++ and CUDA kernels of the ops."""

def build_info() -> dict[str, str | bool]:
    """What it was built with: torch, cuda, avx2 and amx (True or False), no_cuda (why not), nvcc, cuda_architectures,
    compiler."""

def tasks(seed: int, swap: int, fill: int, capacity: int, n: int) -> list[tuple[int, int, int]]:
    """The (slot, fresh, drawn) of every task of one history_swap; -1: not written, not drawn."""
