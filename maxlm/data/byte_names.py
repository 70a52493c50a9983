"""The bytes that a token of byte-level BPE is named for.

GPT-2's way: a byte that can be seen is the character of its number, and the others, in order, are those from U+0100 on.
"""

from __future__ import annotations

_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
_BYTES = {chr(byte): byte for byte in _SEEN} | {chr(256 + i): byte for i, byte in enumerate(_UNSEEN)}


def bytes_of(name: str) -> bytes:
    """Of the token of that name. A character that stands for no byte is itself."""
    return b"".join(bytes([_BYTES[one]]) if one in _BYTES else one.encode() for one in name)
