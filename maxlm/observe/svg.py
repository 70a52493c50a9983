"""Line charts as inline SVG: no script, no link, colours from the page's own style."""

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
    for y in _ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(x_low, x_high):
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


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within [low, high]."""
    largest = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(largest))
    step = next(m * magnitude for m in (5, 2.5, 2, 1) if m * magnitude <= largest)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return short(value) if abs(value) >= 1e4 else f"{value:.4g}"
