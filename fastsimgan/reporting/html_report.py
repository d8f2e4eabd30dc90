"""A report as one HTML file that needs no network: text, tables, pictures and curves, all inside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from fastsimgan.metrics.statistics import t_quantile
from fastsimgan.reporting.plots import COLOURS, curves_svg
from fastsimgan.reporting.templates import fill_in

_PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class _Text:
    kind: str  # "heading" or "paragraph"
    text: str


@dataclass(frozen=True)
class _Table:
    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Picture:
    kind: ClassVar[str] = "picture"
    png: str  # base64
    caption: str


@dataclass(frozen=True)
class _Curves:
    kind: ClassVar[str] = "curves"
    svg: str
    keys: list[tuple[str, str]]  # name and colour
    up: str
    caption: str


class Report:
    """Blocks under one title, in the order in which they are added. Every text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks: list[_Text | _Table | _Picture | _Curves] = []

    def heading(self, text: str) -> None:
        """A section begins."""
        self._blocks.append(_Text("heading", text))

    def paragraph(self, text: str) -> None:
        """Running text."""
        self._blocks.append(_Text("paragraph", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first cell of each row names it."""
        self._blocks.append(_Table(header, rows))

    def picture(self, png: bytes, caption: str) -> None:
        """A PNG, put into the page itself."""
        self._blocks.append(_Picture(base64.b64encode(png).decode("ascii"), caption))

    def curves(
        self, lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], across: str, up: str, caption: str
    ) -> None:
        """Curves as SVG, each ``(x, y)`` of finite numbers; both axes begin at 0.

        Raises ValueError if they are not, and UnavailableError without matplotlib.
        """
        keys = [(name, COLOURS[number % len(COLOURS)]) for number, name in enumerate(lines)]
        self._blocks.append(_Curves(curves_svg(lines, across), keys, up, caption))

    def html(self) -> str:
        """The whole page."""
        return fill_in(_PAGE, title=self.title, blocks=self._blocks)


def interval(row: Mapping[str, Any], constant: bool = False, digits: int = 2) -> str:
    """A cell: ``row["mean"]`` ± half of its 95 % interval (Student's t) over ``row["each"]``, from two of these on."""
    count = len(row["each"])
    if constant or count < 2:
        return f"{row['mean']:.{digits}f}"
    half = t_quantile(0.975, count - 1) * row["std"] / math.sqrt(count)
    return f"{row['mean']:.{digits}f} ± {half:.{digits}f}"
