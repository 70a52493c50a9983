"""Keys and passwords in texts: by the beginnings that their issuers give them, and random strings by their name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

LEAST_BITS = 3.5
"""Entropy of a password, in bits a character by the counts of its own: words of English and names in programs have
less, 16 random hexadecimal digits and more have more, but for a few."""
_LEAST_LENGTH, _MOST_LENGTH = 16, 512

_ISSUED = {
    "AKIA": r"[0-9A-Z]{16}(?![0-9A-Za-z])",  # AWS: lasting access key
    "ASIA": r"[0-9A-Z]{16}(?![0-9A-Za-z])",  # AWS: temporary
    "ghp_": r"[0-9A-Za-z]{36,255}",  # GitHub: personal, OAuth, user, server, refresh
    "gho_": r"[0-9A-Za-z]{36,255}",
    "ghu_": r"[0-9A-Za-z]{36,255}",
    "ghs_": r"[0-9A-Za-z]{36,255}",
    "ghr_": r"[0-9A-Za-z]{36,255}",
    "github_pat_": r"[0-9A-Za-z_]{60,255}",
    "xox": r"[abeoprs]-[0-9A-Za-z-]{10,255}",  # Slack
    "hooks.slack.com/services/": r"T[0-9A-Z]{6,15}/B[0-9A-Z]{6,15}/[0-9A-Za-z]{16,32}",
    "AIza": r"[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])",  # Google
    "sk_live_": r"[0-9A-Za-z]{16,255}",  # Stripe
    "rk_live_": r"[0-9A-Za-z]{16,255}",
    "hf_": r"[A-Za-z]{34}(?![0-9A-Za-z])",  # Hugging Face
}
_ISSUED_KEY = {
    beginning: re.compile(rf"(?<![0-9A-Za-z_]){re.escape(beginning)}{rest}", re.ASCII)
    for beginning, rest in _ISSUED.items()
}
_PRIVATE = "PRIVATE KEY"
_BEGIN, _END = (
    re.compile(rf"-----{word} (?:[A-Z0-9]{{1,16}} ){{0,3}}PRIVATE KEY(?: BLOCK)?-----") for word in ("BEGIN", "END")
)
_LONGEST_KEY = 20_000
_LINES = re.compile(r"(?:\s+[0-9A-Za-z+/=]{30,80}(?!\S)){0,400}")
"""Of a key whose end was cut off."""
_NAMES = (
    *("password", "passwd", "secret", "token", "api_key", "apikey", "api-key"),
    *("access_key", "accesskey", "private_key"),
)
_ASSIGNED = re.compile(
    rf"(?:{'|'.join(_NAMES)})[0-9a-z_-]{{0,24}}+[\"']?[ \t]{{0,3}}(?:=>|:=|[:=])[ \t]{{0,3}}[\"']?"
    rf"([0-9a-z+/_.=~-]{{{_LEAST_LENGTH},{_MOST_LENGTH}}}+)",
    re.ASCII | re.IGNORECASE,
)


def secrets_of(text: str) -> Iterator[tuple[int, int]]:
    """First and last place (not included) of each, in no order; they may overlap."""
    for beginning, pattern in _ISSUED_KEY.items():
        if beginning in text:
            yield from (found.span() for found in pattern.finditer(text))
    if _PRIVATE in text:
        yield from map(_private_key, _BEGIN.finditer(text))
    small = text.lower()
    if any(name in small for name in _NAMES):
        yield from (found.span(1) for found in _ASSIGNED.finditer(text) if _looks_random(found[1]))


def _private_key(begin: re.Match[str]) -> tuple[int, int]:
    """From its first line to its last one, or as far as lines look like it."""
    text, start = begin.string, begin.end()
    end = _END.match(text, text.find("-----", start, start + _LONGEST_KEY + 5) % (len(text) + 1))
    if end is None:
        end = _LINES.match(text, start)
        assert end is not None, "it matches nothing too"
    return begin.start(), end.end()


def _looks_random(value: str) -> bool:
    """Whether its longest piece between marks, of which names in programs and of files have many, is long and has
    letters and digits of many kinds."""
    piece = max(re.split(r"[._/=~-]", value), key=len)
    counts = Counter(piece)
    entropy = -sum(n / len(piece) * math.log2(n / len(piece)) for n in counts.values())
    mixed = any(map(str.isdigit, counts)) and any(map(str.isalpha, counts))
    return len(piece) >= _LEAST_LENGTH and mixed and entropy >= LEAST_BITS
