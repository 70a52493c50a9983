"""Histograms of what rules measured, with their limits, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from maxlm.data.cleaning.findings import Limit
from maxlm.observe.svg import number, ticks
from maxlm.observe.text import short

_BINS, _WIDTH, _HEIGHT = 40, 440, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 34, 36
_FAR, _SHARES = 100, 1
"""What reaches over more than so many times its least is drawn on a logarithmic axis, if it is more than a share."""
_ZERO = 3 / _BINS


class _Axis(NamedTuple):
    """Values as places from 0 to 1."""

    low: float
    high: float
    logarithmic: bool = False
    zero: float = 0.0
    """Share of a logarithmic axis that is for 0, before all others."""

    def place(self, value: float) -> float:
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return self.zero / 2
        return self.zero + (1 - self.zero) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Four to nine round numbers; powers of ten on a logarithmic axis."""
        if not self.logarithmic:
            return ticks(self.low, self.high)
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        powers = [10.0**power for power in range(first, last + 1, 1 + (last - first) // 6)]
        return [0.0] * (self.zero > 0) + powers


def _across(values: list[float]) -> _Axis:
    """For values and limits, each in the middle of a bin; logarithmic where else most would be at one end."""
    low, high = min(values), max(values)
    least = min((value for value in values if value > 0), default=0.0)
    if low >= 0 and high > _FAR * least > 0 and high > _SHARES:
        half = (high / least) ** (0.5 / _BINS)
        return _Axis(least / half, high * half, True, _ZERO if low == 0 else 0.0)
    half = 0.5 * (high - low) / (_BINS - 1) or 0.5
    return _Axis(low - half, high + half)


def _up(counts: list[int]) -> _Axis:
    """For bars; a logarithmic one begins below 1, so that one document is seen."""
    most = max(counts)
    return _Axis(0.5, most * 1.3, True) if most > _FAR * min(filter(None, counts)) else _Axis(0.0, most * 1.05)


def histogram(limit: Limit, values: Mapping[str, int], dropped: int) -> str:
    """A <figure>: bars of how many documents have which value, the limits as lines.

    Args:
        limit: what the values are of.
        values: of each value, as text, the number of documents.
        dropped: documents for which it was the reason.

    Returns:
        Nothing where no value is a finite number.
    """
    found = [(float(value), count) for value, count in values.items() if math.isfinite(float(value))]
    bounds = {name: one for name, one in (("least", limit.least), ("most", limit.most)) if math.isfinite(one)}
    if not found:
        return ""
    across = _across([*(value for value, _ in found), *bounds.values()])
    kept, bins = [0] * _BINS, [0] * _BINS
    for value, count in found:
        at = min(_BINS - 1, int(across.place(value) * _BINS))
        bins[at] += count
        kept[at] += count * limit.allows(value)
    up = _up(bins)
    px = lambda share: _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
    py = lambda share: _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(limit.rule)}">']
    for tick in up.ticks():
        if tick == round(tick):
            y = py(up.place(tick))
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for i, both in enumerate(zip(bins, kept, strict=True)):
        for name, count in zip(("gone", "kept"), both, strict=True):  # what is kept before the whole
            if count:
                y = py(up.place(count))
                size = f'width="{px(1 / _BINS) - px(0) - 1:.1f}" height="{py(0) - y:.1f}"'
                told = f"<title>{both[1]:,} within the limits, {both[0] - both[1]:,} beyond</title>"
                parts.append(f'<rect class="{name}" x="{px(i / _BINS):.1f}" y="{y:.1f}" {size}>{told}</rect>')
    for value in across.ticks():
        x = px(across.place(value))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{number(value)}</text>')
    for name, bound in bounds.items():
        x, left = px(across.place(bound)), name == "most"
        if not 0.25 < across.place(bound) < 0.75:
            left = across.place(bound) > 0.5
        end, side = ("end", -5) if left else ("start", 5)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{py(0)}"/>')
        label = f'x="{x + side:.1f}" y="{_TOP - 5}" text-anchor="{end}"'
        parts.append(f'<text class="limit" {label}>at {name} {number(bound)}</text>')
    unit = escape(limit.unit) + " (log)" * across.logarithmic
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{unit}</text>')
    parts.append(f'<text x="0" y="11">documents{" (log)" * up.logarithmic}</text></svg>')
    told = f"{dropped:,} dropped" if bounds else "no limit"
    return f"<figure><figcaption>{escape(limit.rule)} <i>{told}</i></figcaption>{''.join(parts)}</figure>"
