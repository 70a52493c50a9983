"""Numbers as people read them."""

from __future__ import annotations


def short(value: float) -> str:
    """Three digits and a letter: 6.74B, 12.3k, 950."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        scaled = value / factor
        if abs(scaled) >= 1:
            decimals = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            return f"{scaled:.{decimals}f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """1 h 02 min, 2 min 38 s, 41 s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{whole} s"


def gibibytes(count: float) -> str:
    """Bytes in GiB (MiB where that is less than a tenth of one)."""
    return f"{count / 2**30:.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.1f} MiB"
