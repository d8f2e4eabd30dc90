"""hypothesis; on a machine without it a stand-in, under which its tests are collected and skip with their reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Anything:
        """A strategy, a function that makes one, or a decorator around one: whatever is asked of it is one again."""

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

        def __getattr__(self, name: str) -> Any:
            return self

        def __or__(self, other: Any) -> Any:
            return self

        def __iter__(self) -> Any:
            return iter(())

    st = HealthCheck = _Anything()

    def settings(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda test: test

    def given(*_: Any, **__: Any) -> Callable[[Any], Any]:
        def skipped() -> None:
            pytest.skip("hypothesis is not installed")

        def wrap(test: Any) -> Any:
            # its own parameters would be taken for fixtures
            skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
            return skipped

        return wrap


__all__ = ["HealthCheck", "given", "settings", "st"]
