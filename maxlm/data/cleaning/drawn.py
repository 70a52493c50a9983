"""Chance that a text decides: the same on every machine, and in any order of the documents."""

from __future__ import annotations

import hashlib


def drawn(text: str, seed: int = 0) -> float:
    """A number in [0, 1), evenly spread over texts; `seed`, less than 2^32: another one draws other numbers."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6, key=seed.to_bytes(4, "big"))
    return int.from_bytes(digest.digest(), "big") / 2**48
