"""The bytes that one token of a `tokenizer.json` adds to a text, as its decoder makes them; the unknown token."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from maxlm.config import UserError


def spelled(token: str, decoder: Mapping[str, Any] | None) -> bytes:
    """The bytes of a token in the middle of a text.

    Args:
        token: as the vocabulary has it.
        decoder: `decoder` of the file (tokenizers, docs/source/components.mdx, "Decoders").

    Raises:
        UserError: what such a decoder makes of a token depends on the tokens around it.
    """
    if decoder is None:
        raise UserError("tokenizer.json: has no decoder, so spaces come from nowhere; use a tokenizer with one")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    fused = False
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                table = _bytes_of_characters()
                known = all(character in table for character in token)
                return bytes(table[character] for character in token) if known else token.encode()
            case "ByteFallback":
                if re.fullmatch("<0x[0-9A-F]{2}>", token):
                    return bytes([int(token[3:5], 16)])
            case "Metaspace":
                token = token.replace(step["replacement"], " ")
            case "Replace" if "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
            case "Fuse":
                fused = True
            case "Strip" if fused:  # of the whole text's ends
                pass
            case kind:
                raise UserError(
                    f"tokenizer.json: what its decoder {kind} makes of a token depends on its neighbours; use a "
                    "tokenizer of whole bytes or of pieces with a mark for the space"
                )
    return token.encode()


def unknown_in(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The id for characters that nothing spells, as the `model` of the file names it; None: it names none."""
    found: int | None = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token") or "")
    return found


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet (openai/gpt-2, src/encoder.py, bytes_to_unicode): a printable byte is the character of its
    number, the others are those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
