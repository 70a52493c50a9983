"""Charts as SVG, without script or link: lines for a page, which brings their colours, and bars as a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from maxlm.observe.plots import Points
from maxlm.observe.text import short

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 34
_MOST_POINTS = 1500


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `style` is a class of the page: raw, smooth or eval."""

    label: str
    style: str
    points: Points
    marks: bool = False


def chart(title: str, lines: Sequence[Line], *, x_label: str) -> str:
    """An <svg> with axes, grid and legend; an empty string when there is no point to show."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    margin = 0.05 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = (0.0 if 0 <= y_low < margin else y_low - margin), y_high + margin

    def px(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(x_low, x_high):
        parts.append(f'<text x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for line in lines:
        stride = math.ceil(len(line.points) / _MOST_POINTS)
        shown = line.points[::-1][::stride][::-1]  # keeps the last point
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in shown)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.marks or len(shown) == 1:
            for x, y in shown:
                place = f'cx="{px(x):.1f}" cy="{py(y):.1f}"'
                parts.append(
                    f'<circle class="{line.style}" {place} r="3.5"><title>{short(x)}: {y:.6g}</title></circle>'
                )
    parts.append("</svg>")
    legend = "".join(f'<span class="key {line.style}">{escape(line.label)}</span>' for line in lines)
    return f"<figure><figcaption>{escape(title)} {legend}</figcaption>{''.join(parts)}</figure>"


@dataclass(frozen=True, kw_only=True)
class ShareBar:
    """One share of a chart, from 0 to 1."""

    label: str
    value: float
    low: float
    high: float
    """Its interval."""
    mark: float | None = None
    """What it is compared with, such as chance."""


_BAR, _NAMES, _VALUES = 24, 230, 60
_BARS_STYLE = (
    "text{font:12px sans-serif;fill:#333}.bar{fill:#9db4d3}.interval{stroke:#1f4e9c;stroke-width:2}"
    ".mark{stroke:#c8501e;stroke-width:2;stroke-dasharray:3 2}.grid{stroke:#ddd}"
)


def bars(title: str, shown: Sequence[ShareBar]) -> str:
    """A whole SVG file: a bar for each share, with its interval as a line and its mark dashed."""
    width, height = _WIDTH + 120, 44 + _BAR * len(shown) + 20
    px = lambda share: _NAMES + share * (width - _NAMES - _VALUES)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_BARS_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/><text x="10" y="20">{escape(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = f"{px(share):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="32" y2="{height - 20}"/>')
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{share:g}</text>')
    for i, one in enumerate(shown):
        y = 36 + _BAR * i
        middle, end = f"{y + _BAR / 2 - 2:.1f}", _BAR - 8
        parts.append(f'<text x="{_NAMES - 8}" y="{y + 14}" text-anchor="end">{escape(one.label)}</text>')
        parts.append(
            f'<rect class="bar" x="{px(0):.1f}" y="{y + 2}" width="{px(one.value) - px(0):.1f}" height="{end}"/>'
        )
        parts.append(
            f'<line class="interval" x1="{px(one.low):.1f}" x2="{px(one.high):.1f}" y1="{middle}" y2="{middle}"/>'
        )
        if one.mark is not None:
            x = f"{px(one.mark):.1f}"
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{y}" y2="{y + end + 4}"/>')
        parts.append(f'<text x="{px(1) + 10:.1f}" y="{y + 14}">{one.value:.3f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within [low, high]."""
    largest = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(largest))
    step = next(m * magnitude for m in (5, 2.5, 2, 1) if m * magnitude <= largest)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """As it stands at an axis."""
    return short(value) if abs(value) >= 1e4 else f"{value:.4g}"
