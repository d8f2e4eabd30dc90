"""A report as one HTML file that needs no network: text, tables, pictures and curves, all inside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimgan.metrics.statistics import t_quantile

_COLOURS = ("#888888", "#c2410c", "#a16207", "#1d6fd1", "#7c3aed", "#15803d")  # read on white and on near-black


class Report:
    """Blocks under one title, in the order in which they are added. Every text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks: list[str] = []

    def heading(self, text: str) -> None:
        """A section begins."""
        self._blocks.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Running text."""
        self._blocks.append(f"<p>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first cell of each row names it."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
            for row in rows
        )
        self._blocks.append(
            f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, png: bytes, caption: str) -> None:
        """A PNG, put into the page itself."""
        data = base64.b64encode(png).decode("ascii")
        self._blocks.append(
            f'<figure><div class="wide" tabindex="0"><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"</div><figcaption>{escape(caption)}</figcaption></figure>"
        )

    def curves(
        self,
        lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
        across: str,
        up: str,
        caption: str,
    ) -> None:
        """Curves as SVG, each ``(x, y)`` of finite numbers; both axes begin at 0."""
        if not all(len(x) == len(y) > 0 and np.isfinite(x).all() and np.isfinite(y).all() for x, y in lines.values()):
            raise ValueError("each curve must have as many finite x as y, and at least one")
        right = max(float(x.max()) for x, _ in lines.values()) or 1.0
        top = max(float(y.max()) for _, y in lines.values()) or 1.0
        width, height, left, above = 560, 320, 48, 12

        def place(x: float, y: float) -> str:
            return f"{left + x / right * width:.1f},{above + height - y / top * height:.1f}"

        parts = []
        for axis, end in ((0, right), (1, top)):
            step = _round_step(end)
            for k in range(int(end / step + 1e-9) + 1):
                value = k * step
                ends = ((value, 0.0), (value, top)) if axis == 0 else ((0.0, value), (right, value))
                parts.append(f'<polyline class="grid" points="{" ".join(place(*point) for point in ends)}"/>')
                at, level = place(*ends[0]).split(",")
                parts.append(
                    f'<text x="{at}" y="{above + height + 18}" text-anchor="middle">{value:g}</text>'
                    if axis == 0
                    else f'<text x="{left - 6}" y="{float(level) + 4:.1f}" text-anchor="end">{value:g}</text>'
                )
        parts.append(
            f'<text x="{left + width / 2}" y="{above + height + 38}" text-anchor="middle">{escape(across)}</text>'
        )
        keys = ""
        for number, (name, (x, y)) in enumerate(lines.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            points = " ".join(place(float(a), float(b)) for a, b in zip(x, y, strict=True))
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
            keys += f'<li><span class="key" style="background:{colour}"></span>{escape(name)}</li>'
        box = f"0 0 {left + width + 12} {above + height + 46}"
        self._blocks.append(
            f'<figure><p class="axis">{escape(up)}</p><svg viewBox="{box}" role="img" aria-label="{escape(caption)}">'
            f'{"".join(parts)}</svg><ul class="keys">{keys}</ul><figcaption>{escape(caption)}</figcaption></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        title = escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f"<title>{title}</title>\n<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "\n".join(self._blocks)
            + "\n</body></html>\n"
        )


def interval(row: Mapping[str, Any], constant: bool = False, digits: int = 2) -> str:
    """A cell: ``row["mean"]`` ± half of its 95 % interval (Student's t) over ``row["each"]``, from two of these on."""
    count = len(row["each"])
    if constant or count < 2:
        return f"{row['mean']:.{digits}f}"
    half = t_quantile(0.975, count - 1) * row["std"] / math.sqrt(count)
    return f"{row['mean']:.{digits}f} ± {half:.{digits}f}"


def _round_step(end: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that makes at most seven of ``end``."""
    power = 10.0 ** math.floor(math.log10(end / 7))
    return next(power * factor for factor in (1, 2, 5, 10) if end <= power * factor * 7 * (1 + 1e-9))


_STYLE = """
:root { color-scheme: light dark; --line: #8884 }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1000px; padding: 12px 16px 48px;
  color: #16181d; background: #fff; overflow-wrap: anywhere }
h1 { line-height: 1.2 } h2 { margin-top: 2em } p, figcaption { max-width: 44em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { text-align: left } figure { margin: 1em 0 } figcaption, .axis { color: #5b616e; font-size: 14px }
.axis { margin: 0 } img { image-rendering: pixelated; display: block }
svg { width: 100%; max-width: 640px; display: block } svg text { fill: currentColor; font-size: 13px }
.grid { stroke: var(--line); fill: none } .keys { list-style: none; padding: 0; display: flex; flex-wrap: wrap;
  gap: 4px 18px } .key { display: inline-block; width: 18px; height: 4px; margin-right: 6px; vertical-align: middle }
@media (prefers-color-scheme: dark) { body { color: #e6e8ec; background: #15171b }
  figcaption, .axis { color: #a0a6b2 } }
"""
