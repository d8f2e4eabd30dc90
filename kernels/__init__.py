"""Triton kernels and their launchers, nothing else. Reached through ``fastsimgan.ops``; needs triton."""
