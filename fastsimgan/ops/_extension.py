"""The compiled extension, `fastsimgan._C`: importing it registers its kernels for the ops that this package defines."""

from __future__ import annotations

from typing import Any

try:
    from fastsimgan._C import build_info

    BUILD_INFO: dict[str, Any] | None = build_info()
    NOT_LOADED: str | None = None
except ImportError as error:
    BUILD_INFO = None
    NOT_LOADED = f"fastsimgan._C cannot be imported: {error}"


def lacks(part: str, without: str) -> str | None:
    """Why a part of the extension is not there: None where it is.

    Args:
        part: a key of `BUILD_INFO` that says whether it was built.
        without: what it needs, and why a build may have left it out.
    """
    if BUILD_INFO is None:
        return NOT_LOADED
    return None if BUILD_INFO[part] else f"fastsimgan._C was built without {without}"
