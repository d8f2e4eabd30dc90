"""Figures by matplotlib, which is imported where one is drawn, and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimgan.errors import UnavailableError

COLOURS = ("#888888", "#c2410c", "#a16207", "#1d6fd1", "#7c3aed", "#15803d")  # read on white and on near-black
_INK = "#010203"  # stands for the page's own colour of text until the drawing is text itself


def check_matplotlib(need: str) -> None:
    """Raise UnavailableError if matplotlib is not installed, which ``need`` (such as "--plot") needs."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f'{need} needs matplotlib: pip install "fastsimgan[eval]"') from error


def figure(need: str, width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of that size in inches, of no window. Raises as `check_matplotlib` does."""
    check_matplotlib(need)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves_svg(lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], across: str) -> str:
    """Curves as an ``<svg>`` to stand in a page, in the page's own colour of text; both axes begin at 0.

    Args:
        lines: by name, each ``(x, y)`` of as many finite numbers, at least one; the n-th has the n-th of `COLOURS`.
        across: what x is. What y is, and which line is which, the page says.

    Raises:
        ValueError: another number of x than of y, or a number that is not finite.
        UnavailableError: matplotlib is not installed.
    """
    if not all(len(x) == len(y) > 0 and np.isfinite(x).all() and np.isfinite(y).all() for x, y in lines.values()):
        raise ValueError("each curve must have as many finite x as y, and at least one")
    drawing = figure("a report's curves", 6.4, 3.8)
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "fastsimgan", "text.parse_math": False, **dict.fromkeys(ink, _INK),
    }  # fmt: skip
    with matplotlib.rc_context(style):
        axes = drawing.add_subplot()
        for number, (x, y) in enumerate(lines.values()):
            axes.plot(x, y, color=COLOURS[number % len(COLOURS)], linewidth=1.5)
        axes.set_xlim(0, max(float(x.max()) for x, _ in lines.values()) or 1.0)
        axes.set_ylim(0, max(float(y.max()) for _, y in lines.values()) or 1.0)
        axes.set_xlabel(across)
        axes.grid(color="#8884")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same curves, the same bytes
        drawing.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor").rstrip()
