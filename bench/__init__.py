"""Benchmarks and checks. Imported before torch, so that threads wait for each other as in the commands."""

import fastsimgan  # noqa: F401
